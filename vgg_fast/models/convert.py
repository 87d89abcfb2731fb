"""Weight files from one format into another: Keras to PyTorch, ``.pth`` to safetensors and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from vgg_fast import models
from vgg_fast.models.keras_files import SUFFIXES as KERAS_SUFFIXES
from vgg_fast.models.keras_files import KerasFile, KerasLayer, read_keras
from vgg_fast.models.weights import SUFFIXES, WeightsError, check_state, read_weights, refuse_overwrite, save_weights

# Keras' default; a bare weight file does not say which one the model had.
KERAS_EPSILON = 1e-3


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did.

    Attributes:
        source, target: the files.
        source_format: the layout that was found, in words.
        architecture: the builder whose ``load_state_dict`` takes the result, such as ``"vggnet"``; None where tensors
            were only copied from one container to another.
        build: the call that makes the fitting model, such as ``"vgg_fast.vggnet(n_classes=10)"``; None as above.
        tensors: how many were written.
        parameters: numbers in them, batch-norm statistics included.
        notes: what a user should know, one sentence each.
    """

    source: Path
    target: Path
    source_format: str
    architecture: str | None
    build: str | None
    tensors: int
    parameters: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class KerasState:
    """A Keras model's weights under PyTorch's names, and the model they belong to."""

    state: dict[str, Tensor]
    source_format: str
    architecture: str
    build: str
    notes: tuple[str, ...]


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, force: bool = False) -> ConversionReport:
    """Convert a weight file; the formats follow from the names.

    Args:
        source: ``.keras``, ``.weights.h5``, legacy ``.h5``/``.hdf5``, ``.pth``, ``.pt`` or ``.safetensors``.
        target: ``.pth``, ``.pt`` or ``.safetensors``; written completely or not at all.
        force: replace an existing target.

    Raises:
        WeightsError: the source is missing, damaged or of an unknown architecture; the target exists and ``force`` is
            False.
        ImportError: a Keras file, and h5py is not installed (``pip install vgg-fast[keras]``).

    Example:
        >>> import tempfile; folder = tempfile.mkdtemp(); save_weights(nn.Linear(2, 3), folder + "/a.pth")
        >>> convert(folder + "/a.pth", folder + "/a.safetensors").parameters
        9
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if target.suffix.lower() not in SUFFIXES:
        raise WeightsError(
            f"{target}: can write {', '.join(SUFFIXES)}, not {target.suffix or 'a name without ending'!r}"
        )
    # Before the work, so that nobody waits for a refusal.
    refuse_overwrite(target, force)
    if target.exists() and source.exists() and target.samefile(source):
        raise WeightsError(f"{source}: source and target are the same file")
    architecture = build = None
    notes: tuple[str, ...] = ()
    if source.suffix.lower() in KERAS_SUFFIXES:
        keras = read_keras_state(source)
        state, source_format = keras.state, keras.source_format
        architecture, build, notes = keras.architecture, keras.build, keras.notes
    elif source.suffix.lower() in SUFFIXES:
        state, source_format = read_weights(source), source.suffix.lower()
    else:
        known = ", ".join((*KERAS_SUFFIXES, *SUFFIXES))
        raise WeightsError(f"{source}: can read {known}, not {source.suffix or 'a name without ending'!r}")
    save_weights(state, target, force=force)
    count = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    return ConversionReport(source, target, source_format, architecture, build, len(state), count, notes)


def read_keras_state(path: str | os.PathLike[str]) -> KerasState:
    """Read a Keras file of an architecture this package has, as a state_dict of its PyTorch model.

    Known are seed B (``vggnet``), seed A (``VggNet``), and VGG-11 to 19 with the paper's head, Keras Applications'
    VGG16 and VGG19 among them. The convolutions may lie in a nested base.

    * Convolutions are transposed from (H, W, Cin, Cout), dense layers from (in, out); the first dense layer behind a
      Flatten is permuted from Keras' (H, W, C) order of its inputs to PyTorch's (C, H, W).
    * Keras' batch-norm has epsilon 1e-3 and PyTorch's 1e-5: the difference goes into ``running_var``, so that the
      outputs agree.

    Raises:
        WeightsError: the file is damaged, or its layers are those of another model; says where they differ.
        ImportError: h5py is not installed.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    file = read_keras(path)
    convs, norms, denses = ([layer for layer in file.layers if layer.kind == kind] for kind in ("conv", "bn", "dense"))
    architecture, build, model = _architecture(path, convs, norms, denses)
    notes = _check_structure(path, file, architecture)
    if norms and any(layer.epsilon is None for layer in norms):
        notes.append(f"the file does not say the batch-norms' epsilon: took Keras' default {KERAS_EPSILON}")

    state: dict[str, Tensor] = {}
    modules = list(model.named_modules())
    for kind, layers in ((nn.Conv2d, convs), (nn.BatchNorm2d, norms), (nn.Linear, denses)):
        names = [(name, module) for name, module in modules if isinstance(module, kind)]
        for (name, module), layer in zip(names, layers, strict=True):
            state.update(_tensors(name, module, layer, flattened=layer is denses[0] and architecture != "vggnet"))
    # In the order of the model, so that the file reads like one that PyTorch has written.
    state = {key: state[key] for key in model.state_dict()}
    check_state(model.state_dict(), state, str(path))
    return KerasState(state, file.format, architecture, build, tuple(notes))


