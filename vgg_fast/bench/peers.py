"""Plain PyTorch to be compared with: a VGG16-BN as anybody would write it, and the contestants made from one model.

``vgg-fast demo``, ``vgg-fast bench`` and benchmarks/ share it. Nothing here uses :mod:`vgg_fast.models`: the point is a
model that has never heard of this package.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vgg_fast import testing
from vgg_fast.accelerate import accelerate
from vgg_fast.container.sequential import record

OURS = "vgg_fast"
EAGER, CHANNELS_LAST, COMPILED = "eager", "channels_last", "torch.compile"
GRAPH = ", CUDA graph"  # behind a contestant's name: its call recorded once and replayed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Our error may be this many times PyTorch's own error in the same dtype, both against float64. fp32: another order of
# summation is another error of the same size. bf16 and fp16: we round once where PyTorch rounds after the convolution
# and after the batch-norm; but dense layers are rounded once on both sides, and where they dominate the two errors are
# equal up to chance, so that "no larger" cannot be asked of every image.
ERROR_FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.25, torch.float16: 1.25}

# What fp32 may be off where the user has lowered PyTorch's precision of it (torch.set_float32_matmul_precision).
# "high": the precision ladder has "three bf16 products on AMX; tf32 or bf16x3 on a GPU" and allows "<= 3e-5 relative
# (norm)", which is 1/16 of tf32's unit roundoff 2^-11. That is what one layer may be off. A network amplifies every
# rounding (VGG16-BN with calibrated statistics 27 times), so that it may be off 1/16 of what tf32 operands make of the
# same network and input. "medium": one bf16 product, whose error through thirteen layers is that of bf16 activations
# and weights.
LOWERED_ERROR = {"high": 3e-5, "medium": 2e-2}
OF_TF32 = 1 / 16
CUT_FACTOR = 1.25  # as for bf16 and fp16: another order of summation is another error of the same size

_FILTERS: list[int | str] = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


@dataclass(frozen=True)
class Layer:
    """One convolution of VGG16-BN at 224x224, with what follows it: batch-norm, ReLU, maybe the pool."""

    name: str
    cin: int
    cout: int
    size: int
    pool: bool

    @property
    def gflop(self) -> float:
        """Of one image."""
        return 2e-9 * 9 * self.cin * self.cout * self.size**2


# The thirteen, less conv5_1, which is conv5_2 once more.
LAYERS = (
    Layer("conv1_1", 3, 64, 224, False),
    Layer("conv1_2", 64, 64, 224, True),
    Layer("conv2_1", 64, 128, 112, False),
    Layer("conv2_2", 128, 128, 112, True),
    Layer("conv3_1", 128, 256, 56, False),
    Layer("conv3_2", 256, 256, 56, False),
    Layer("conv3_3", 256, 256, 56, True),
    Layer("conv4_1", 256, 512, 28, False),
    Layer("conv4_2", 512, 512, 28, False),
    Layer("conv4_3", 512, 512, 28, True),
    Layer("conv5_2", 512, 512, 14, False),
    Layer("conv5_3", 512, 512, 14, True),
)


def plain_features(seed: int = 0) -> nn.Sequential:
    """The convolutional part of VGG16-BN, torchvision's indices, He-initialised; in evaluation mode.

    Example:
        >>> len(plain_features())
        44
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for entry in _FILTERS:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += _conv_bn_relu(channels, entry, generator)
        channels = entry
    return nn.Sequential(*layers).eval()


def plain_vgg16_bn(num_classes: int = 1000, seed: int | None = 0) -> nn.Sequential:
    """All of VGG16-BN in nothing but ``nn.Sequential``, with torchvision's state_dict keys; in evaluation mode.

    Args:
        num_classes: number of outputs (logits).
        seed: of random weights after He; :func:`calibrate` gives the batch-norms the statistics of real images. None
            leaves the dense layers as the memory was: for a caller who loads weights.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    widths = (512 * 7 * 7, 4096, 4096, num_classes)
    head: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if i:
            head += [nn.ReLU(inplace=True), nn.Dropout()]
        linear = skip_init(nn.Linear, fan_in, fan_out)  # 124 million default values that nobody would read
        if seed is not None:
            nn.init.normal_(linear.weight, 0, (2 / fan_in) ** 0.5, generator)
            nn.init.zeros_(linear.bias)
        head.append(linear)
    parts = {
        "features": plain_features(seed or 0),
        "avgpool": nn.AdaptiveAvgPool2d((7, 7)),
        "flatten": nn.Flatten(),
        "classifier": nn.Sequential(*head),
    }
    return nn.Sequential(OrderedDict(parts)).eval()


def plain_layer(layer: Layer, seed: int = 0) -> nn.Sequential:
    """``layer`` as PyTorch writes it: Conv2d, BatchNorm2d, ReLU and perhaps MaxPool2d; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    pool = [nn.MaxPool2d(2, 2)] if layer.pool else []
    return nn.Sequential(*_conv_bn_relu(layer.cin, layer.cout, generator), *pool).eval()


def _conv_bn_relu(cin: int, cout: int, generator: torch.Generator) -> list[nn.Module]:
    conv = skip_init(nn.Conv2d, cin, cout, 3, padding=1)
    nn.init.normal_(conv.weight, 0, (2 / (9 * cin)) ** 0.5, generator)
    nn.init.normal_(conv.bias, 0, 0.1, generator)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Gives every batch-norm the statistics that ``images`` ``[N, 3, H, W]`` have there, as a training would have.

    Without it thirteen random layers let the activations die out or explode, and all images look alike at the end.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over what it sees
        norm.train()
    try:
        model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


