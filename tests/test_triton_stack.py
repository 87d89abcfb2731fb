"""conv_stack on a GPU without one: its values in Triton's interpreter, its plan as data, its launches as compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_kernels import interpreted_stack
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vgg_fast import reference, testing
from vgg_fast.kernels.configs import Architecture
from vgg_fast.kernels.stack import Problem, launches_of, layout_of, traced
from vgg_fast.reference import Step

RELU, POOL, TAP = (int(step) for step in (Step.RELU, Step.POOL, Step.TAP))
CPU = torch.device("cpu")
VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG16_PROGRAM = [RELU | POOL * (i in (1, 3, 6, 9, 12)) for i in range(13)]


@pytest.fixture
def stack() -> ModuleType:
    return interpreted_stack()


@pytest.fixture
def _nan_in_new_memory() -> Iterator[None]:
    """What is allocated and not written to is NaN, not by chance a zero or the right answer of the call before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ohwi(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).contiguous()


def chain(channels: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Weights ``[Cout, Cin, 3, 3]`` and affine maps of small integers, whose sums are exact in every order."""
    weights = [
        testing.integer_tensor(cout, cin, 3, 3, limit=1, seed=i, dtype=dtype)
        for i, (cin, cout) in enumerate(pairwise(channels))
    ]
    affines = [torch.stack([torch.ones(w.shape[0]), testing.integer_tensor(w.shape[0], limit=2)]) for w in weights]
    return weights, affines


PROGRAMS = {
    "no tap": [RELU, RELU | POOL, 0],
    "a tap before a pool": [RELU, RELU | POOL | TAP, RELU],
    "taps that the next step reads": [RELU | TAP, TAP, RELU | POOL],
    "a tap that is the result": [RELU, POOL, RELU | TAP],
    "every step, and a pool at the end": [TAP, RELU | POOL | TAP, POOL | TAP],
}


@pytest.mark.usefixtures("_nan_in_new_memory")
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_taps_and_result(stack, program):
    """In NHWC of odd sizes; the second step's grid is small enough to be split."""
    weights, affines = chain([3, 16, 24, 17], torch.float32)
    x = testing.integer_tensor(2, 3, 11, 9, limit=2)
    results = stack.conv_stack(x, [ohwi(w) for w in weights], affines, program)
    expected = reference.conv_stack_taps(x, weights, affines, program)
    assert len(results) == sum(bool(step & TAP) for step in program) + 1
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last)
    assert len({y.data_ptr() for y in results}) == len(results)
    problem = Problem((2, 3, 11, 9), (16, 24, 17), tuple(program), torch.float32, "ieee", CPU)
    assert any(launch.counters for launch in launches_of(problem))


def test_memory_that_is_not_aligned_is_copied(stack):
    """Kernels are compiled for addresses that are multiples of 16 bytes."""
    weights, affines = chain([4, 16], torch.float16)
    memory = testing.integer_tensor(1 + 1 * 6 * 6 * 4, limit=2, dtype=torch.float16)
    x = memory[1:].view(1, 6, 6, 4).permute(0, 3, 1, 2)
    odd = torch.zeros(1 + weights[0].numel(), dtype=torch.float16)[1:].view(16, 3, 3, 4).copy_(ohwi(weights[0]))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() % 16
    assert odd.data_ptr() % 16
    (y,) = stack.conv_stack(x, [odd], affines, [RELU])
    assert torch.equal(y, reference.conv_stack(x.float(), [weights[0].float()], affines, [RELU]).half())


def test_no_images(stack):
    weights, affines = chain([3, 8, 5], torch.float32)
    results = stack.conv_stack(torch.ones(0, 3, 9, 8), [ohwi(w) for w in weights], affines, [POOL | TAP, RELU])
    assert [tuple(y.shape) for y in results] == [(0, 8, 9, 8), (0, 5, 4, 4)]


X, WEIGHTS, AFFINES = torch.ones(1, 4, 6, 6), [torch.ones(8, 3, 3, 4), torch.ones(5, 3, 3, 8)], [torch.ones(2, 8)]


