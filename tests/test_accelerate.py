"""accelerate, restore and refresh on models built as their users build them."""

from __future__ import annotations

import copy

import pytest
import stacks
import torch
from stacks import check_equal, conv, error_of, fused_copy, fused_names, image, kernel, norm, run, stack
from torch import nn

from vgg_fast.accelerate import accelerate, refresh, restore
from vgg_fast.container.sequential import FusedSequential


class Net(nn.Module):
    """A VGG as torchvision writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = stack(bn=True)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(64, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 4))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Block(nn.Sequential):
    """A subclass with a meaning of its own, such as torchvision's Conv2dNormActivation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


# --- what changes and what does not ---------------------------------------------------------------------------------


def test_in_place_with_all_names_and_objects():
    model = Net()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert accelerate(model) is model
    assert type(model) is Net
    assert type(model.features) is type(model.classifier) is FusedSequential
    assert isinstance(model.features, nn.Sequential)
    for name, module in model.named_modules():
        assert module is modules[name]
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()._metadata == Net().state_dict()._metadata
    model.load_state_dict(state, strict=True)
    Net().load_state_dict(model.state_dict(), strict=True)
    assert all(type(m) in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d) for m in model.features)


def test_same_answers():
    model = Net()
    fused = fused_copy(model)
    expected, _ = run(model, image())
    actual, segments = run(fused, image())
    assert torch.equal(actual, expected)
    assert fused_names(segments) == [str(i) for i in range(11)]
    assert {s.kernel for s in segments if s.kernel} == {kernel()}


def test_restore_gives_back_the_exact_original():
    model, reference = Net(), Net()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    accelerate(model, "portable_f32")
    run(model, image())
    assert restore(model) is model
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert repr(model) == repr(reference)
    _, segments = run(model, image())
    assert segments == []
    restore(model)  # again, and on what was never accelerated


def test_twice_is_once_and_the_last_backend_counts():
    model = accelerate(accelerate(stack()))
    check_equal(stack(), model, image(), kernel())
    check_equal(stack(), accelerate(model, "portable_f32"), image(), "portable_f32")
    check_equal(stack(), accelerate(model), image(), kernel())


def test_named_backends_travel_with_copies():
    model = accelerate(stack(), "portable_f32")
    check_equal(stack(), copy.deepcopy(model), image(), "portable_f32")


def test_subclasses_of_sequential_are_left_alone():
    model = nn.ModuleDict({"own": Block(conv(3, 8), nn.ReLU()), "inner": Block(nn.Sequential(conv(3, 8)))})
    accelerate(model)
    assert type(model["own"]) is type(model["inner"]) is Block
    assert type(model["inner"][0]) is FusedSequential
    check_equal(Block(conv(3, 8), nn.ReLU()), model["own"], image())
    restore(model)
    assert type(model["own"]) is Block
    assert type(model["inner"][0]) is nn.Sequential


def test_a_subclass_of_the_fused_container_is_left_alone_by_restore():
    class Own(FusedSequential):
        pass

    model = Own(conv(3, 8))
    check_equal(nn.Sequential(conv(3, 8)), model, image(), kernel())
    assert type(restore(model)) is Own


def test_a_container_whose_forward_was_replaced_keeps_it():
    model = stack()
    model.forward = lambda x: x + 1
    accelerate(model)
    assert torch.equal(model(image()), image() + 1)


def test_shared_containers_and_lists():
    shared = stack()
    model = nn.ModuleList([shared, nn.ModuleList([shared, stack(bn=True)])])
    accelerate(model)
    assert {type(m) for m in (model[0], model[1][0], model[1][1])} == {FusedSequential}


def test_a_model_without_a_container_is_returned_as_it_is():
    model = conv(3, 8)
    assert accelerate(model) is model
    assert type(model) is nn.Conv2d


def test_optimizers_and_hooks_made_before_stay_valid():
    model, calls = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-10)
    model.features[2].register_forward_hook(lambda *_: calls.append(1))
    accelerate(model)
    model(image()).sum().backward()
    optimizer.step()
    run(model, image())
    assert calls == [1, 1]


# --- refusals -------------------------------------------------------------------------------------------------------


