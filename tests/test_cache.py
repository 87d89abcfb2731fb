"""Packed weights are never stale: every way of training, loading, moving, averaging or editing weights is noticed."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import stacks
import torch
from stacks import check_equal, conv, error_of, fused_copy, fused_names, image, kernel, norm, run, stack
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from vgg_fast.accelerate import accelerate, refresh
from vgg_fast.container.packs import PackCache
from vgg_fast.container.sequential import _STATE, FusedSequential


def follows(fused: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    """The fused output, after checking that it comes from the weights as they are now."""
    x = image() if x is None else x
    expected, _ = run(nn.Sequential(*fused), x)
    actual, segments = run(fused, x)
    assert fused_names(segments) != []
    # The weights may have become fractions: then the sums round, a few ulp of the largest term.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    return actual


def packed(fused: nn.Module) -> PackCache:
    return fused.__dict__[_STATE].packs


@pytest.fixture
def fused() -> nn.Module:
    """An accelerated stack with batch norm that has packed its weights, its gradients filled in."""
    model = fused_copy(stack(bn=True))
    model(image()).square().mean().backward()
    follows(model)
    return model


# --- training -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps(fused, name):
    optimizer = OPTIMIZERS[name](fused.parameters())
    before = follows(fused)
    for _ in range(2):
        optimizer.step()
        after = follows(fused)
        assert not torch.equal(before, after)
        before = after


def test_fused_optimizers_do_not_bump_versions_which_is_why_there_is_a_fingerprint(fused):
    versions = [p._version for p in fused.parameters()]
    torch.optim.SGD(fused.parameters(), lr=0.1, fused=True).step()
    assert versions == [p._version for p in fused.parameters()]


@pytest.mark.parametrize("trained", ["one filter", "one input channel"])
def test_training_a_part_of_a_large_weight(trained):
    # Gradients are masked, or most channels are dead: few elements change, and a fused optimizer bumps no version.
    model = accelerate(nn.Sequential(nn.Conv2d(32, 256, 3, padding=1)))
    x = torch.ones(1, 32, 3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    for i in (0, 1, 13, 31):
        before = follows(model, x)
        optimizer.zero_grad()
        model[0].weight.grad = torch.zeros(256, 32, 3, 3)
        (model[0].weight.grad[i] if trained == "one filter" else model[0].weight.grad[:, i]).fill_(1.0)
        optimizer.step()
        assert not torch.equal(before, follows(model, x))


def test_batch_norm_statistics(fused):
    before = follows(fused)
    fused.train()
    fused(image())
    fused.eval()
    assert not torch.equal(follows(fused), before)
    fused[1].reset_running_stats()
    follows(fused)


def test_a_short_training_run(fused):
    optimizer = torch.optim.AdamW(fused.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        fused.train()
        optimizer.zero_grad()
        fused(image()).square().mean().backward()
        optimizer.step()
        follows(fused.eval())


# --- edits ----------------------------------------------------------------------------------------------------------

EDITS = {
    "data.add_": lambda p: p.data.add_(1.0),
    "data.mul_": lambda p: p.data.mul_(2.0),
    "data.copy_": lambda p: p.data.copy_(torch.ones_like(p)),
    "data.lerp_": lambda p: p.data.lerp_(torch.zeros_like(p), 0.5),
    "data =": lambda p: setattr(p, "data", p.data * 2),
    "numpy view": lambda p: p.detach().numpy().__imul__(2),
    "no_grad in place": lambda p: p.mul_(2.0),
    "one element": lambda p: p.view(-1)[-1].fill_(77.0),
    "detach().zero_()": lambda p: p.detach().zero_(),
    "inference mode": lambda p: torch.inference_mode()(p.mul_)(2.0),
    "set_": lambda p: p.set_(torch.randint(1, 9, p.shape).float()),
    "untyped storage": lambda p: p.untyped_storage().copy_(torch.full_like(p, 3.0).untyped_storage()),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "swap_tensors": lambda p: torch.utils.swap_tensors(p, nn.Parameter(p.detach() + 1)),
    "init": lambda p: nn.init.constant_(p, 0.5),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "7.weight", "8.weight", "8.bias"])
def test_edits_of_a_parameter(fused, edit, name):
    torch.manual_seed(5)
    before = follows(fused)
    with torch.no_grad():
        EDITS[edit](fused.get_parameter(name))
    after = follows(fused)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("edit", [e for e in EDITS if e != "swap_tensors"])
@pytest.mark.parametrize("name", ["1.running_mean", "8.running_var"])
def test_edits_of_a_buffer(fused, edit, name):
    torch.manual_seed(5)
    before = follows(fused)
    with torch.no_grad():
        EDITS[edit](fused.get_buffer(name))
    assert not torch.equal(before, follows(fused))


def test_replaced_parameters_and_layers(fused):
    fused[0].weight = nn.Parameter(fused[0].weight.detach().flip(0))
    follows(fused)
    fused[3] = conv(8, 8, seed=77)
    follows(fused)
    fused[1].running_mean = torch.ones(8)
    follows(fused)
    fused[3].bias = None
    run(fused, image())  # plain this once
    follows(fused)


def test_the_same_memory_seen_in_another_way():
    # Same pointer, same version, same values in memory; another tensor all the same.
    model = accelerate(nn.Sequential(conv(8, 8), conv(8, 8)))
    follows(model, image(2, 8, 6, 6))
    for view in (lambda w: w.transpose(0, 1), lambda w: w.transpose(2, 3), lambda w: w.flip(2)):
        weight = model[1].weight
        weight.data = view(weight.data)
        follows(model, image(2, 8, 6, 6))
    model = accelerate(nn.Sequential(conv(4, 8)))
    follows(model, image(2, 4, 6, 6))
    model[0].weight.data = model[0].weight.data.view(4, 8, 3, 3)
    model[0].bias.data = model[0].bias.data[:4]
    follows(model, image(2, 8, 6, 6))


# --- loading, moving, averaging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(fused, assign):
    state = {name: value * 2 for name, value in fused.state_dict().items()}
    before = follows(fused)
    fused.load_state_dict(state, assign=assign)
    assert not torch.equal(before, follows(fused))


def test_load_state_dict_with_swapping(fused):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        before = follows(fused)
        fused.load_state_dict({name: value * 2 for name, value in fused.state_dict().items()})
        assert not torch.equal(before, follows(fused))
        fused.bfloat16().float()
        follows(fused)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_moved_and_cast(fused):
    before = follows(fused)
    fused.double().float()
    assert torch.equal(before, follows(fused))
    fused.bfloat16().float()  # loses digits of the variances
    assert not torch.equal(before, follows(fused))
    fused.to(memory_format=torch.channels_last)
    assert follows(fused).is_contiguous(memory_format=torch.channels_last)
    fused.share_memory()
    follows(fused)


def test_casts_change_the_kernel(fused):
    small = fused[:5]
    follows(small)
    out, segments = run(small.bfloat16(), image(dtype=torch.bfloat16))
    assert [s.kernel for s in segments] == [kernel(torch.bfloat16)]
    assert out.dtype is torch.bfloat16
    assert error_of(small, image())[0] is RuntimeError
    out, segments = run(small.double(), image(dtype=torch.float64))
    assert [s.kernel for s in segments] == [None]


def test_averaged_models(fused):
    averaged = torch.optim.swa_utils.AveragedModel(
        fused, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1, fused=True)
    outputs = []
    for _ in range(3):
        optimizer.step()
        averaged.update_parameters(fused)
        assert type(averaged.module) is FusedSequential
        outputs.append(follows(averaged.module))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_moving_average_by_hand(fused):
    average = copy.deepcopy(fused)
    before = follows(average)
    torch.optim.Adam(fused.parameters(), lr=0.5).step()
    with torch.no_grad():
        for ours, theirs in zip(average.parameters(), fused.parameters(), strict=True):
            ours.data.lerp_(theirs.data, 0.25)
    assert not torch.equal(before, follows(average))


def test_vector_to_parameters_and_prune(fused):
    vector = parameters_to_vector(fused.parameters())
    vector_to_parameters(vector * 2, fused.parameters())
    follows(fused)
    prune.l1_unstructured(fused[0], "weight", amount=0.5)
    check_equal(nn.Sequential(*fused), fused, image())
    assert "0" not in fused_names(run(fused, image())[1])  # until it is made permanent, pruning works through a hook
    prune.remove(fused[0], "weight")
    assert "0" in fused_names(run(fused, image())[1])
    follows(fused)


def test_weights_shared_between_models(fused):
    twin = fused_copy(fused)
    for ours, theirs in zip(fused.modules(), twin.modules(), strict=True):
        for name, parameter in ours._parameters.items():
            theirs._parameters[name] = parameter
    follows(twin)
    torch.optim.SGD(fused.parameters(), lr=0.1, fused=True).step()
    assert torch.equal(follows(fused), follows(twin))


# --- refresh, copies and bounds -------------------------------------------------------------------------------------


def test_refresh_after_an_edit_that_the_fingerprint_may_miss():
    model = accelerate(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)))
    x = torch.ones(1, 64, 4, 4)
    before, _ = run(model, x)
    model[0].weight.data[31, 17, 1, 1] += 100.0
    assert refresh(model) is model
    after, segments = run(model, x)
    assert [s.kernel for s in segments] == [kernel()]
    assert float((after - before)[0, 31].min()) > 99.0


def test_copies_do_not_carry_packed_weights(fused):
    def thawed(buffer: io.BytesIO) -> nn.Module:
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    saved = io.BytesIO()
    torch.save(fused, saved)
    plain_size, buffer = 0, io.BytesIO()
    torch.save(nn.Sequential(*fused), buffer)
    plain_size = buffer.tell()
    assert saved.tell() < plain_size + 2000  # the weights once, not twice
    before = follows(fused)
    for twin in (copy.deepcopy(fused), copy.copy(fused), pickle.loads(pickle.dumps(fused)), thawed(saved)):
        assert type(twin) is FusedSequential
        assert _STATE not in twin.__dict__
        assert torch.equal(follows(twin), before)
        assert packed(twin) is not packed(fused)


def test_a_copy_lives_its_own_life(fused):
    twin = copy.deepcopy(fused)
    before = follows(fused)
    twin[0].weight.data.mul_(3.0)
    assert not torch.equal(follows(twin), before)
    assert torch.equal(follows(fused), before)


def test_state_dict_is_untouched(fused):
    assert list(fused.state_dict()) == list(stack(bn=True).state_dict())
    assert fused.state_dict()._metadata == stack(bn=True).state_dict()._metadata
    assert len(list(fused.parameters())) == 12


def test_the_cache_packs_once():
    fused = fused_copy(stack(bn=True))
    follows(fused)
    state = packed(fused)
    weights = next(iter(state)).content.weights
    for size in ((2, 3, 12, 10), (1, 3, 8, 8), (5, 3, 4, 4)):
        run(fused, image(*size))
    assert next(iter(state)).content.weights is weights
    assert len(state) == 1


def test_the_cache_is_bounded_when_programs_and_dtypes_alternate(fused):
    for round_ in range(3):
        for i in range(len(fused)):
            handle = fused[i].register_forward_hook(lambda *_: None)
            follows(fused)
            with torch.autocast("cpu", dtype=torch.bfloat16 if round_ % 2 else torch.float16):
                run(fused, image())
            handle.remove()
            follows(fused)
            assert len(packed(fused)) <= 2 * 2 + 2


def test_alternating_between_two_programs_does_not_pack_again(fused):
    def weights() -> set[int]:
        return {id(p.content.weights) for p in packed(fused)}

    def both_ways() -> None:
        handle = fused[3].register_forward_hook(lambda *_: None)
        follows(fused)
        handle.remove()
        follows(fused)

    both_ways()
    before = weights()
    both_ways()
    assert weights() == before


def test_replaced_weights_and_dropped_models_are_freed():
    fused = fused_copy(stack(bn=True))
    follows(fused)
    packs = [weakref.ref(t) for p in packed(fused) for t in p.content.weights]
    assert all(ref() is not None for ref in packs)
    fused[0].weight.data.mul_(2.0)
    follows(fused)
    gc.collect()
    assert all(ref() is None for ref in packs)
    packs = [weakref.ref(t) for p in packed(fused) for t in p.content.weights]
    fused.to(torch.float64)
    gc.collect()
    assert all(ref() is None for ref in packs)


def test_a_normalisation_of_another_layer_does_not_matter():
    model = accelerate(nn.Sequential(conv(3, 8), norm(8), nn.ReLU(), nn.Tanh(), conv(8, 8), norm(8)))
    follows(model)
    kept = [p.content.weights for p in packed(model)]
    model[5].weight.data.mul_(2.0)
    follows(model)
    same = [p for p in packed(model) if any(p.content.weights is weights for weights in kept)]
    assert len(kept) == 2
    assert len(same) == 1


def test_data_parallel_replicas_start_without_packed_weights(fused):
    replica = fused._replicate_for_data_parallel()
    assert _STATE not in replica.__dict__
    assert _STATE in fused.__dict__
    assert stacks.fused_names(run(fused, image())[1]) != []
