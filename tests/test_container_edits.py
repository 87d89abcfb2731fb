"""Layers, attributes, hooks and functions that are changed after construction, and gradients: seen at the next call."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import stacks
import torch
import torch.nn.functional as F
from stacks import check_equal, check_plain, conv, fused_copy, fused_names, image, kernel, norm, run, stack
from torch import nn

from vgg_fast.accelerate import accelerate


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_edits_take_effect_at_the_next_call():
    plain, x = stack(), image(1, 3, 9, 11)
    fused = fused_copy(plain)
    both = (plain, fused)

    def check(names: str) -> None:
        assert fused_names(check_equal(plain, fused, x)) == names.split()

    check("0 1 2 3 4 5 6 7")
    for model in both:
        model[4].ceil_mode = True  # SSD300
    check("0 1 2 3 5 6 7")
    for model in both:
        model[4] = nn.AvgPool2d(2)  # style transfer
    check("0 1 2 3 5 6 7")
    for model in both:
        model[4] = nn.MaxPool2d(2)
    check("0 1 2 3 4 5 6 7")
    for model in both:
        model[2].stride = (2, 2)
    check("0 1 5 6 7")
    for model in both:
        model[2].stride = (1, 1)
        del model[7]
    check("0 1 2 3 4 5 6")
    for model in both:
        model.append(norm(16))
        model.insert(0, nn.Identity())
    check("1 2 3 4 5 6 7")
    for model in both:
        model[1].bias = None
    check("")  # noticed while it runs: plain this once
    check("1 2 3 4 5 6 7")
    for model in both:
        model[1].bias = nn.Parameter(torch.ones(8))
    check("")
    check("1 2 3 4 5 6 7")
    for model in both:
        model[1].__class__ = OwnConv
    check("3 4 5 6 7")


def test_batch_norm_switched_between_training_and_evaluation():
    plain = nn.Sequential(conv(3, 8), norm(8), nn.ReLU())
    fused, x = fused_copy(plain), image()
    for training, names in ((False, "012"), (True, "012"), (False, "012")):
        plain.train(training)
        fused.train(training)
        expected, _ = run(plain, x)
        actual, segments = run(fused, x)
        assert fused_names(segments) == list(names)
        # After the training step the statistics are no powers of two any more.
        torch.testing.assert_close(actual, expected)


def test_batch_norm_attributes_changed():
    plain, x = stack(bn=True), image()
    fused = fused_copy(plain)
    for model in (plain, fused):
        model(x)
    for eps in (12.0 + stacks.EPS, stacks.EPS):  # sqrt(4 + 12) = 4: still exact
        plain[1].eps = fused[1].eps = eps
        check_equal(plain, fused, x, kernel())


def test_a_hook_that_edits_the_container_while_it_runs():
    def edit(module, args):
        container = owner[0]
        container[3] = nn.Tanh()

    for model in (plain := nn.Sequential(nn.Identity(), conv(3, 8), nn.ReLU(), nn.Sigmoid()), fused_copy(plain)):
        owner = [model]
        model[0].register_forward_pre_hook(edit)
        actual, _ = run(model, image())
        assert torch.equal(actual, torch.tanh(run(nn.Sequential(*model[1:3]), image())[0]))


def test_a_hook_that_changes_a_later_layer_while_it_runs():
    plain = nn.Sequential(nn.Identity(), conv(3, 8), nn.ReLU(), conv(8, 8), nn.MaxPool2d(2))
    fused, x = fused_copy(plain), image(1, 3, 9, 9)
    run(fused, x)
    for model in (plain, fused):
        pool = model[4]
        model[0].register_forward_hook(lambda *_, pool=pool: setattr(pool, "ceil_mode", not pool.ceil_mode))
    for _ in range(3):
        check_equal(plain, fused, x)
        assert plain[4].ceil_mode == fused[4].ceil_mode


def test_removing_children_while_it_runs_is_the_same_error():
    errors = []
    for accelerated in (False, True):
        model = nn.Sequential(nn.Identity(), conv(3, 8), nn.ReLU())
        model[0].register_forward_hook(lambda *_, model=model: model._modules.pop("2") and None)
        errors.append(stacks.error_of(accelerate(model) if accelerated else model, image()))
    assert errors[0] == errors[1]


# --- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(11))
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "forward_kwargs", "forward_pre_kwargs"])
def test_hooks_on_an_inner_layer_see_what_they_saw(index, kind):
    seen: list[list[torch.Tensor]] = []
    for model in (plain := stack(bn=True, inplace=False), fused := fused_copy(plain)):
        calls: list[torch.Tensor] = []
        seen.append(calls)
        if kind == "forward":
            model[index].register_forward_hook(lambda m, i, o, calls=calls: calls.extend([*i, o]))
        elif kind == "forward_kwargs":
            model[index].register_forward_hook(lambda m, i, k, o, calls=calls: calls.extend([*i, o]), with_kwargs=True)
        elif kind == "forward_pre":
            model[index].register_forward_pre_hook(lambda m, i, calls=calls: calls.extend(i))
        else:
            model[index].register_forward_pre_hook(lambda m, i, k, calls=calls: calls.extend(i), with_kwargs=True)
    segments = check_equal(plain, fused, image())
    assert len(seen[0]) == len(seen[1]) == (2 if kind.startswith("forward") and "pre" not in kind else 1)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert str(index) not in fused_names(segments)
    assert fused_names(segments) != []


def test_a_hook_that_replaces_the_output():
    plain, x = stack(), image()
    fused = fused_copy(plain)
    handles = [m[2].register_forward_hook(lambda m, i, o: o * 2) for m in (plain, fused)]
    assert "2" not in fused_names(check_equal(plain, fused, x))
    for handle in handles:
        handle.remove()
    assert "2" in fused_names(check_equal(plain, fused, x, kernel()))


def test_hook_dictionaries_that_are_replaced():
    # Some tools clear hooks by assigning a new dictionary.
    fused, x = fused_copy(stack()), image()
    run(fused, x)
    fused[2]._forward_hooks = OrderedDict()
    run(fused, x)
    calls = []
    fused[2].register_forward_hook(lambda *_: calls.append(1))
    run(fused, x)
    assert calls == [1]


def test_hooks_on_the_container_itself():
    plain = stack()
    fused = fused_copy(plain)
    for model in (plain, fused):
        model.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        model.register_forward_hook(lambda m, args, out: out * 2)
    check_equal(plain, fused, image(), kernel())


def test_global_hooks_see_every_layer():
    fused, calls = fused_copy(stack()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: calls.append(m))
    try:
        check_plain(stack(), fused, image(), "global module hooks")
    finally:
        handle.remove()
    assert [m for m in calls if m in list(fused)] == list(fused)
    check_equal(stack(), fused, image(), kernel())


def test_backward_hooks_with_gradients():
    grads: list[list[torch.Tensor]] = []
    for model in (plain := stack(bn=True, inplace=False), fused_copy(plain)):
        seen: list[torch.Tensor] = []
        grads.append(seen)
        model[3].register_full_backward_hook(lambda m, i, o, seen=seen: seen.extend([*i, *o]))
        x = image().requires_grad_()
        model(x).sum().backward()
        grads[-1] += [x.grad, *(p.grad for p in model.parameters())]
    assert len(grads[0]) == 2 + 1 + 12
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_functions_replaced_for_all_modules_are_called(monkeypatch):
    calls = []
    original = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(1) or original(*args))
    check_plain(stack(), fused_copy(stack()), image(), "monkeypatched")
    assert len(calls) == 6


# --- weights and gradients ------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_children():
    plain = stack(bn=True)
    fused = fused_copy(plain)
    for model in (plain, fused):
        x = image().requires_grad_()
        out = model(x)
        assert out.grad_fn is not None
        out.square().mean().backward()
        model.seen = x.grad
    # Values and weights are exact, the gradients of batch norm's scale are not; tests/test_training.py has the bounds.
    torch.testing.assert_close(plain.seen, fused.seen, rtol=1e-4, atol=1e-4 * float(plain.seen.abs().max()))
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(a.grad.abs().max()))


def test_frozen_weights_fuse_with_and_without_a_gradient_of_the_input():
    plain = stack().requires_grad_(False)
    fused, x = fused_copy(plain), image()
    with stacks.record() as segments:
        fused(x)
    assert [s.kernel for s in segments] == [kernel()]
    with stacks.record() as segments:
        out = fused(x.requires_grad_())
    assert [s.kernel for s in segments] == [kernel()]
    assert out.requires_grad


def test_a_frozen_body_fuses_below_a_trainable_head():
    model = accelerate(nn.Sequential(*stack().requires_grad_(False), nn.Flatten(), nn.Linear(96, 4)))
    with stacks.record() as segments:
        model(image()).sum().backward()
    assert fused_names(segments) == list("01234567")
    assert model[-1].weight.grad is not None


def test_a_parameter_as_input():
    x = nn.Parameter(image())  # style transfer optimises the image
    check_equal(stack(), fused_copy(stack()), x, kernel())
