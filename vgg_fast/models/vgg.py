"""The VGG networks: torchvision's family, and the two models this project started from.

All of them are ordinary PyTorch modules. Their convolutions lie in a :class:`~vgg_fast.FusedSequential`, the
same container that ``accelerate`` gives to other people's models, so there is one fused path and not two.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgg_fast.container.sequential import FusedSequential
from vgg_fast.models.weights import find_weights, load_weights

# Convolutions by their number of filters, "M" for a pool; letters as in the paper (arXiv:1409.1556, table 1).
cfgs: dict[str, list[str | int]] = {
    "A": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "B": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "D": [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"],
    "E": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}

# builder -> (letter, batch-norm)
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    f"vgg{depth}{suffix}": (letter, bool(suffix))
    for depth, letter in ((11, "A"), (13, "B"), (16, "D"), (19, "E"))
    for suffix in ("", "_bn")
}


def make_layers(cfg: Sequence[str | int], batch_norm: bool = False, in_channels: int = 3) -> FusedSequential:
    """The convolutional part of a VGG, with torchvision's indices.

    Args:
        cfg: numbers of filters and ``"M"`` for a 2x2 max-pool; :data:`cfgs` holds the paper's.
        batch_norm: a BatchNorm2d after each convolution.
        in_channels: channels of the input.

    Example:
        >>> make_layers([8, "M"])(torch.zeros(1, 3, 4, 4)).shape
        torch.Size([1, 8, 2, 2])
    """
    layers: list[nn.Module] = []
    for entry in cfg:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers.append(nn.Conv2d(in_channels, entry, kernel_size=3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(entry))
        layers.append(nn.ReLU(inplace=True))
        in_channels = entry
    return FusedSequential(*layers)


def _initialize(model: nn.Module) -> None:
    """Torchvision's initialisation, in its order: one seed gives the same weights in both libraries."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _head(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear + ReLU + Dropout for each pair of widths; the last one is Linear alone."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        if i:
            layers += [nn.ReLU(inplace=True), nn.Dropout(p=dropout)]
        layers.append(nn.Linear(widths[i], widths[i + 1]))
    return FusedSequential(*layers)


class VGG(nn.Module):
    """A VGG with torchvision's structure: ``features``, ``avgpool`` to 7x7, ``classifier``.

    Args:
        features: the convolutional part, 512 channels at its end.
        num_classes: number of outputs (logits).
        init_weights: initialise as torchvision does; False leaves PyTorch's defaults.
        dropout: probability in the classifier.

    Input ``[N, 3, H, W]`` with H, W >= 32; output ``[N, num_classes]``.

    Example:
        >>> model = VGG(make_layers([512, "M"]), num_classes=5, init_weights=False)
        >>> model.eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, features: nn.Module, num_classes: int = 1000, init_weights: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = _head((512 * 7 * 7, 4096, 4096, num_classes), dropout)
        if init_weights:
            _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _vgg(arch: str, weights: Any, progress: bool, kwargs: dict[str, Any]) -> VGG:
    if "pretrained" in kwargs:
        # Code written for torchvision < 0.13 (LPIPS among it) still says pretrained=True.
        pretrained = kwargs.pop("pretrained")
        warnings.warn("pretrained= is deprecated: use weights='DEFAULT'", FutureWarning, stacklevel=3)
        weights = "DEFAULT" if pretrained and weights is None else weights
    source = None
    if weights is not None:
        source = find_weights(arch, weights)
        kwargs["init_weights"] = False
        classes = source.num_classes
        if classes is not None and kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(
                f"{arch}: num_classes={kwargs['num_classes']}, but the weights {weights!s} have {classes} classes: "
                f"build with num_classes={classes} and replace classifier[6] afterwards, or give weights of your own"
            )
    letter, batch_norm = ARCHITECTURES[arch]
    model = VGG(make_layers(cfgs[letter], batch_norm), **kwargs)
    if source is not None:
        load_weights(model, source.location, progress=progress)
    return model


def vgg11(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-11 (configuration A). Arguments as :func:`vgg16`."""
    return _vgg("vgg11", weights, progress, kwargs)


