"""Several threads at once, forked workers, and distributed training around an accelerated model."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import stacks
import torch
from stacks import at_once, fused_copy, fused_names, image, kernel, run, stack
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from vgg_fast.accelerate import refresh
from vgg_fast.container import packs
from vgg_fast.container.sequential import _STATE

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

# --- threads --------------------------------------------------------------------------------------------------------


def test_the_first_call_comes_from_many_threads():
    plain = stack(bn=True)
    expected, _ = run(plain, image())
    for _ in range(10):
        fused = fused_copy(plain)
        with torch.no_grad(), stacks.record() as segments:
            outputs = at_once(*[torch.no_grad()(lambda m=fused: m(image()))] * 8)
        assert all(torch.equal(out, expected) for out in outputs)
        assert [s.kernel for s in segments] == [kernel()] * 8
        assert len(fused.__dict__[_STATE].packs) == 1


def test_threads_with_different_programs_of_one_model():
    fused = fused_copy(stack())
    expected = [run(stack()[:n], image())[0] for n in (2, 5, 8)]

    def call(n: int) -> torch.Tensor:
        with torch.inference_mode():
            for _ in range(20):
                out = fused[:n](image())
        return out

    for out, wanted in zip(at_once(*[lambda n=n: call(n) for n in (2, 5, 8)]), expected, strict=True):
        assert torch.equal(out, wanted)


def test_threads_in_different_autocast_states():
    fused = fused_copy(stack())
    single, _ = run(stack(), image())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = run(stack(), image())

    def call(autocast: bool) -> bool:
        wanted = half if autocast else single
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return all(torch.equal(fused(image()), wanted) for _ in range(30))

    assert all(at_once(*[lambda a=a: call(a) for a in (True, False, True, False)]))


def test_refresh_in_one_thread_while_others_run():
    fused = fused_copy(stack(bn=True))
    expected, _ = run(fused, image())
    done = threading.Event()

    def call() -> bool:
        with torch.no_grad():
            return all(torch.equal(fused(image()), expected) for _ in range(50))

    def forget() -> bool:
        while not done.is_set():
            refresh(fused)
        return True

    background = threading.Thread(target=forget)
    background.start()
    try:
        assert all(at_once(call, call, call))
    finally:
        done.set()
        background.join()


# --- forked processes -----------------------------------------------------------------------------------------------


class Features(Dataset):
    """Preprocessing by a network, in the workers of a DataLoader."""

    def __init__(self, model: nn.Module, warm: bool) -> None:
        self.model = model
        if warm:
            run(model, image())

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        out, segments = run(self.model, image() + i)
        return out, segments[0].kernel or segments[0].reason


@forks
@pytest.mark.parametrize("warm", [True, False])
def test_a_dataloader_worker_after_the_parent_has_run(warm):
    plain = stack(bn=True)
    for size in ((8, 3, 64, 64), (2, 3, 12, 10)):
        run(fused_copy(plain), image(*size))  # the parent's threads exist
    data = Features(fused_copy(plain), warm)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for i, (out, name) in enumerate(loader):
        assert name == kernel()
        assert torch.equal(out, run(plain, image() + i)[0])


def send_output(model: nn.Module, results) -> None:
    torch.set_num_threads(1)  # as a DataLoader worker does: with more, plain PyTorch hangs after a fork as well
    out, segments = run(model, image())
    results.send((out.tolist(), segments[0].kernel))


@forks
def test_a_fork_while_another_thread_packs():
    # The lock is held by a thread that does not exist in the child.
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with packs._lock.held():
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        receive, send = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=send_output, args=(fused_copy(stack()), send))
        child.start()
        assert receive.poll(60), "the child hangs"
        out, name = receive.recv()
        child.join(60)
    finally:
        release.set()
        holder.join()
    assert name == kernel()
    assert torch.equal(torch.tensor(out), run(stack(), image())[0])


# --- distributed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel():
    plain = stack(bn=True)
    wrapped = DistributedDataParallel(fused_copy(plain))
    out, segments = run(wrapped, image())
    assert [s.kernel for s in segments] == [kernel()]
    assert torch.equal(out, run(plain, image())[0])
    assert list(wrapped.state_dict()) == [f"module.{name}" for name in plain.state_dict()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=2.0**-20, fused=True) for m in (plain, wrapped)]
    for _ in range(2):
        for model, optimizer in zip((plain, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            model(image()).square().mean().backward()
            optimizer.step()
        for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        theirs, _ = run(plain, image())
        ours, segments = run(wrapped, image())
        assert fused_names(segments) != []
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@forks
def test_distributed_data_parallel_with_two_processes(tmp_path):
    # In a process of its own: autograd cannot be used in the fork of a process that has used it.
    script = Path(__file__).with_name("ddp_two_processes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(f"fused by {kernel()}, weights equal") for line in lines), lines
