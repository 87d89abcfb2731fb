"""The parse of a Sequential's children into chains: what is fused, and the reason for everything that is not."""

from __future__ import annotations

import pytest
from stacks import changed, conv, norm
from torch import nn

from vgg_fast.container.chains import Chain, LinearChain, Plain, child_reason, parse
from vgg_fast.reference import Step

RELU, POOL = Step.RELU, Step.POOL


def off(module: nn.Module) -> nn.Module:
    return module.eval()


def programs(modules: list[nn.Module]) -> list[list[int] | None]:
    return [part.program if isinstance(part, Chain) else None for part in parse(modules)]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([conv(3, 8)], [[0]]),
        ([conv(3, 8), nn.ReLU()], [[RELU]]),
        ([conv(3, 8), nn.MaxPool2d(2)], [[POOL]]),
        ([conv(3, 8), norm(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8)], [[RELU | POOL, 0]]),
        ([conv(3, 8), nn.ReLU(), norm(8)], [[RELU], None]),  # batch norm after the ReLU is no epilogue
        ([conv(3, 8), nn.MaxPool2d(2), nn.ReLU()], [[POOL], None]),
        ([conv(3, 8), nn.ReLU(), nn.ReLU()], [[RELU], None]),
        ([nn.ReLU(), conv(3, 8)], [None, [0]]),
        ([nn.MaxPool2d(2), conv(3, 8), nn.ReLU()], [None, [RELU]]),  # the second slice of LPIPS
        ([conv(3, 8), nn.Dropout(), conv(8, 8)], [[0], None, [0]]),
        ([], []),
    ],
)
def test_parse(modules, expected):
    assert programs(modules) == expected
    covered = [i for p in parse(modules) for i in (range(p.start, p.stop) if isinstance(p, Chain) else [p.index])]
    assert covered == list(range(len(modules)))


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([nn.Linear(3, 8)], [(0, 1, [False])]),
        ([nn.Linear(3, 8), nn.ReLU(), off(nn.Dropout()), nn.Linear(8, 4)], [(0, 4, [True, False])]),
        ([nn.Linear(3, 8), off(nn.Dropout()), nn.ReLU(True)], [(0, 2, [False]), None]),
        ([off(nn.Dropout()), nn.Linear(3, 8)], [None, (1, 2, [False])]),
        ([nn.Linear(3, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)], [(0, 2, [True]), None, (3, 4, [False])]),
        ([nn.ReLU(True), nn.Linear(3, 8)], [None, (1, 2, [False])]),
        ([nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 4)], [(0, 1, [False]), None, (2, 3, [False])]),
        ([nn.Linear(3, 8), norm(8)], [(0, 1, [False]), None]),
    ],
)
def test_parse_of_fully_connected_layers(modules, expected):
    def described(part: object) -> object:
        if not isinstance(part, LinearChain):
            return None
        return part.start, part.stop, [run.relu is not None for run in part.runs]

    assert [described(part) for part in parse(modules)] == expected


def test_convolutions_and_fully_connected_layers_are_chains_of_their_own():
    kinds = [type(part) for part in parse([conv(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), conv(3, 8)])]
    assert kinds == [Chain, LinearChain, Chain]


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def with_instance_method(module: nn.Module, name: str) -> nn.Module:
    method = getattr(module, name)
    setattr(module, name, lambda *args: method(*args))
    return module


def compiled(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


# Each differs from what is fused in one thing.
ODD = [
    (nn.Conv2d(3, 8, 1), "kernel_size=(1, 1)"),
    (nn.Conv2d(3, 8, (3, 1), padding=(1, 0)), "kernel_size=(3, 1)"),
    (nn.Conv2d(3, 8, 3, padding=1, stride=2), "stride=(2, 2)"),
    (nn.Conv2d(3, 8, 3, padding=0), "padding=(0, 0)"),
    (nn.Conv2d(3, 8, 3, padding="valid"), "padding='valid'"),
    (nn.Conv2d(3, 8, 3, padding=2, dilation=2), "padding=(2, 2)"),
    (nn.Conv2d(3, 8, 3, padding="same", dilation=2), "dilation=(2, 2)"),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), "groups=2"),
    (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    (OwnConv(3, 8, 3, padding=1), "OwnConv is not a type that is fused"),
    (nn.Conv1d(3, 8, 3, padding=1), "Conv1d is not a type that is fused"),
    (nn.utils.parametrizations.weight_norm(conv(3, 8)), "ParametrizedConv2d is not a type that is fused"),
    (with_instance_method(conv(3, 8), "forward"), "'forward' was replaced on this instance"),
    (with_instance_method(conv(3, 8), "_conv_forward"), "'_conv_forward' was replaced on this instance"),
    (compiled(conv(3, 8)), "'_compiled_call_impl' was replaced on this instance"),
    (changed(nn.BatchNorm2d(8), running_var=None), "not an ordinary pair of buffers"),
    (nn.SyncBatchNorm(8).eval(), "SyncBatchNorm is not a type that is fused"),
    (nn.MaxPool2d(3), "kernel_size=3"),
    (nn.MaxPool2d(2, stride=1), "stride=1"),
    (nn.MaxPool2d(2, padding=1), "padding=1"),
    (nn.MaxPool2d(2, dilation=2), "dilation=2"),
    (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode=True"),
    (nn.MaxPool2d(2, return_indices=True), "return_indices=True"),
    (changed(nn.MaxPool2d(2), kernel_size=[2, 2]), "kernel_size=[2, 2]"),  # could change without being replaced
    (nn.AvgPool2d(2), "AvgPool2d is not a type that is fused"),
    (nn.LeakyReLU(), "LeakyReLU is not a type that is fused"),
    (nn.Dropout(), "training mode"),
    (off(changed(nn.Dropout(), p=1.5)), "p=1.5"),
    (off(nn.Dropout2d()), "Dropout2d is not a type that is fused"),
    (nn.Bilinear(3, 3, 8), "Bilinear is not a type that is fused"),
    (nn.LazyLinear(8), "LazyLinear is not a type that is fused"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), "ParametrizedLinear is not a type that is fused"),
    (with_instance_method(nn.Linear(3, 8), "forward"), "'forward' was replaced on this instance"),
    (nn.ReLU6(), "ReLU6 is not a type that is fused"),
]


@pytest.mark.parametrize(("module", "reason"), ODD, ids=lambda v: v if isinstance(v, str) else "")
def test_every_other_module_runs_by_itself_and_the_parse_says_why(module, reason):
    assert reason in str(child_reason(module))
    parts = parse([conv(8, 8), module])
    assert isinstance(parts[1], Plain)
    assert reason in parts[1].reason


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(3, 8, (3, 3), stride=(1, 1), padding=(1, 1), bias=False),
        nn.BatchNorm2d(8, momentum=None).eval(),
        nn.BatchNorm2d(8, affine=False).eval(),
        nn.MaxPool2d((2, 2), (2, 2), (0, 0), (1, 1)),
        changed(nn.MaxPool2d(2), stride=None),
        changed(nn.ReLU(), note="an attribute that hides nothing"),
    ],
)
def test_other_spellings_of_the_same_are_fused(module):
    assert child_reason(module) is None
