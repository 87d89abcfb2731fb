"""explain tells what really ran, and leaves everything as it was."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from stacks import conv, fused_copy, image, kernel, run, stack
from torch import nn

from vgg_fast import selection
from vgg_fast.accelerate import accelerate
from vgg_fast.container.sequential import _STATE
from vgg_fast.explain import Row, explain, record
from vgg_fast.models import cfgs


class Mixed(nn.Module):
    """One of everything: a container, a plain child in it, a layer outside, a container that is looped over."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.ReLU(True), nn.AvgPool2d(2), conv(8, 8), nn.Conv2d(8, 8, 1))
        self.outside = conv(8, 8)
        self.loop = nn.Sequential(conv(8, 8), nn.ReLU())
        self.own = Own(conv(8, 8))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.own(self.outside(self.features(x)))
        for layer in self.loop:
            x = layer(x)
        return x


class Own(nn.Sequential):
    pass


def rows(model: nn.Module, *args) -> dict[str, Row]:
    with torch.inference_mode():
        return {row.path: row for row in explain(model, *args).rows}


@pytest.mark.parametrize("accelerated", [False, True])
def test_every_layer_and_its_reason(accelerated):
    model = accelerate(Mixed()) if accelerated else Mixed()
    found = rows(model, image())
    assert {path: (row.status, row.kernel, row.chain) for path, row in found.items()} == {
        "features.0": ("fused", kernel(), 1),
        "features.1": ("fused", kernel(), 1),
        "features.2": ("plain", "", None),
        "features.3": ("fused", kernel(), 2),
        "features.4": ("plain", "", None),
        "outside": ("plain", "", None),
        "loop.0": ("plain", "", None),
        "loop.1": ("plain", "", None),
        "own.0": ("plain", "", None),
    }
    assert found["features.0"].reason == ""
    assert found["features.2"].reason == "AvgPool2d is not a type that is fused"
    assert found["features.4"].reason == "kernel_size=(1, 1), fused: (3, 3)"
    assert found["outside"].reason == "it is called by Mixed, not by an nn.Sequential"
    assert found["loop.0"].reason.startswith("loop is not called as a whole")
    assert found["own.0"].reason == "Own is a subclass of nn.Sequential and may have a forward of its own"
    assert found["outside"].type == "Conv2d"


def test_the_table():
    model = Mixed()
    with torch.inference_mode():
        explanation = explain(model, image())
    lines = str(explanation).splitlines()
    assert lines[0].split() == ["layer", "type", "status", "chain", "kernel", "reason"]
    assert lines[1].split() == ["features.0", "Conv2d", "fused", "1", kernel()]
    assert lines[-2] == "3 of 9 layers run fused, in 2 calls"
    assert "not accelerated yet" in lines[-1]
    assert "not accelerated" not in str(explain(accelerate(model), image()))
    assert explanation.fused == 3
    assert dataclasses.asdict(explanation)["rows"][0]["kernel"] == kernel()


def test_it_sees_the_mode_of_the_caller():
    model = stack()
    plain = explain(model, image())
    assert plain.fused == 8
    half = explain(model.half(), image().half())  # gradients of fp16 are PyTorch's
    assert half.fused == 0
    assert "gradients or batch statistics of torch.float16" in half.rows[0].reason
    model.float()
    with torch.no_grad():
        assert explain(model, image()).fused == 8
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {row.kernel for row in explain(model, image()).rows} == {kernel(torch.bfloat16)}