@pytest.mark.parametrize(
    ("x", "weights", "affines", "program", "message"),
    [
        (X, WEIGHTS[:1], AFFINES, [0, 0], "1 weights, 1 affines and 2 program entries"),
        (X, [], [], [], "0 weights"),
        (
            X,
            WEIGHTS[1:],
            [torch.ones(2, 5)],
            [0],
            r"weight has shape \(5, 3, 3, 8\); expected contiguous \[Cout, 3, 3, 4\]",
        ),
        (X, [WEIGHTS[0], WEIGHTS[0]], AFFINES * 2, [0, 0], r"weight has shape \(8, 3, 3, 4\); .*\[Cout, 3, 3, 8\]"),
        (X, WEIGHTS, AFFINES * 2, [0, 0], r"affine is torch.float32 of shape \(2, 8\); expected .*\[2, 5\]"),
        (X, [WEIGHTS[0].half()], AFFINES, [0], "weight is torch.float16, x is torch.float32"),
        (X[0], WEIGHTS[:1], AFFINES, [0], r"expected \[N, Cin, H, W\]"),
        (X.double(), [WEIGHTS[0].double()], AFFINES, [0], "float64 is not one of"),
        (X[..., :0], WEIGHTS[:1], AFFINES, [0], "a 6x0 map is smaller than 1x1"),
        (
            X[..., :2, :2],
            [*WEIGHTS[:1], WEIGHTS[1]],
            [*AFFINES, torch.ones(2, 5)],
            [POOL, POOL],
            "a 1x1 map is smaller",
        ),
    ],
)
def test_what_does_not_fit_is_named(stack, x, weights, affines, program, message):
    with pytest.raises(ValueError, match=message):
        stack.conv_stack(x, weights, affines, program)
    with pytest.raises(ValueError, match="precision 'tf32' is for fp32 tensors"):
        stack.conv_stack(X.half(), [WEIGHTS[0].half()], AFFINES, [0], "tf32")


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", [Architecture(80, 108), Architecture(90, 132), Architecture(120, 170)], ids=str
)
@pytest.mark.parametrize("n", [1, 32])
def test_no_step_of_vgg16_writes_where_it_reads(architecture, n):
    problem = Problem((n, 3, 224, 224), tuple(VGG16), tuple(VGG16_PROGRAM), torch.float16, "ieee", CPU)
    launches = launches_of(problem, architecture)
    layout = layout_of(launches, torch.float16)
    sizes = [2 * torch.Size(launch.out_size).numel() for launch in launches[:-1]]
    spans = [(offset, offset + size) for offset, size in zip(layout.offsets, sizes, strict=True)]
    assert all(start % 256 == 0 and stop <= layout.partials for start, stop in spans)
    for (start, stop), (next_start, next_stop) in pairwise(spans):
        assert stop <= next_start or next_stop <= start
    # The two largest neighbours, not thirteen tensors; and partial sums.
    assert layout.partials == 2 * n * 64 * 224 * 224 + 2 * n * 64 * 112 * 112
    assert layout.workspace == layout.partials + 4 * max(launch.partials for launch in launches)
    assert layout.counters == max(launch.counters for launch in launches)
    assert n > 1 or layout.counters > 0


# --- as it is launched on a GPU -------------------------------------------------------------------------------------

LAUNCHES = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from recording_driver import RecordingDriver
gpu = RecordingDriver(int(sys.argv[2])).install()
from vgg_fast.kernels import pack, stack

x = torch.ones(1, 16, 12, 12, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
weights = [torch.ones(c, 3, 3, 16 if i == 0 else 32, dtype=torch.float16) for i, c in enumerate((32, 32, 32))]
affines = [torch.ones(2, 32)] * 3
calls = []
for _ in range(2):
    results = stack.conv_stack(x, weights, affines, [1, 7, 1])
    calls.append([
        {"grid": l.grid, "stream": l.stream, **{k: v for k, v in l.arguments.items() if v is not None}}
        for l in gpu.launched
    ])
    gpu.launched.clear()
packed, affine = torch.ones(2, 3, 3, 4, dtype=torch.float16), torch.ones(2, 2)
repack = pack.Repacker([pack.Source(torch.ones(2, 4, 3, 3), [None] * 5, 0.0)], [packed], [affine])
repack(-1)
(l,) = gpu.launched
print(json.dumps({
    "calls": calls,
    "x": x.data_ptr(),
    "weights": [w.data_ptr() for w in weights],
    "results": [y.data_ptr() for y in results],
    "plans": len(stack._plans),
    "repack": {"grid": l.grid, "stream": l.stream, **l.arguments, "table": repack.table.data_ptr()},
}))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_launches(capability):
    """Compiled for a real GPU by Triton's own runtime; only its driver is replaced, which writes down what it gets."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-c", LAUNCHES, str(Path(__file__).parent), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["plans"] == 1
    for launches in seen["calls"]:
        assert len(launches) == 3
        assert [launch["weight_ptr"] for launch in launches] == seen["weights"]
        # Each reads what the one before has written; the tap and the result are the tensors returned.
        sources, targets = ([launch[name] for launch in launches] for name in ("x_ptr", "out_ptr"))
        assert sources == [seen["x"], *targets[:-1]]
        assert targets[0] != targets[1]
        assert [launch["stream"] for launch in launches] == [0, 0, 0]  # PyTorch's, not the driver's own
        assert [launch["TAP"] for launch in launches] == [False, True, False]
        assert "tap_ptr" in launches[1]
        for launch in launches:
            assert launch["grid"][1:] == [1, 1]
            assert ("partials_ptr" in launch) == ("counters_ptr" in launch) == (launch["SPLIT"] > 1)
            assert all(launch[name] % 16 == 0 for name in launch if name.endswith("_ptr"))
        assert any(launch["SPLIT"] > 1 for launch in launches)
    tap, result = seen["results"]
    assert seen["calls"][-1][1]["tap_ptr"] == tap
    assert seen["calls"][-1][2]["out_ptr"] == result
    repack = seen["repack"]
    assert (repack["grid"], repack["stream"], repack["table_ptr"]) == ([16, 1, 1], 0, repack["table"])
    assert repack["salt"] == 2**61 - 1


def test_what_torch_compile_sees():
    """The kernels themselves, one per step, in a graph without the op."""
    weights, affines = chain([3, 64, 64, 128], torch.float16)
    architecture, program = Architecture(90, 132), [RELU, RELU | POOL | TAP, RELU | TAP]

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return traced(x, weights, affines, program, architecture=architecture)

    x, fake = torch.ones(1, 3, 32, 32, dtype=torch.float16), FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        graph = make_fx(run)(*map(fake.from_tensor, [x, *map(ohwi, weights)]))
    nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [node.kwargs["kwargs"]["CO"] for node in nodes] == [64, 64, 128]
    assert [node.kwargs["kwargs"]["TAP"] for node in nodes] == [False, True, False]
    sizes = [tuple(node.meta["val"].shape) for node in next(iter(reversed(graph.graph.nodes))).args[0]]
    assert sizes == [(1, 64, 32, 32), (1, 128, 16, 16), (1, 128, 16, 16)]
