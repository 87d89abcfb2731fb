"""The models: torchvision's names, keys and numbers; the two seeds; building, training, copying."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vgg_fast
from vgg_fast import models
from vgg_fast.container.chains import Chain, parse
from vgg_fast.container.sequential import FusedSequential, record
from vgg_fast.models import KerasVGG, VggNet, cfgs, make_layers, vggnet
from vgg_fast.models.weights import load_weights, save_weights

# As published with torchvision's weights ("num_params").
PARAMETERS = {
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}

# The indices of the convolutions in torchvision's state_dicts.
CONVOLUTIONS = {
    "vgg11": [0, 3, 6, 8, 11, 13, 16, 18],
    "vgg13": [0, 2, 5, 7, 10, 12, 15, 17, 20, 22],
    "vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "vgg19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
    "vgg11_bn": [0, 4, 8, 11, 15, 18, 22, 25],
    "vgg13_bn": [0, 3, 7, 10, 14, 17, 21, 24, 28, 31],
    "vgg16_bn": [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
    "vgg19_bn": [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49],
}

BLOCKS = [
    f"block{block}_{layer}"
    for block, convs in enumerate((2, 2, 3, 3, 3), 1)
    for layer in [*(f"conv{i}" for i in range(1, convs + 1)), "pool"]
]


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(models, name)(**kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_family_has_torchvisions_keys_and_sizes(name: str) -> None:
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    expected = []
    for index in CONVOLUTIONS[name]:
        expected += [f"features.{index}.weight", f"features.{index}.bias"]
        if name.endswith("_bn"):
            parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            expected += [f"features.{index + 1}.{part}" for part in parts]
    expected += [f"classifier.{i}.{part}" for i in (0, 3, 6) for part in ("weight", "bias")]
    state = model.state_dict()
    assert list(state) == expected
    assert state["classifier.0.weight"].shape == (4096, 25088)
    assert state["classifier.6.weight"].shape == (1000, 4096)
    assert [n for n, _ in model.named_children()] == ["features", "avgpool", "classifier"]
    assert type(model.features) is FusedSequential


def test_family_takes_torchvisions_arguments() -> None:
    model = on_meta("vgg11", num_classes=7, dropout=0.1, init_weights=False)
    assert model.classifier[6].out_features == 7
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.1, 0.1]
    with pytest.raises(TypeError, match="positional"):
        models.vgg16("DEFAULT")
    with pytest.raises(TypeError, match="colour"):
        on_meta("vgg16", colour="red")


def test_family_averages_any_size_to_seven() -> None:
    torch.manual_seed(0)
    model = models.VGG(make_layers([16, "M", 512, "M"], batch_norm=True), num_classes=5).eval()
    x = torch.randn(2, 3, 37, 50)
    plain = nn.Sequential(*model.features)  # the same children in PyTorch's own container
    with torch.no_grad():
        expected = model.classifier(F.adaptive_avg_pool2d(plain(x), 7).flatten(1))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 5)


def test_initialisation_is_torchvisions() -> None:
    torch.manual_seed(0)
    model = models.VGG(make_layers([64, 128], batch_norm=True), num_classes=10)
    conv = model.features[3]
    # Kaiming, fan-out: variance 2 / (9 * Cout); 64 * 128 * 9 values give the deviation to about 0.3 %.
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert not conv.bias.any()
    assert model.features[4].weight.eq(1).all()
    assert not model.features[4].bias.any()
    assert model.classifier[3].weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not model.classifier[3].bias.any()


def test_vggnet_a_is_the_seeds_network() -> None:
    model = VggNet(num_classes=10, init_weights=False)
    kinds = [type(m).__name__ for m in model.features]
    conv = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == [k for n in (2, 2, 3, 3, 3) for k in [*conv * n, "MaxPool2d"]]
    assert [type(m).__name__ for m in model.classifier] == [*["Linear", "ReLU", "Dropout"] * 2, "Linear"]
    linears = [m for m in model.classifier if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(25088, 2048), (2048, 1024), (1024, 10)]
    assert sum(p.numel() for p in model.parameters()) == 68_213_834
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)
        assert model.features(torch.randn(1, 3, 33, 70)).shape == (1, 512, 1, 2)
    # The convolutions are vgg16_bn's, so its file fits them.
    theirs = {k for k in on_meta("vgg16_bn").state_dict() if k.startswith("features.")}
    assert {k for k in model.state_dict() if k.startswith("features.")} == theirs


@pytest.mark.parametrize(
    ("size", "found"), [((256, 224), "8x7x512 = 28672"), ((64, 64), "2x2x512 = 2048"), ((31, 224), "32x32")]
)
def test_vggnet_a_says_which_size_fits(size: tuple[int, int], found: str) -> None:
    with torch.device("meta"):
        model = VggNet(num_classes=10)
    x = torch.empty(1, 3, *size, device="meta")
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*{found}.*25088.*224x224"):
        model(x)


def test_vggnet_a_leaves_other_errors_to_pytorch() -> None:
    with torch.device("meta"):
        model = VggNet(num_classes=10)
    with pytest.raises(ValueError, match="4D"):
        model(torch.empty(3, 224, 224, device="meta"))
    with pytest.raises(RuntimeError):
        model(torch.empty(1, 3, 0, 224, device="meta"))
    with pytest.raises(ValueError, match="num_classes must be an integer >= 1, got 0"):
        VggNet(num_classes=0)


def test_vggnet_b_is_the_seeds_network() -> None:
    model = vggnet()
    assert isinstance(model, KerasVGG)
    assert [n for n, _ in model.features.named_children() if "relu" not in n] == BLOCKS
    assert [n for n, _ in model.named_children()] == [
        "features",
        "global_average_pooling2d",
        "dropout",
        "dense",
        "dropout_1",
        "dense_1",
    ]
    assert type(model.features) is FusedSequential
    assert {type(m) for m in model.features} == {nn.Conv2d, nn.ReLU, nn.MaxPool2d}
    assert sum(p.numel() for p in model.parameters()) == 14_777_458
    assert model.dropout.p == model.dropout_1.p == 0.5
    # Every convolution is followed by its ReLU.
    names = [n for n, _ in model.features.named_children()]
    assert all(names[i + 1] == n.replace("conv", "relu") for i, n in enumerate(names) if "conv" in n)


def test_vggnet_b_starts_as_keras_does() -> None:
    torch.manual_seed(0)
    model = vggnet(n_classes=10)
    weight = model.features.block2_conv1.weight
    limit = (6 / (9 * 64 + 9 * 128)) ** 0.5  # Glorot uniform: sqrt(6 / (fan_in + fan_out))
    assert weight.abs().max().item() == pytest.approx(limit, rel=1e-3)
    assert weight.abs().max().item() <= limit
    assert model.dense.weight.abs().max().item() == pytest.approx((6 / (512 + 120)) ** 0.5, rel=1e-2)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_vggnet_b_gives_probabilities_for_any_size() -> None:
    torch.manual_seed(0)
    model = vggnet(input_shape=(None, None, 3), n_classes=4).eval()
    for size in ((32, 32), (45, 97)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            y = model(x)
            torch.testing.assert_close(y, model.logits(x).softmax(1))
            # An image without a batch axis is legal where there is no batch-norm.
            torch.testing.assert_close(model(x[0]), y[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y.sum(1), torch.ones(2))


def test_vggnet_b_reads_its_shape_as_keras_does() -> None:
    model = vggnet(input_shape=[64, 48, 1], n_classes=2).eval()
    assert model.input_shape == (64, 48, 1)
    assert model.features.block1_conv1.in_channels == 1
    with pytest.raises(ValueError, match=r"\(2, 64, 48, 1\).*permute\(0, 3, 1, 2\)"):
        model(torch.randn(2, 64, 48, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (3, 224, 224)}, r"height, width, channels"),
        ({"input_shape": (224, 224)}, r"\(224, 224\)"),
        ({"input_shape": (31, 32, 3)}, ">= 32"),
        ({"input_shape": (224, 224, 0)}, "channels in input_shape must be an integer >= 1, got 0"),
        ({"input_shape": (224, 224, None)}, "got None"),
        ({"n_classes": 0}, "n_classes must be an integer >= 1, got 0"),
    ],
)
def test_vggnet_b_refuses_impossible_shapes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vggnet(**arguments)


def test_vggnet_b_has_keras_trainable() -> None:
    with torch.device("meta"):
        model = vggnet()
    assert model.trainable
    model.trainable = False
    assert not model.trainable
    assert not any(p.requires_grad for p in model.parameters())
    model.dense_1.requires_grad_(True)
    assert model.trainable
    model.trainable = True
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("seed_model", ["a", "b"])
def test_seeds_learn(seed_model: str) -> None:
    """A few steps on two images: every parameter gets a gradient and the loss falls."""
    torch.manual_seed(0)
    model: Any = vggnet(n_classes=2) if seed_model == "b" else VggNet(num_classes=2, dropout=0.0)
    x = torch.randn(2, 3, 32, 32) if seed_model == "b" else torch.randn(2, 3, 224, 224)
    target = torch.tensor([0, 1])
    output = model.logits if seed_model == "b" else model
    if seed_model == "b":
        model.dropout.p = model.dropout_1.p = 0.0  # otherwise the loss of two images is a lottery
    # SGD keeps no second copy of the 68 million weights of seed A.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(12 if seed_model == "b" else 2):
        optimizer.zero_grad()
        loss = F.cross_entropy(output(x), target)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_models_can_be_copied_and_stored() -> None:
    torch.manual_seed(0)
    model = vggnet(n_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = model(x)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(twin) is KerasVGG
            assert type(twin.features) is FusedSequential
            assert torch.equal(twin(x), expected)
    fresh = vggnet(n_classes=3).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("seed_model", ["a", "b"])
def test_the_whole_convolutional_part_is_one_chain(seed_model: str) -> None:
    features = VggNet(2, init_weights=False).features if seed_model == "a" else vggnet().features
    (chain,) = parse(list(features.eval()))  # in training mode a batch-norm has to run by itself
    assert isinstance(chain, Chain)
    assert len(chain.runs) == 13
    x = torch.randn(2, 3, 64, 45)
    plain = nn.Sequential(*features)
    with torch.no_grad(), record() as segments:
        torch.testing.assert_close(features(x), plain(x), rtol=1e-3, atol=1e-5)
    (segment,) = segments
    assert len(segment.names) == len(features)
    # Without a compiled library the same chain runs on the reference.
    cpu = next(b for b in vgg_fast.backends() if b.name == "cpu")
    assert (segment.kernel not in (None, "reference")) == cpu.available


def test_weights_loaded_after_the_first_forward_count(tmp_path: Path) -> None:
    """The container packs its weights; loading must reach the packed ones too."""
    first, second = vggnet(n_classes=3).eval(), vggnet(n_classes=3).eval()
    save_weights(second, tmp_path / "b.safetensors")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(first(x), second(x))
        load_weights(first, tmp_path / "b.safetensors")
        assert torch.equal(first(x), second(x))
    (tmp_path / "b.safetensors").unlink()


def test_make_layers_can_be_cut_anywhere() -> None:
    features = make_layers(cfgs["A"], batch_norm=True, in_channels=1)
    assert features[0].in_channels == 1
    assert isinstance(features[:5], FusedSequential)
    assert len(features[:5]) == 5
