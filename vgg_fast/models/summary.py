"""The table that Keras 2 prints for a model, for PyTorch models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vgg_fast.models import VGG, KerasVGG, VggNet

# Keras' column ends for a model without branches, as fractions of the line.
_COLUMNS = (0.45, 0.85, 1.0)

_KERAS_TYPES = {
    nn.Conv2d: "Conv2D",
    nn.BatchNorm2d: "BatchNormalization",
    nn.MaxPool2d: "MaxPooling2D",
    nn.AvgPool2d: "AveragePooling2D",
    nn.Linear: "Dense",
}

Shape = tuple[int | None, ...]


def summary(
    model: nn.Module,
    input_shape: Sequence[int | None] | None = None,
    *,
    line_length: int | None = None,
    print_fn: Callable[[str], object] = print,
) -> None:
    """Print the layers of a model as Keras does: name, type, output shape, number of parameters; then the totals.

    Shapes are in Keras' order, ``(None, height, width, channels)``. Parameters are counted as Keras counts them: the
    moving mean and variance of a batch-norm belong to its layer and are not trainable; a weight with
    ``requires_grad=False`` is not trainable either. Nothing is computed: the shapes come from a run on the meta device
    (hooks of your own on the layers do run, and see meta tensors).

    Args:
        model: a model of this package, or any module that takes one ``[N, C, H, W]`` tensor.
        input_shape: ``(height, width, channels)``; None for height and width prints None. Default: the model's own
            (224x224x3 for the VGG family).
        line_length: width of the table. Default: Keras' 65, or more where a name of another model needs it.
        print_fn: called with each line.

    Raises:
        ValueError: no ``input_shape`` for a model of another kind, or a malformed one.

    Example:
        >>> from vgg_fast.models import vggnet
        >>> summary(vggnet(), print_fn=lambda line: print(line.strip()) if "block1_conv1" in line else None)
        block1_conv1 (Conv2D)       (None, 224, 224, 64)      1792
    """
    input_shape = _input_shape(model, input_shape)
    layers = dict(_layers(model))
    shapes = _output_shapes(model, list(layers.values()), input_shape)
    names = _short_names(model, layers)

    titles = {path: f"{names[path]} ({_type_name(layer)})" for path, layer in layers.items()}
    if line_length is None:
        # Keras wraps a long name, as in the seed; names like features.11 (BatchNormalization) would all wrap.
        widest = 0 if isinstance(model, KerasVGG) else max(map(len, titles.values()), default=0)
        line_length = max(65, math.ceil((widest + 3) / _COLUMNS[0]))
    positions = [int(line_length * fraction) for fraction in _COLUMNS]
    print_fn(f'Model: "{getattr(model, "name", type(model).__name__)}"')
    print_fn("_" * line_length)
    _print_row(("Layer (type)", "Output Shape", "Param #"), positions, print_fn)
    print_fn("=" * line_length)
    _print_row(("input_1 (InputLayer)", f"[{(None, *input_shape)}]", "0"), positions, print_fn)
    for path, layer in layers.items():
        print_fn(" " * line_length)
        count = sum(tensor.numel() for tensor in _weights(layer))
        _print_row((titles[path], str(shapes.get(layer, "?")), str(count)), positions, print_fn)
    # By identity: a weight that two layers share counts once.
    every = {id(t): t for module in model.modules() for t in _weights(module)}.values()
    trainable = sum(t.numel() for t in every if t.requires_grad)
    total = sum(t.numel() for t in every)
    print_fn("=" * line_length)
    print_fn(f"Total params: {total:,}")
    print_fn(f"Trainable params: {trainable:,}")
    print_fn(f"Non-trainable params: {total - trainable:,}")
    print_fn("_" * line_length)


def _input_shape(model: nn.Module, given: Sequence[int | None] | None) -> Shape:
    if given is None:
        if isinstance(model, KerasVGG):
            given = model.input_shape
        elif isinstance(model, VGG | VggNet):
            given = (224, 224, 3)
        else:
            raise ValueError(f"summary of {type(model).__name__} needs input_shape=(height, width, channels)")
    shape = tuple(given)
    if len(shape) != 3 or not isinstance(shape[2], int):
        raise ValueError(f"input_shape must be (height, width, channels), got {shape}")
    return shape


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The rows: every module that has weights of its own or no children, once."""
    for path, module in model.named_modules():
        inside = any(True for _ in module.children())
        if inside and not _weights(module):
            continue
        # In Keras the ReLU is an argument of the convolution, not a layer.
        if isinstance(model, KerasVGG) and type(module) is nn.ReLU:
            continue
        yield path, module


def _weights(module: nn.Module) -> list[Tensor]:
    """The tensors Keras counts for a layer itself: parameters, and buffers that are floating-point state."""
    buffers = [b for b in module.buffers(recurse=False) if b.is_floating_point()]
    return [*module.parameters(recurse=False), *buffers]


def _type_name(layer: nn.Module) -> str:
    if type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)):
        return "GlobalAveragePooling2D"
    return _KERAS_TYPES.get(type(layer), type(layer).__name__)


def _short_names(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """``block1_conv1`` for ``features.block1_conv1``; the whole path where the last part is a number or not unique."""
    last = {path: path.rpartition(".")[2] for path in layers}
    parts = list(last.values())
    root = type(model).__name__.lower()
    return {
        path: (part if not part.isdigit() and parts.count(part) == 1 else path) or root for path, part in last.items()
    }


def _output_shapes(model: nn.Module, layers: list[nn.Module], input_shape: Shape) -> dict[nn.Module, Shape]:
    """Output shape of each layer's first call, in Keras' order, from a forward on the meta device."""
    shapes: dict[nn.Module, Shape] = {}
    height, width, channels = input_shape

    def record(layer: nn.Module, _: object, output: object) -> None:
        if not isinstance(output, Tensor) or layer in shapes:
            return
        size: Shape = tuple(output.shape[1:])
        if len(size) == 3:
            # Where the input's side is open, so is every map's, unless the layer fixes it.
            fixed = isinstance(layer, nn.AdaptiveAvgPool2d)
            rows, columns = (
                side if known is not None or fixed else None
                for side, known in zip(size[1:], (height, width), strict=True)
            )
            pooled = _type_name(layer) == "GlobalAveragePooling2D"
            size = size[:1] if pooled else (rows, columns, size[0])
        shapes[layer] = (None, *size)

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((t.dtype for t in model.parameters()), torch.get_default_dtype())
    # Two images: batch-norm in training mode refuses one value per channel. 224 stands for an open side.
    x = torch.empty(2, channels, height or 224, width or 224, dtype=dtype, device="meta")  # type: ignore[arg-type]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.no_grad():
            torch.func.functional_call(model, meta, (x,))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _print_row(fields: Sequence[str], positions: Sequence[int], print_fn: Callable[[str], object]) -> None:
    """One row; a field that is too long for its column goes on in the next line, with two blanks between columns."""
    starts = [0, *positions]
    widths = [end - start - (3 if end != positions[-1] else 0) for start, end in zip(starts, positions, strict=False)]
    for i in range(max(math.ceil(len(field) / width) for field, width in zip(fields, widths, strict=True))):
        line = ""
        for field, start, width in zip(fields, starts, widths, strict=False):
            # One blank before the first column, as Keras has it; the others begin right at their position.
            line = line.ljust(start or 1) + field[i * width : (i + 1) * width]
        print_fn(line.ljust(positions[-1]))
