"""The container under gradients: whose kernels run, how close they are, and all that eager PyTorch does besides."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from stacks import conv, fused_copy, fused_names, image, kernel
from torch import nn

from vgg_fast import testing
from vgg_fast.bench import peers
from vgg_fast.container.sequential import record


def network(bn: bool, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """3 -> 32 -> 64 -> 48 -> 80 channels with two pools, batch norms with the statistics of an image."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    cin = 3
    for cout, pool in ((32, False), (64, True), (48, False), (80, True)):
        layers += [nn.Conv2d(cin, cout, 3, padding=1), *[nn.BatchNorm2d(cout)] * bn, nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] * pool
        cin = cout
    model = nn.Sequential(*layers)
    peers.calibrate(model, testing.random_tensor(4, 3, 36, 28))
    return model.to(dtype)


def gradients(model: nn.Module, x: torch.Tensor):
    """Output, gradients in x and in all that requires them, and what ran."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with record() as segments:
        y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y, torch.autograd.grad(y.square().mean(), wanted), segments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bn", "training", "frozen"), [
    (False, True, True),
    (False, True, False),
    (True, False, True),
    (True, False, False),
    (True, True, True),
    (True, True, False),
])  # fmt: skip
def test_gradients_are_as_close_as_pytorchs(dtype, bn, training, frozen):
    plain = network(bn, dtype).train(training).requires_grad_(not frozen)
    last, fused = copy.deepcopy(plain).to(memory_format=torch.channels_last), fused_copy(plain)
    wide = copy.deepcopy(plain).double()
    x = testing.random_tensor(3, 3, 37, 29, seed=5, dtype=dtype)
    ours, exact = gradients(fused, x), gradients(wide, x.double())
    theirs = gradients(plain, x), gradients(last, x.contiguous(memory_format=torch.channels_last))
    assert [s.kernel for s in ours[2]] == [kernel(dtype)]
    assert ours[0].stride() == theirs[0][0].stride()
    assert ours[1][0].stride() == theirs[0][1][0].stride()
    # Gradients together, as in the contests: those of a bias before batch statistics are rounding errors around zero.
    flat = [torch.cat([g.double().flatten() for g in each[1]]) for each in (ours, *theirs, exact)]
    allowed = 2 * max(testing.relative_error(g, flat[3]) for g in flat[1:3])
    assert testing.relative_error(flat[0], flat[3]) <= allowed
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        coarse = 2e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=coarse, atol=coarse * float(b.abs().max()))


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("track", [False, True])
def test_statistics_are_tracked_as_by_pytorch(momentum, track):
    plain = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, momentum=momentum, track_running_stats=track), nn.ReLU())
    fused = fused_copy(plain)
    for _ in range(3):
        for model in (plain, fused):
            with record() as segments:
                model(image()).sum().backward()
    assert fused_names(segments) == ["0", "1", "2"]
    assert len(list(fused.buffers())) == (3 if track else 0)
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(fused.eval()(image()), plain.eval()(image()))


def test_one_value_per_channel_is_pytorchs_error():
    model = fused_copy(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.ones(1, 3, 1, 1))
    assert int(model[1].num_batches_tracked) == 1  # counted before the check, as in PyTorch


def test_partly_frozen_networks():
    """Transfer learning: the lower half is frozen, and no gradient of it is computed."""
    plain = network(bn=True).eval()
    plain[:7].requires_grad_(False)
    fused = fused_copy(plain)
    x = testing.random_tensor(2, 3, 24, 24)
    for model in (plain, fused):
        with record() as segments:
            model(x).square().mean().backward()
    assert {s.kernel for s in segments} == {kernel()}
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()))


def test_autocast():
    plain = network(bn=True).train()
    fused, x = fused_copy(plain), testing.random_tensor(2, 3, 24, 24)
    exact = gradients(copy.deepcopy(plain).double(), x.double())[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = gradients(fused, x), gradients(plain, x)
    assert [s.kernel for s in ours[2]] == [kernel(torch.bfloat16)]
    assert ours[0].dtype == theirs[0].dtype
    assert [g.dtype for g in ours[1]] == [g.dtype for g in theirs[1]]
    flat = [torch.cat([g.double().flatten() for g in each]) for each in (ours[1], theirs[1], exact)]
    assert testing.relative_error(flat[0], flat[2]) <= 2 * testing.relative_error(flat[1], flat[2])


@pytest.mark.parametrize(("bn", "training", "frozen"), [(False, True, True), (True, False, True), (True, True, False)])
def test_gradients_of_gradients(bn, training, frozen):
    """A gradient penalty: create_graph=True, then the gradient of the gradient's norm."""
    plain = network(bn).train(training).requires_grad_(not frozen)
    fused = fused_copy(plain)
    second = []
    for model in (plain, fused):
        x = testing.random_tensor(2, 3, 20, 20, seed=3).requires_grad_()
        with record() as segments:
            (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        second.append(torch.autograd.grad(gradient.square().sum(), wanted, allow_unused=True))
    assert [s.kernel for s in segments] == [kernel()]
    for a, b in zip(*second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(float(b.abs().max()), 1e-4))


def test_changing_what_was_saved_is_pytorchs_error():
    for change in ("weight", "input", "output"):
        messages = []
        for model in (network(bn=False)[:2], fused_copy(network(bn=False)[:2])):
            x = testing.random_tensor(1, 3, 8, 8).requires_grad_()
            inner = x * 1
            with record() as segments:
                y = model(inner)
            with torch.no_grad():
                {"weight": model[0].weight, "input": inner, "output": y}[change].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
                y.sum().backward()
            messages.append(re.sub(r"which is output 0 of \w+|\[torch.*?\], ", "", str(error.value)))
        assert [s.kernel for s in segments] == [kernel()]
        assert "is at version 1; expected version 0" in messages[1] or messages[0] == messages[1]


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of all tensors kept for the gradient, parameters and memory that several of them share counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), record() as segments:
        y = model(x)
    assert y.requires_grad
    assert not segments or {s.kernel for s in segments} == {kernel()}
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("bn", "training", "frozen"), [(False, True, True), (True, False, True), (True, True, False)])
def test_no_more_is_saved_than_by_pytorch(bn, training, frozen):
    plain = network(bn).train(training).requires_grad_(not frozen)
    x = testing.random_tensor(2, 3, 48, 48).requires_grad_()
    ours, theirs = saved_bytes(fused_copy(plain), x), saved_bytes(plain, x)
    assert 0 < ours <= (theirs / 16 if frozen and not training else theirs)  # bits in place of values