def test_hooks_and_float64_and_backends():
    model = stack()
    model[2].register_forward_hook(lambda *_: None)
    assert "hooks" in rows(model, image())["2"].reason
    assert "torch.float64 is not fused" in rows(stack().double(), image().double())["0"].reason
    assert "'reference' was asked for" in rows(accelerate(stack(), "reference"), image())["0"].reason


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(training):
    model = nn.Sequential(nn.ReLU(inplace=True), *stack(bn=True), nn.Dropout()).train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in model.named_buffers()}
    x, random = image(), torch.get_rng_state()
    with torch.no_grad():
        explain(model, x)
    assert torch.equal(x, image())
    assert torch.equal(random, torch.get_rng_state())
    assert type(model) is nn.Sequential
    assert _STATE not in vars(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert objects == {name: id(value) for name, value in model.named_buffers()}


def test_the_model_is_restored_after_an_error():
    model = stack()
    with pytest.raises(RuntimeError, match="expected input"), torch.no_grad():
        explain(model, torch.zeros(1, 5, 8, 8))
    assert type(model) is nn.Sequential


def test_an_accelerated_model_stays_so_and_keeps_its_packed_weights():
    fused = fused_copy(stack())
    run(fused, image())
    state = vars(fused)[_STATE]
    explain(fused, image())
    assert vars(fused)[_STATE] is state


class Two(nn.Module):
    """A network applied to two images in one forward, with arguments by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 8), nn.ReLU())

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.net(x).sum() - self.net(other).sum()


def test_several_calls_of_one_container_and_several_arguments():
    for example in ((image(), image()), [image(), image()], {"other": image(), "x": image()}):
        assert rows(Two(), example)["net.0"].status == "fused"
    mixed = rows(Two(), (image(), image(3, 8, 8)))["net.0"]
    assert (mixed.status, mixed.kernel, mixed.chain) == ("both", kernel(), 1)
    assert mixed.reason == "the input has 3 dimensions, fused: 4"


def test_shared_layers_have_a_row_for_each_place():
    relu = nn.ReLU()
    found = rows(nn.Sequential(conv(3, 8), relu, nn.Tanh(), relu), image())
    assert [row.status for row in found.values()] == ["fused", "fused", "plain", "plain"]


def test_containers_with_a_forward_of_their_own_and_single_layers():
    model = nn.ModuleDict({"a": stack()})
    model["a"].forward = lambda x: x
    model.forward = lambda x: model["a"](x)
    assert rows(model, image())["a.0"].reason == "the forward of a was replaced on the instance"
    assert "single layer" in rows(conv(3, 8), image())[""].reason


def test_only_modules():
    with pytest.raises(TypeError, match=r"explain takes a torch.nn.Module, not int"):
        explain(3, image())


def test_recordings_nest_and_end():
    fused = fused_copy(stack())
    with record() as outer:
        run(fused, image())
        with record() as inner:
            run(fused, image())
    run(fused, image())
    assert len(outer) == 2
    assert inner == outer[1:]


def test_what_packing_cost():
    model = nn.Module()
    model.features, model.head = stack(), nn.Sequential(nn.Flatten(), nn.Sigmoid())
    model.forward = lambda x: model.head(model.features(x))
    with torch.inference_mode():
        explanation = explain(model, image())
    (packing,) = explanation.packing  # the head has nothing to pack
    assert packing.container == "features"
    assert packing.source_bytes == sum(m.weight.nbytes for m in model.features if isinstance(m, nn.Conv2d))
    assert packing.bytes > 0
    assert 0 < packing.milliseconds < 60_000
    assert re.search(
        r"packed weights of features: \d+\.\d MB, \d+\.\d\d times the originals; the first call took \d+ ms longer",
        str(explanation),
    )


@pytest.mark.parametrize("kernel", selection.cpu_kernels())
def test_packed_weights_are_at_most_twice_the_originals(kernel):
    """VGG16's convolutions, for every kernel of the table; the padding of conv1_1 adds 0.1 % of the whole."""
    widths = [3, *(entry for entry in cfgs["D"] if isinstance(entry, int))]
    layers = list(itertools.pairwise(widths))
    packed = sum(4 * torch.ops.vgg_fast.cpu_packed_words(cout, cin, kernel) for cin, cout in layers)
    weights = sum(9 * cin * cout for cin, cout in layers)
    assert packed <= 2 * weights * (2 if kernel in ("amx_bf16", "avx512_bf16") else 4)
    if kernel != "amx_bf16x6":  # which nobody gets for tensors of 16 bits without asking
        assert packed <= 2 * weights * 2 * 1.001


def test_the_times_that_a_kernel_was_chosen_by_are_shown():
    """As on a GPU: each chain once, by its number in the table, however often its container was called."""
    from vgg_fast.container.sequential import FusedSequential
    from vgg_fast.explain import Explanation, Segment, _timings

    layers = FusedSequential(conv(3, 8), nn.Tanh(), conv(8, 8), nn.Tanh(), conv(8, 8))
    segments = [
        Segment(layers, ("0",), "triton", "", "timed: triton 0.4 ms, PyTorch 0.6 ms"),
        Segment(layers, ("1",), None, "Tanh is not a type that is fused"),
        Segment(layers, ("2",), None, "timed: PyTorch 0.2 ms, triton 0.3 ms"),
        Segment(layers, ("4",), "cuda", "", "runs 'cuda' in place of 'cuda_wgmma', which failed its self test"),
    ]
    timings = tuple(_timings(segments * 2))
    assert timings == (
        "chain 1 timed: triton 0.4 ms, PyTorch 0.6 ms",
        "chain 2 runs 'cuda' in place of 'cuda_wgmma', which failed its self test",
    )
    assert all(line in str(Explanation((), True, (), timings)).splitlines() for line in timings)