@dataclass(frozen=True)
class Contestant:
    """A module and the memory format in which it wants its input."""

    module: nn.Module
    memory_format: torch.memory_format

    def on(self, x: Tensor) -> Callable[[], Tensor]:
        """The call to be timed: without gradients, the input already in the right format."""
        x = x.contiguous(memory_format=self.memory_format)

        def call() -> Tensor:
            # Not inference_mode: Inductor folds weights into constants ("freezing") only from ordinary tensors.
            with torch.no_grad():
                return self.module(x)

        return call


def contestants(
    model: nn.Module, *, compiled: bool = False, accelerator: Callable[[nn.Module], nn.Module] = accelerate
) -> dict[str, Contestant]:
    """The plain model, the same in channels_last, through torch.compile if wanted, and accelerated.

    Ours gets the input as users have it (NCHW): a change of layout on the way in is part of its time.

    Args:
        model: plain PyTorch in evaluation mode; not changed. The copies share its parameters where the layout allows.
        compiled: also ``torch.compile`` with frozen weights, its fastest form; it compiles in its first call.
        accelerator: makes ours out of a copy; ``partial(accelerate, backend=...)`` names the backend or kernel.
    """
    ours = accelerator(copy.deepcopy(model, {id(p): p for p in model.parameters()}))
    flat = {id(p): p for p in model.parameters() if p.dim() != 4}
    last = copy.deepcopy(model, dict(flat)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = {
        EAGER: Contestant(model, torch.contiguous_format),
        CHANNELS_LAST: Contestant(last, torch.channels_last),
    }
    if compiled:
        # Dynamo counts the versions of nn.Sequential.forward over all models and gives up, quietly, at eight of them;
        # with fullgraph it would at least raise.
        torch.compiler.reset()
        module: Any = torch.compile(copy.deepcopy(last), fullgraph=True, options={"freezing": True})
        result[COMPILED] = Contestant(module, torch.channels_last)
    result[OURS] = Contestant(ours, torch.contiguous_format)
    return result


@torch.no_grad()
def in_float64(model: nn.Module, x: Tensor) -> Tensor:
    """What the model would answer with (almost) no rounding errors: its weights and ``x`` as they are, in float64.

    Image by image: PyTorch's float64 convolution needs nine copies of its input, 0.5 GB for one 224x224 image.
    """
    # Not deepcopy and then double: that would hold the dense layers three times.
    parameters = {id(p): nn.Parameter(p.detach().double(), requires_grad=False) for p in model.parameters()}
    wide = copy.deepcopy(model, parameters).double()
    return torch.cat([wide(image[None].double()) for image in x])


def round_to_tf32(x: Tensor, cut: bool = False) -> Tensor:
    """fp32 values rounded to the 10 bits of mantissa that tf32 keeps, ties to even; in the dtype of ``x``.

    Args:
        x: any shape.
        cut: drop the other bits instead, as a tensor core does with operands that nobody has rounded.

    Example:
        >>> round_to_tf32(torch.tensor([1.0 + 2.0**-11, 1.0 + 3 * 2.0**-11])).tolist()
        [1.0, 1.001953125]
    """
    bits = x.float().contiguous().view(torch.int32)
    rounded = (bits if cut else bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return rounded.view(torch.float32).to(x.dtype)


@torch.no_grad()
def in_tf32(model: nn.Module, x: Tensor, cut: bool = False) -> Tensor:
    """What tf32 would make of the model: the operands of every convolution and dense layer rounded to it, all else in
    float64; arguments as :func:`in_float64` and :func:`round_to_tf32`."""
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.copy_(round_to_tf32(module.weight, cut))
            module.register_forward_pre_hook(lambda _, args: (round_to_tf32(args[0], cut), *args[1:]))
    return in_float64(rounded, x)


@dataclass(frozen=True)
class Agreement:
    """How far two answers are from float64.

    Attributes:
        ours, pytorch: relative errors (norm) against float64.
        allowed: what ``ours`` may be.
    """

    ours: float
    pytorch: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """False for NaN, too."""
        return self.ours <= self.allowed


def agreement(
    ours: Tensor,
    pytorch: Sequence[Tensor],
    exact: Tensor,
    tf32: Callable[[], Tensor] | None = None,
    cut: Callable[[], Tensor] | None = None,
) -> Agreement:
    """Judges our answer by PyTorch's own in the same dtype, or by tf32's where PyTorch's precision is "high".

    Args:
        ours: any shape.
        pytorch: the answers of eager PyTorch in its memory formats. They sum up in different orders (in fp32 the error
            of VGG16 in channels_last can be twice that in NCHW), and each is what some user has: the larger one counts.
        exact: the answer in float64.
        tf32: of a network, gives :func:`in_tf32`; None for a single layer.
        cut: where a GPU computes fp32 in tf32, gives :func:`in_tf32` with operands cut off: ours may be off by as much.
    """
    theirs = max(testing.relative_error(answer, exact) for answer in pytorch)
    allowed = ERROR_FACTOR[ours.dtype] * theirs
    if cut is not None:
        allowed = max(allowed, CUT_FACTOR * testing.relative_error(cut(), exact))
    elif ours.dtype == torch.float32:
        setting = torch.get_float32_matmul_precision()
        lowered = LOWERED_ERROR.get(setting, 0.0)
        if setting == "high" and tf32 is not None:
            lowered = OF_TF32 * testing.relative_error(tf32(), exact)
        allowed = max(allowed, lowered)
    return Agreement(testing.relative_error(ours, exact), theirs, allowed)


@torch.no_grad()
def kernels_used(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names of the kernels that a forward of an accelerated model runs; none if nothing ran fused.

    Example:
        >>> kernels_used(nn.Sequential(nn.Flatten()), torch.zeros(1, 2))
        ()
    """
    with record() as segments:
        model(x)
    return tuple(sorted({segment.kernel for segment in segments if segment.kernel is not None}))