def test_same_bits_for_any_number_of_threads():
    model = fused_copy(network(bn=True).train())
    x, threads, seen = testing.random_tensor(3, 3, 40, 36), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, grads, segments = gradients(model, x)
            assert [s.kernel for s in segments] == [kernel()]
            seen.append((y, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_empty_batches_and_hooks_run_child_by_child():
    plain = network(bn=False)
    fused = fused_copy(plain)
    x = torch.zeros(0, 3, 8, 8)
    _, grads, segments = gradients(fused, x)
    assert fused_names(segments) == []
    assert all(not g.any() for g in grads)
    shapes: list[torch.Size] = []
    fused[4].register_full_backward_hook(lambda module, into, out: shapes.append(out[0].shape))
    _, _, segments = gradients(fused, testing.random_tensor(4, 3, 8, 8))
    assert fused_names(segments) == list("012356789")
    assert shapes == [torch.Size((4, 64, 4, 4))]


def test_weights_changed_between_steps_are_seen():
    """Frozen weights whose transposed pack was kept, then changed behind PyTorch's back."""
    plain = network(bn=False).requires_grad_(False)
    fused, x = fused_copy(plain), testing.random_tensor(1, 3, 12, 12)
    for factor in (1.0, -0.5):
        for model in (plain, fused):
            for module in model:
                if isinstance(module, nn.Conv2d):
                    module.weight.data.mul_(factor)
        ours, theirs = gradients(fused, x), gradients(plain, x)
        assert [s.kernel for s in ours[2]] == [kernel()]
        torch.testing.assert_close(ours[1][0], theirs[1][0], rtol=1e-3, atol=1e-4 * float(theirs[1][0].abs().max()))


def test_a_training_run_reaches_the_same_loss():
    losses = []
    for model in (network(bn=True).train(), fused_copy(network(bn=True).train())):
        x, target = testing.random_tensor(4, 3, 16, 16), testing.random_tensor(4, 80, 4, 4, seed=1)
        for _ in range(5):
            with record() as segments:
                loss = F.mse_loss(model(x), target)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), grads, strict=True):
                    parameter -= 0.1 * gradient
        losses.append(float(loss.detach()))
    assert [s.kernel for s in segments] == [kernel()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_few_pixels_are_left_to_pytorch_unless_a_backend_is_named():
    x = testing.random_tensor(1, 3, 8, 8)
    for backend, fused_all in (("auto", False), ("cpu", True)):
        for frozen in (False, True):
            model = fused_copy(network(bn=False).requires_grad_(not frozen), backend)
            _, _, segments = gradients(model, x)
            # 16 pixels are enough for a frozen chain, but not for gradients of the weights.
            assert bool(fused_names(segments)) == (fused_all or frozen)
            if not (fused_all or frozen):
                assert any("too few pixels" in s.reason for s in segments)