def _architecture(
    path: Path, convs: list[KerasLayer], norms: list[KerasLayer], denses: list[KerasLayer]
) -> tuple[str, str, nn.Module]:
    """Name, building call and model (on the meta device) whose layers have these shapes.

    Raises:
        WeightsError: there is none; names what was found.
    """
    kernels = [layer.arrays["kernel"].shape for layer in convs]
    heads = [layer.arrays["kernel"].shape for layer in denses]
    channels = kernels[0][2] if kernels else 3
    filters = [shape[3] for shape in kernels]
    letter = next((k for k, cfg in models.cfgs.items() if [e for e in cfg if e != "M"] == filters), None)
    chained = kernels == [(3, 3, cin, cout) for cin, cout in zip([channels, *filters], filters, strict=False)]
    widths = tuple(shape[0] for shape in heads) + tuple(shape[1] for shape in heads[-1:])
    chained = chained and all(a[1] == b[0] for a, b in pairwise(heads))
    norm_ok = not norms or [layer.arrays["gamma"].shape[0] for layer in norms] == filters
    if letter and chained and norm_ok and len(widths) >= 3:
        classes = widths[-1]
        build: Callable[[], nn.Module] | None = None
        if letter == "D" and not norms and widths[:-1] == (512, 120):
            shape = (None, None, channels)
            build, call = lambda: models.vggnet(shape, classes), f"vggnet(input_shape={shape}, n_classes={classes})"
        elif letter == "D" and norms and channels == 3 and widths[:-1] == (25088, 2048, 1024):
            build, call = lambda: models.VggNet(classes), f"VggNet(num_classes={classes})"
        elif channels == 3 and widths[:-1] == (25088, 4096, 4096):
            name = next(k for k, v in models.ARCHITECTURES.items() if v == (letter, bool(norms)))
            build, call = lambda: getattr(models, name)(num_classes=classes), f"{name}(num_classes={classes})"
        if build is not None:
            with torch.device("meta"):
                return call.partition("(")[0], f"vgg_fast.{call}", build()
    head = " -> ".join(map(str, widths)) or "no dense layer"
    raise WeightsError(
        f"{path}: no VGG of this package has these layers: {len(convs)} convolutions with {filters} filters"
        f"{'' if chained else ' (not 3x3 or not in a chain)'}, {len(norms)} batch-norms, head {head}. Known heads: "
        "512 -> 120 -> classes (vggnet), 25088 -> 2048 -> 1024 -> classes (VggNet, with batch-norm), "
        "25088 -> 4096 -> 4096 -> classes (vgg11 … vgg19_bn)"
    )


def _check_structure(path: Path, file: KerasFile, architecture: str) -> list[str]:
    """Compare the layers between the weights with the architecture's; returns notes.

    Raises:
        WeightsError: at the first layer that differs.
    """
    if file.structure is None:
        return ["the file holds weights alone: pools, activations and strides could not be compared"]
    # "Conv2D+relu" and "Conv2D" followed by "relu" are the same thing.
    found = [(part, name) for text, name in file.structure for part in text.split("+")]
    letter, batch_norm = models.ARCHITECTURES.get(architecture, ("D", architecture == "VggNet"))
    expected: list[str] = []
    for entry in models.cfgs[letter]:
        norm = ["BatchNormalization"] if batch_norm else []
        expected += ["MaxPooling2D"] if entry == "M" else ["Conv2D", *norm, "relu"]
    if architecture == "vggnet":
        expected += ["GlobalAveragePooling2D", "Dense", "relu", "Dense"]
    else:
        expected += ["Flatten", "Dense", "relu", "Dense", "relu", "Dense"]
    parts = [part for part, _ in found]
    softmax = parts[len(expected) :] == ["softmax"]
    if softmax:
        parts.pop()
    if parts != expected:
        i = next(
            (i for i, (a, b) in enumerate(zip(parts, expected, strict=False)) if a != b), min(len(parts), len(expected))
        )
        here = f"{parts[i]} ({found[i][1]!r})" if i < len(parts) else "the end of the model"
        wanted = expected[i] if i < len(expected) else "the end (or a softmax)"
        raise WeightsError(
            f"{path}: the weights have the shapes of {architecture}, but the model differs: found {here} where "
            f"{architecture} has {wanted}"
        )
    if softmax and architecture != "vggnet":
        return [f"the Keras model ends in a softmax, {architecture} in logits: apply torch.softmax(y, 1) to compare"]
    if not softmax and architecture == "vggnet":
        return ["the Keras model ends in logits, vggnet in a softmax: model.logits(x) gives the Keras model's output"]
    return []


def _tensors(name: str, module: nn.Module, layer: KerasLayer, flattened: bool) -> dict[str, Tensor]:
    """One layer's entries of the state_dict."""
    arrays = {role: torch.from_numpy(array) for role, array in layer.arrays.items()}
    if isinstance(module, nn.BatchNorm2d):
        epsilon = KERAS_EPSILON if layer.epsilon is None else layer.epsilon
        variance = arrays["moving_variance"].double() + (epsilon - module.eps)
        return {
            f"{name}.weight": arrays["gamma"],
            f"{name}.bias": arrays["beta"],
            f"{name}.running_mean": arrays["moving_mean"],
            f"{name}.running_var": variance.to(arrays["moving_variance"].dtype),
            f"{name}.num_batches_tracked": torch.tensor(0),
        }
    kernel = arrays["kernel"]
    if isinstance(module, nn.Conv2d):
        kernel = kernel.permute(3, 2, 0, 1)  # (kh, kw, cin, cout) -> (cout, cin, kh, kw)
    elif flattened:
        side, outputs = 7, kernel.shape[1]
        kernel = kernel.reshape(side, side, -1, outputs).permute(3, 2, 0, 1).reshape(outputs, -1)
    else:
        kernel = kernel.T
    bias = arrays.get("bias", torch.zeros(kernel.shape[0], dtype=kernel.dtype))  # absent with use_bias=False
    return {f"{name}.weight": kernel.contiguous(), f"{name}.bias": bias}
