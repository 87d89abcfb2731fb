"""``weights=`` of the builders: torchvision's names and enum members, paths, URLs."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vgg_fast import models
from vgg_fast.models import VggNet, vggnet
from vgg_fast.models.weights import WeightsError, find_weights, save_weights


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(models, name)(**kwargs)


@pytest.mark.parametrize(
    ("arch", "name", "file"),
    [
        ("vgg16", "DEFAULT", "vgg16-397923af.pth"),
        ("vgg16", "VGG16_Weights.DEFAULT", "vgg16-397923af.pth"),
        ("vgg16", "IMAGENET1K_FEATURES", "vgg16_features-amdegroot-88682ab5.pth"),
        ("vgg16_bn", "IMAGENET1K_V1", "vgg16_bn-6c64b313.pth"),
        ("vgg16_bn", "VGG16_BN_Weights.IMAGENET1K_V1", "vgg16_bn-6c64b313.pth"),
        ("vgg11", "DEFAULT", "vgg11-8a719046.pth"),
        ("vgg19_bn", "DEFAULT", "vgg19_bn-c79401a0.pth"),
    ],
)
def test_torchvisions_names(arch: str, name: str, file: str) -> None:
    source = find_weights(arch, name)
    assert source.location == f"https://download.pytorch.org/models/{file}"
    assert source.num_classes == (None if "FEATURES" in name else 1000)


@pytest.mark.parametrize("name", ["IMAGENET1K_V2", "VGG16_BN_Weights.DEFAULT", "imagenet", "weights.bin"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown weights.*DEFAULT, IMAGENET1K_V1, IMAGENET1K_FEATURES"):
        models.vgg16(weights=name)


def test_weights_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="got 7"):
        models.vgg16(weights=7)
    with pytest.raises(ValueError, match=r"num_classes=10.*1000 classes"):
        models.vgg16(weights="DEFAULT", num_classes=10)


@dataclass(frozen=True)
class Weights:
    """Torchvision's: the value of an enum member."""

    url: str
    meta: dict[str, Any]


def weights_enum(name: str, url: str, classes: int) -> enum.Enum:
    """A member shaped like torchvision's, whose ``url`` and ``meta`` are reached through it."""

    class Base(enum.Enum):
        @property
        def url(self) -> str:
            return self.value.url

        @property
        def meta(self) -> dict[str, Any]:
            return self.value.meta

    return Base(name, {"DEFAULT": Weights(url, {"categories": ["?"] * classes})}).DEFAULT


def test_an_enum_member_of_torchvisions_kind_loads(tmp_path: Path) -> None:
    """Name in the enum -> file URL -> hash -> number of classes -> weights, on a whole model."""
    shapes = on_meta("vgg11", num_classes=4).state_dict()
    # Half precision to halve the file; loading casts it to the model's float32.
    state = {k: torch.full(v.shape, 1.0 + i, dtype=torch.float16) for i, (k, v) in enumerate(shapes.items())}
    plain = tmp_path / "vgg11.safetensors"
    save_weights(state, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    file = plain.rename(tmp_path / f"vgg11-{digest[:8]}.safetensors")
    try:
        member = weights_enum("VGG11_Weights", file.as_uri(), 4)
        model = models.vgg11(weights=member)
        assert model.classifier[6].out_features == 4
        assert all((v == 1.0 + i).all() for i, v in enumerate(model.state_dict().values()))
        assert model.features[0].weight.dtype == torch.float32
        with pytest.raises(ValueError, match=r"num_classes=5.*4 classes"):
            models.vgg11(weights=member, num_classes=5)
        with pytest.raises(TypeError, match=r"takes the weights of VGG13_Weights, got .*VGG11_Weights"):
            models.vgg13(weights=member)
    finally:
        file.unlink()  # 250 MB; pytest would keep it for three runs


def test_old_pretrained_flag() -> None:
    with pytest.warns(FutureWarning, match="weights='DEFAULT'"):
        assert on_meta("vgg11", pretrained=False).classifier[6].out_features == 1000
    with (
        pytest.warns(FutureWarning, match="weights='DEFAULT'"),
        pytest.raises(ValueError, match=r"num_classes=3.*1000 classes"),
    ):
        models.vgg11(pretrained=True, num_classes=3)


def test_seeds_load_from_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vggnet(n_classes=3)
    path = tmp_path / "b.safetensors"
    save_weights(model, path)
    twin = vggnet(n_classes=3, weights=path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(WeightsError, match=r"b\.safetensors.*dense_1.*number of classes"):
        vggnet(n_classes=4, weights=str(path))
    with pytest.raises(WeightsError, match=r"missing.*features\.0\.weight"):
        VggNet(num_classes=3, init_weights=False, weights=path.as_uri())
