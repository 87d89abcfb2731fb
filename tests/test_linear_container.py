"""Fully connected layers of a container: the same answers, never stale, plain wherever anything is unusual."""

from __future__ import annotations

import pytest
import torch
from stacks import CPU, check_equal, check_plain, conv, error_of, fused_copy, fused_names, run
from torch import Tensor, nn

from vgg_fast import selection, testing
from vgg_fast.accelerate import accelerate
from vgg_fast.container import linear_chains
from vgg_fast.container.sequential import _STATE
from vgg_fast.explain import explain

WIDE = 2048  # x 1024 weights: just large enough to be worth it


def dense(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    """Weights of 0 and +-1, few of them not 0: sums stay exact through two layers."""
    module = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        module.weight.copy_(testing.integer_tensor(outputs, inputs, limit=8, seed=seed).div_(8, rounding_mode="trunc"))
        if bias:
            module.bias.copy_(testing.integer_tensor(outputs, limit=4, seed=seed + 1))
    return module


def head() -> nn.Sequential:
    """A classifier as VGG has it, in evaluation mode."""
    return nn.Sequential(
        dense(WIDE, 1024), nn.ReLU(True), nn.Dropout(), dense(1024, 64, 2), nn.ReLU(), nn.Dropout(), dense(64, 10, 4)
    ).eval()


def features(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.integer_tensor(*(size or (2, WIDE)), limit=2, seed=9, dtype=dtype)


@pytest.fixture
def _high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_threshold_is_what_these_tests_stand_on():
    assert linear_chains.SMALL <= WIDE * 1024 < 2 * linear_chains.SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, WIDE), (5, WIDE), (WIDE,), (2, 3, WIDE)], ids=str)
def test_same_bits_as_the_children(dtype, size):
    plain = head().to(dtype)
    kernel = selection.choose_linear(dtype, CPU)
    assert kernel != selection.REFERENCE
    segments = check_equal(plain, fused_copy(plain), features(*size, dtype=dtype), kernel)
    assert [s.names for s in segments] == [tuple(map(str, range(7)))]


@pytest.mark.usefixtures("_high")
def test_lowered_precision_takes_fewer_bits():
    plain, fused = head(), fused_copy(head())
    kernel = selection.choose_linear(torch.float32, CPU)
    check_equal(plain, fused, features(), kernel)
    if kernel == "avx512_f24":
        (packed,) = fused.__dict__[_STATE].packs
        assert packed.bytes == 3 * sum(m.weight.numel() for m in plain if isinstance(m, nn.Linear))


def test_weights_are_not_packed_where_pytorchs_own_will_do():
    fused = fused_copy(head())
    run(fused, features())
    assert len(fused.__dict__[_STATE].packs) == 0


def test_every_kernel_by_name():
    ran = []
    for name in selection.linear_kernels():
        fused = accelerate(head(), name)
        try:
            segments = check_equal(head(), fused, features(), name) if name != "amx_bf16" else run(fused, features())[1]
        except RuntimeError as error:
            assert "needs the CPU flags" in str(error)  # noqa: PT017  (the other kernels are to be tried as well)
            continue
        assert {s.kernel for s in segments} == {name}
        ran.append(name)
    assert "portable_f32" in ran


def test_features_and_classifier_in_one_container():
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), dense(2048, 1024), nn.ReLU()).eval()
    segments = check_equal(plain, fused_copy(plain), testing.integer_tensor(2, 3, 32, 32, limit=1))
    assert [s.names for s in segments] == [("0", "1", "2"), ("3",), ("4", "5")]
    assert [s.kernel is None for s in segments] == [False, True, False]


def test_autocast():
    plain, fused = head(), fused_copy(head())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        segments = check_equal(plain, fused, features(), selection.choose_linear(torch.bfloat16, CPU))
        assert len(segments) == 1
        assert run(fused, features())[0].dtype is torch.bfloat16


# --- never stale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("trained", ["a row", "a column", "everything", "a bias"])
def test_training_is_noticed(precision, trained):
    model = fused_copy(head())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)  # bumps no version
    torch.set_float32_matmul_precision(precision)
    try:
        before, _ = run(model, features())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        grad = model[3].bias.grad if trained == "a bias" else model[3].weight.grad
        ({"a row": grad[37], "a column": grad[:, 901]}.get(trained, grad) if grad.dim() == 2 else grad).fill_(-64.0)
        optimizer.step()
        after, segments = run(model, features())
        assert fused_names(segments) == [str(i) for i in range(7)]
        assert torch.equal(after, run(nn.Sequential(*model), features())[0])
        assert not torch.equal(after, before)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_high")
def test_replaced_and_moved_weights():
    model = fused_copy(head())
    run(model, features())
    model[6] = dense(64, 10, seed=77)
    check_equal(nn.Sequential(*model), model, features())
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    check_equal(nn.Sequential(*model), model, features())
    model[3].bias = None
    check_equal(nn.Sequential(*model), model, features())
    model.bfloat16()
    check_equal(nn.Sequential(*model), model, features(dtype=torch.bfloat16))


# --- plain wherever anything is unusual -----------------------------------------------------------------------------


def with_hook() -> nn.Sequential:
    model = head()
    for i in (0, 3, 6):
        model[i].register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize(
    ("plain", "x", "reason"),
    [
        (head(), features().t().contiguous().t(), "not contiguous"),
        (head().double(), features(dtype=torch.float64), "float64 is not fused"),
        (head(), features(0, WIDE), "is empty"),
        (with_hook(), features(), "it has hooks"),
        (nn.Sequential(dense(64, 10)), features(3, 64), "640 weights are too few"),
    ],
    ids=["strides", "float64", "empty", "hooks", "small"],
)
def test_runs_plain_and_says_why(plain, x, reason):
    check_plain(plain, fused_copy(plain), x, reason)


def test_dropout_in_training_mode_draws_as_ever():
    plain, fused = head().train(), fused_copy(head().train())
    outputs = []
    for model in (plain, fused):
        torch.manual_seed(3)
        outputs.append(run(model, features())[0])
    assert torch.equal(*outputs)
    assert fused_names(run(fused, features())[1]) == ["0", "1"]  # the others are too small by themselves


def test_gradients_run_plain():
    grads = []
    for model in (head(), fused_copy(head())):
        grads.append(torch.autograd.grad(model(features()).square().mean(), list(model.parameters())))
    for theirs, ours in zip(*grads, strict=True):
        assert torch.equal(theirs, ours)
    assert grads[0][0].abs().sum() > 0


def test_an_in_place_relu_first_writes_into_the_callers_tensor():
    plain = nn.Sequential(nn.ReLU(True), dense(WIDE, 1024), nn.ReLU(True))
    x, y = features(), features()
    expected, _ = run(plain, x)
    actual, segments = run(fused_copy(plain), y)
    assert torch.equal(actual, expected)
    assert torch.equal(x, y)
    assert not torch.equal(y, features())
    assert fused_names(segments) == ["1", "2"]


def test_errors_are_those_of_the_children():
    for x in (features(2, 30), features(dtype=torch.bfloat16), torch.ones(())):
        assert error_of(fused_copy(head()), x) == error_of(head(), x)


def test_a_replaced_functional_is_respected(monkeypatch):
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: calls.append(1) or linear(*a))
    check_plain(head(), fused_copy(head()), features(), "was replaced (monkeypatched)")
    assert len(calls) == 6


def test_explain_shows_them():
    with torch.inference_mode():
        rows = explain(head(), features()).rows
    assert {(row.status, row.kernel) for row in rows} == {("fused", selection.choose_linear(torch.float32, CPU))}