class KerasLike(nn.Module):
    """A Keras layer with the torch backend: a Module whose weights are variables of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 3, 3, 8))


def test_a_model_without_convolutions_is_a_warning():
    with pytest.warns(UserWarning, match=r"contains no torch.nn.Conv2d, so there is nothing to fuse.*vgg-fast convert"):
        accelerate(KerasLike())


@pytest.mark.parametrize("function", [accelerate, restore, refresh])
def test_only_modules(function):
    with pytest.raises(TypeError, match=f"{function.__name__} takes a torch.nn.Module, not str"):
        function("model")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_not_after_torchscript():
    with pytest.raises(TypeError, match=r"before torch.jit.script or torch.jit.trace"):
        accelerate(torch.jit.script(stack()))


def test_an_unknown_backend_names_the_known_ones():
    model = stack()
    with pytest.raises(
        ValueError, match=r"no backend 'fast'; choose one of auto, cpu, triton, cuda, reference.*portable"
    ):
        accelerate(model, "fast")
    assert type(model) is nn.Sequential


def test_a_backend_that_cannot_run_here_raises_when_it_should_run():
    fused = accelerate(stack(), "triton")
    kind, message = error_of(fused, image())
    assert kind is RuntimeError
    assert "it runs on cuda, not cpu" in message


def test_the_reference_backend_is_the_children():
    stacks.check_plain(stack(), accelerate(stack(), "reference"), image(), "'reference' was asked for")


# --- as in USERS.md -------------------------------------------------------------------------------------------------


def test_perceptual_loss_slices():
    # LPIPS: Sequentials filled from ranges of the features, frozen, taps of all of them, gradient to the input.
    features = stack()
    slices = nn.ModuleList(nn.Sequential() for _ in range(3))
    for part, (start, stop) in zip(slices, ((0, 2), (2, 4), (4, 8)), strict=True):
        for i in range(start, stop):
            part.add_module(str(i), features[i])
    slices.requires_grad_(False)
    reference = copy.deepcopy(slices)
    accelerate(slices)
    with stacks.record() as segments:
        x = y = image()
        for ours, theirs in zip(slices, reference, strict=True):
            x, y = ours(x), theirs(y)
            assert torch.equal(x, y)
    assert fused_names(segments) == ["0", "1", "2", "3", "5", "6", "7"]  # the third slice begins with a pool
    grads = []
    for model in (slices, reference):
        x = image().requires_grad_()
        loss, y = torch.zeros(()), x
        for part in model:
            y = part(y)
            loss = loss + y.square().mean()
        grads.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))


def test_single_shot_detector():
    model = Net()
    fused = fused_copy(model)
    run(fused, image(1, 3, 9, 9))
    for m in (model, fused):
        for module in m.features.modules():
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = True
    x = image(1, 3, 9, 9) + 250
    expected, _ = run(model.features, x)
    actual, segments = run(fused.features, x)
    assert actual.shape == expected.shape == (1, 16, 3, 3)
    assert torch.equal(actual, expected)
    assert "6" not in fused_names(segments)


class UNet(nn.Module):
    """Convolutions registered anew in other containers, sharing one ReLU, with a tap before each pool."""

    def __init__(self, vgg: nn.Sequential) -> None:
        super().__init__()
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.first = nn.Sequential(vgg[0], self.relu, vgg[2], self.relu)
        self.second = nn.Sequential(vgg[5], self.relu)
        self.up = nn.Sequential(conv(24, 8), norm(8), self.relu).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = self.first(x)
        bottom = self.second(self.pool(top))
        return self.up(torch.cat([top, bottom.repeat_interleave(2, 2).repeat_interleave(2, 3)], 1))


def test_encoder_and_decoder():
    model = UNet(stack())
    segments = check_equal(model, fused_copy(model, stacks.direct_kernel()), image(), stacks.direct_kernel())
    assert [len(s.names) for s in segments] == [4, 2, 3]


def test_style_transfer():
    model = Net().requires_grad_(False)
    fused = fused_copy(model)
    for m in (model, fused):
        for i, layer in enumerate(m.features):
            if isinstance(layer, nn.MaxPool2d):
                m.features[i] = nn.AvgPool2d(2)
    grads = []
    for m in (model, fused):
        pixels = nn.Parameter(image())
        taps = m.features[:3](pixels).flatten(2)
        (taps @ taps.mT).square().mean().backward()
        grads.append(pixels.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[0].abs().max()))
    segments = check_equal(model.features, fused.features, image(), kernel())
    assert [s.names for s in segments if s.kernel is None] == [("6",), ("10",)]


def test_transfer_learning():
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    accelerate(model)
    for m in (model, reference):
        torch.manual_seed(1)
        m.features.requires_grad_(False)
        m.classifier[3] = nn.Linear(8, 3)
        m.classifier[2] = nn.Identity()
        optimizer = torch.optim.AdamW(m.classifier.parameters(), lr=0.01, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            m(image()).square().mean().backward()
            optimizer.step()
    assert torch.equal(run(model, image())[0], run(reference, image())[0])


def test_conversion_to_synchronised_batch_norm_runs_plain():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(accelerate(stack(bn=True)))
    assert type(model) is FusedSequential
    assert fused_names(run(model, image())[1]) == ["0", "3", "7"]
    assert torch.equal(run(model, image())[0], run(stack(bn=True), image())[0])


def test_grad_cam():
    maps = []
    for model in (Net(), fused_copy(Net())):
        kept = {}
        target = model.features[7]
        target.register_forward_hook(lambda m, i, o, kept=kept: kept.update(activation=o))
        target.register_full_backward_hook(lambda m, i, o, kept=kept: kept.update(gradient=o[0]))
        torch.manual_seed(2)
        for layer in model.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
        model(image())[:, 1].sum().backward()
        maps.append((kept["activation"] * kept["gradient"]).sum(1))
    assert torch.equal(*maps)
