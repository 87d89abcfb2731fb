"""The container on a real GPU: nothing waits, graphs and streams work, weights are followed, `auto` times once."""

from __future__ import annotations

import copy

import pytest
import torch
from stacks import image, run, stack
from torch import Tensor, nn

from vgg_fast import selection
from vgg_fast.accelerate import accelerate
from vgg_fast.container import choice
from vgg_fast.gpu.winners import Winners

BACKENDS = ("triton", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    status = {b.name: b for b in selection.backends()}[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param


def on_gpu(backend: str, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain children in fp32, the accelerated ones, and an input; two images of integers, exact in every dtype."""
    model = stack(bn=True).requires_grad_(False)[:7].cuda()  # of three convolutions the sums would pass 2048
    fused = accelerate(copy.deepcopy(model), backend)
    for module in fused:
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    return model, fused, image(dtype=dtype).cuda()


def test_a_forward_does_not_wait_for_the_device(backend):
    model, fused, x = on_gpu(backend)
    run(fused, x)  # compiles, tests itself, packs
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, segments = run(fused, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [s.kernel for s in segments] == [selection.choose(x.dtype, x.device, backend)]
    assert torch.equal(y.float(), run(model, x.float())[0])


def test_replays_of_a_graph_follow_the_weights(backend):
    model, fused, x = on_gpu(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(fused, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, segments = run(fused, x)
    assert [s.kernel for s in segments] == [selection.choose(x.dtype, x.device, backend)]
    for _ in range(2):
        graph.replay()
        assert torch.equal(y.float(), run(model, x.float())[0])
        for plain, ours in ((model[0], fused[0]), (model[1], fused[1])):
            for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
                p.data.neg_()  # no version shows it
                q.data.neg_()


def test_an_unknown_size_inside_a_capture_is_left_to_pytorch():
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    model, fused, x = on_gpu("auto")
    run(model.half(), x)  # cuDNN starts outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, segments = run(fused, x)
    assert "CUDA graph is being captured" in segments[0].reason
    graph.replay()
    assert y.isfinite().all()


def test_two_streams_at_once(backend):
    model, fused, x = on_gpu(backend)
    run(fused, x)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            results.append(run(fused, x)[0])
    torch.cuda.synchronize()
    expected = run(model, x.float())[0].half()
    assert all(torch.equal(y, expected) for y in results)


def test_the_device_is_that_of_the_input(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device")
    model, fused, x = on_gpu(backend)
    expected, _ = run(model, x.float())
    x = x.to("cuda:1")
    y, segments = run(fused.to("cuda:1"), x)
    assert torch.cuda.current_device() == 0
    assert [s.kernel for s in segments] == [selection.choose(x.dtype, x.device, backend)]
    assert torch.equal(y.cpu().float(), expected.cpu())


def test_auto_times_once_and_explains_itself(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    monkeypatch.setattr(choice._tuner, "winners", Winners(tmp_path))
    model, fused, x = on_gpu("auto")
    x = x[:, :, :11, :9]  # a size that no other test asks for
    y, segments = run(fused, x)
    told = segments[0].timed or segments[0].reason
    assert told.startswith("timed: ")
    assert "PyTorch" in told
    assert "is out" not in told
    assert len(list(tmp_path.iterdir())) == 1
    torch.testing.assert_close(y.float(), run(model, x.float())[0], rtol=2e-2, atol=2e-2)
    again = run(fused, x)[1]
    assert (again[0].timed or again[0].reason) == told