def vgg11_bn(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-11 with batch-norm (configuration A). Arguments as :func:`vgg16`."""
    return _vgg("vgg11_bn", weights, progress, kwargs)


def vgg13(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-13 (configuration B). Arguments as :func:`vgg16`."""
    return _vgg("vgg13", weights, progress, kwargs)


def vgg13_bn(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-13 with batch-norm (configuration B). Arguments as :func:`vgg16`."""
    return _vgg("vgg13_bn", weights, progress, kwargs)


def vgg16(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-16 (configuration D), torchvision's signature, module names and state_dict keys.

    Args:
        weights: None (random); one of torchvision's names as a string (``"DEFAULT"``, ``"IMAGENET1K_V1"``,
            ``"VGG16_Weights.IMAGENET1K_V1"``; for vgg16 also ``"IMAGENET1K_FEATURES"``) or a member of its enum; the
            path of a ``.pth``, ``.pt`` or ``.safetensors`` file; or a URL (http, https, file) of one.
        progress: show a progress bar while downloading.
        kwargs: ``num_classes=1000``, ``init_weights=True``, ``dropout=0.5`` as in :class:`VGG`.

    Raises:
        ValueError: for a name that is not in the table, or weights with another number of classes.
        WeightsError: for a file that is missing, damaged or does not fit.

    Example:
        >>> with torch.device("meta"):
        ...     print(sum(p.numel() for p in vgg16().parameters()))
        138357544
    """
    return _vgg("vgg16", weights, progress, kwargs)


def vgg16_bn(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-16 with batch-norm (configuration D). Arguments as :func:`vgg16`."""
    return _vgg("vgg16_bn", weights, progress, kwargs)


def vgg19(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-19 (configuration E). Arguments as :func:`vgg16`."""
    return _vgg("vgg19", weights, progress, kwargs)


def vgg19_bn(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> VGG:
    """VGG-19 with batch-norm (configuration E). Arguments as :func:`vgg16`."""
    return _vgg("vgg19_bn", weights, progress, kwargs)


def _require_positive(what: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be an integer >= 1, got {value!r}")


class VggNet(nn.Module):
    """VGG16 with batch-norm and the head 25088 -> 2048 -> 1024 -> classes (seed A).

    ``features`` has the indices of torchvision's ``vgg16_bn``, so its weights fit; it takes any size >= 32. The head
    takes the flattened 7x7x512 map and nothing else, because averaging to 7x7 would be another network: the whole model
    wants inputs of 224 to 255 pixels a side.

    Args:
        num_classes: number of outputs (logits).
        dropout: probability after each of the two hidden dense layers.
        init_weights: initialise as torchvision's VGG; False leaves PyTorch's defaults.
        weights: path or URL of a ``.pth``, ``.pt`` or ``.safetensors`` file to load.
        progress: show a progress bar while downloading.

    Raises:
        ValueError: ``num_classes`` < 1; in forward, an input that does not come out as 7x7x512.
        WeightsError: ``weights`` is missing, damaged or does not fit.

    Example:
        >>> model = VggNet(num_classes=10, init_weights=False).eval()
        >>> model.features(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 512, 2, 3])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        init_weights: bool = True,
        *,
        weights: Any = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        _require_positive("num_classes", num_classes)
        self.features = make_layers(cfgs["D"], batch_norm=True)
        self.classifier = _head((512 * 7 * 7, 2048, 1024, num_classes), dropout)
        if init_weights and weights is None:
            _initialize(self)
        if weights is not None:
            load_weights(self, weights, progress=progress)

    def forward(self, x: Tensor) -> Tensor:
        # Below 32 pixels the last pool fails with a message about its own input, not about what to give instead.
        if x.dim() == 4 and 0 < min(x.shape[2:]) < 32:
            raise self._size_error(x, "is smaller than the 32x32 that five pools need")
        maps = self.features(x)
        _, channels, height, width = maps.shape
        if (channels, height, width) != (512, 7, 7):
            size = f"{height}x{width}x{channels} = {height * width * channels} values"
            raise self._size_error(x, f"leaves the convolutions as {size}")
        return self.classifier(torch.flatten(maps, 1))

    @staticmethod
    def _size_error(x: Tensor, found: str) -> ValueError:
        return ValueError(
            f"VggNet: an input of {x.shape[2]}x{x.shape[3]} (height x width) {found}, but the first dense layer takes "
            "7x7x512 = 25088: resize the input to 224x224 (224 to 255 a side all give 7x7), or use model.features "
            "alone, which takes any size from 32x32"
        )


class KerasVGG(nn.Module):
    """What :func:`vggnet` returns; the layers carry their Keras names.

    Attributes:
        features: block1_conv1, block1_relu1 … block5_pool (Keras keeps the ReLU inside its convolution).
        global_average_pooling2d, dropout, dense, dropout_1, dense_1: the head.
        input_shape: ``(height, width, channels)`` as given.
        name: the name in the title of the summary.
    """

    def __init__(self, input_shape: Sequence[int | None] = (224, 224, 3), n_classes: int = 10) -> None:
        super().__init__()
        self.name = "model"
        self.input_shape = _checked_input_shape(input_shape)
        _require_positive("n_classes", n_classes)
        self.features = FusedSequential(_named_layers(self.input_shape[2]))
        self.global_average_pooling2d = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.dense = nn.Linear(512, 120)
        self.dropout_1 = nn.Dropout(0.5)
        self.dense_1 = nn.Linear(120, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # Keras' default. Its fan counts the kernel's area on both sides, as PyTorch's does.
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @property
    def trainable(self) -> bool:
        """Keras' switch: True if any weight takes a gradient; setting it freezes or frees every layer."""
        return any(p.requires_grad for p in self.parameters())

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.requires_grad_(bool(value))

    def logits(self, x: Tensor) -> Tensor:
        """The output before the softmax, ``[N, n_classes]``: what ``F.cross_entropy`` wants for training."""
        channels = self.input_shape[2]
        if x.dim() == 4 and x.shape[1] != channels and x.shape[3] == channels:
            raise ValueError(
                f"vggnet: input of shape {tuple(x.shape)} looks like Keras' (N, height, width, {channels}); PyTorch "
                f"wants (N, {channels}, height, width): give x.permute(0, 3, 1, 2)"
            )
        x = self.global_average_pooling2d(self.features(x)).flatten(-3)
        x = F.relu(self.dense(self.dropout(x)))
        return self.dense_1(self.dropout_1(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.logits(x), dim=-1)


def _checked_input_shape(input_shape: Sequence[int | None]) -> tuple[int | None, int | None, int]:
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(f"input_shape must be (height, width, channels), got {shape}")
    height, width, channels = shape
    _require_positive("the channels in input_shape", channels)
    for side in (height, width):
        if side is not None and (not isinstance(side, int) or side < 32):
            raise ValueError(
                f"input_shape={shape}: height and width must be None or integers >= 32 (five pools halve them), and "
                "the order is Keras' (height, width, channels), not PyTorch's (channels, height, width)"
            )
    assert channels is not None
    return height, width, channels


def _named_layers(channels: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    block, number = 1, 0
    for entry in cfgs["D"]:
        if isinstance(entry, str):
            layers[f"block{block}_pool"] = nn.MaxPool2d(kernel_size=2, stride=2)
            block, number = block + 1, 0
            continue
        number += 1
        layers[f"block{block}_conv{number}"] = nn.Conv2d(channels, entry, kernel_size=3, padding=1)
        layers[f"block{block}_relu{number}"] = nn.ReLU(inplace=True)
        channels = entry
    return layers


def vggnet(
    input_shape: Sequence[int | None] = (224, 224, 3),
    n_classes: int = 10,
    *,
    weights: Any = None,
    progress: bool = True,
) -> KerasVGG:
    """Plain VGG16 with global average pooling, dropout, dense 120 with ReLU, dropout, dense softmax (seed B).

    Written after a Keras function, with its layer names, its initialisation (Glorot uniform, zero bias) and its output:
    probabilities. For training use ``F.cross_entropy(model.logits(x), target)``, which is what Keras computes for
    ``categorical_crossentropy`` on a softmax. Like every PyTorch module it starts in training mode: ``model.eval()``
    turns the dropout off.

    Args:
        input_shape: ``(height, width, channels)`` in Keras' order. It fixes the number of channels, and the sizes that
            :func:`vgg_fast.summary` prints. Tensors are PyTorch's ``[N, channels, height, width]``. Because of the
            global pooling any height and width from 32 work, also others than in ``input_shape``; None says so.
        n_classes: number of outputs.
        weights: path or URL of a ``.pth``, ``.pt`` or ``.safetensors`` file to load (``vgg-fast convert`` makes one
            from a Keras file).
        progress: show a progress bar while downloading.

    Raises:
        ValueError: an ``input_shape`` that is not three numbers >= 32, 32, 1, or ``n_classes`` < 1.
        WeightsError: ``weights`` is missing, damaged or does not fit.

    Example:
        >>> vggnet(input_shape=(64, 64, 3), n_classes=4).eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 4])
    """
    model = KerasVGG(input_shape, n_classes)
    if weights is not None:
        load_weights(model, weights, progress=progress)
    return model
