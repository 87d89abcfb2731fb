"""Reading Keras' weight files with h5py alone: which layers with weights there are, in order, and what lies between.

Three layouts. ``.keras`` is a zip of ``config.json`` and ``model.weights.h5``; ``.weights.h5`` (Keras 3) numbers the
layers of each class within their container, ``layers/conv2d_10/vars/0``; the legacy ``.h5`` (Keras 1, 2, and 3 on
request) lists ``layer_names`` and per layer ``weight_names``. Where the file holds a configuration, it decides the
order and is compared with the architecture; a bare weight file has to be taken at the word of its names and shapes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vgg_fast.models.weights import WeightsError

SUFFIXES = (".keras", ".h5", ".hdf5")

_ROLES = {
    "conv": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "bn": ("gamma", "beta", "moving_mean", "moving_variance"),
}
_KINDS = {"Conv2D": "conv", "Dense": "dense", "BatchNormalization": "bn"}

# Without effect at inference, so an architecture may have them anywhere.
_TRANSPARENT = ("InputLayer", "Dropout", "SpatialDropout2D")


@dataclass(frozen=True)
class KerasLayer:
    """A layer with weights: ``kind`` is conv, dense or bn; ``arrays`` has Keras' names and Keras' axis order."""

    kind: str
    name: str
    path: str
    arrays: dict[str, np.ndarray]
    epsilon: float | None = None


@dataclass(frozen=True)
class KerasFile:
    """The layers with weights in order, and ``structure``: (description, name) of every layer, if the file says it."""

    format: str
    layers: list[KerasLayer]
    structure: list[tuple[str, str]] | None = None


@dataclass
class _ConfigLayer:
    class_name: str
    name: str
    path: str  # in a .weights.h5 file
    container: str  # the top-level name it lies under in a legacy file
    config: dict[str, Any] = field(repr=False)


def read_keras(path: Path) -> KerasFile:
    """Read a ``.keras``, ``.weights.h5`` or legacy ``.h5`` file.

    Raises:
        ImportError: h5py is not installed.
        WeightsError: damaged file, or a layout that is none of the three.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading Keras files needs h5py: pip install vgg-fast[keras]") from error
    try:
        if path.suffix.lower() == ".keras":
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
                # Read as a whole: that checks the CRC, which access through the zip would not.
                weights = io.BytesIO(archive.read("model.weights.h5"))
            with h5py.File(weights, "r") as file:
                return _read_keras3(file, list(_flatten(config)))
        with h5py.File(path, "r") as file:
            if "model_weights" in file or _attribute(file, "layer_names") is not None:
                return _read_legacy(file)
            if "layers" in file:
                return _read_keras3(file, None)
            groups = ", ".join(list(file)[:8]) or "nothing"
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # damaged files make h5py, zipfile and json raise nearly anything
        size = path.stat().st_size
        raise WeightsError(
            f"{path}: not a readable Keras file, damaged or truncated ({size} bytes): {error}"
        ) from error
    raise WeightsError(
        f"{path}: found the groups {groups} where a Keras 3 file has 'layers' and a legacy file 'model_weights' or the "
        "attribute 'layer_names': only functional and sequential models can be read"
    )


def _flatten(model: dict[str, Any], prefix: str = "", container: str = "") -> Iterator[_ConfigLayer]:
    """The layers of a functional or sequential configuration in order, those of nested models in their place."""
    config = model.get("config")
    layers = config.get("layers") if isinstance(config, dict) else config
    if not isinstance(layers, list):
        raise WeightsError(
            f"{model.get('class_name')} is not a functional or sequential model: its layers are not listed"
        )
    used: Counter[str] = Counter()
    for layer in layers:
        class_name = layer["class_name"]
        # Keras' own numbering: by class, within the container, whatever the layers are called.
        snake = re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", class_name).lower()
        number = used[snake]
        used[snake] += 1
        path = f"{prefix}layers/{snake}" + (f"_{number}" if number else "")
        # A nested Sequential of the first Keras versions has a bare list for its configuration.
        inner = layer["config"] if isinstance(layer["config"], dict) else {"layers": layer["config"]}
        name = inner.get("name", layer.get("name", snake))
        top = container or name
        if "layers" in inner:
            yield from _flatten(layer, path + "/", top)
        else:
            yield _ConfigLayer(class_name, name, path, top, inner)


def _read_keras3(file: Any, config: list[_ConfigLayer] | None) -> KerasFile:
    if config is None:
        found = list(_walk(file["layers"], "layers"))
        return KerasFile("Keras 3 weights (.weights.h5)", _sorted_by_number(found))
    layers = []
    for entry in config:
        if entry.class_name not in _KINDS:
            continue
        group = file[entry.path]["vars"]
        stored = group.attrs.get("name", entry.name)
        if stored != entry.name:
            raise WeightsError(f"{entry.path} holds the layer {stored!r}, the configuration has {entry.name!r} there")
        layers.append(
            _layer(entry.name, entry.path, _numbered(group), _KINDS[entry.class_name], entry.config.get("epsilon"))
        )
    return KerasFile("Keras 3 model (.keras)", layers, [_describe(entry) for entry in config if _matters(entry)])


def _numbered(group: Any) -> list[np.ndarray]:
    return [np.asarray(group[key]) for key in sorted(group, key=int)]


def _walk(group: Any, path: str) -> Iterator[KerasLayer]:
    """Every layer with floating-point weights below a container's ``layers``, in the file's (alphabetic) order."""
    for key, child in group.items():
        inner = f"{path}/{key}"
        if "layers" in child:
            yield from _walk(child["layers"], f"{inner}/layers")
        arrays = _numbered(child["vars"]) if "vars" in child else []
        # Integers are the state of random generators (Dropout), not weights.
        if any(np.issubdtype(array.dtype, np.floating) for array in arrays):
            yield _layer(child["vars"].attrs.get("name", key), inner, arrays)


def _layer(
    name: str, path: str, arrays: list[np.ndarray], kind: str | None = None, epsilon: float | None = None
) -> KerasLayer:
    """A layer from its variables in Keras 3's order; the kind, if unknown, from their number of axes."""
    axes = [array.ndim for array in arrays]
    by_axes = {(4,): "conv", (4, 1): "conv", (2,): "dense", (2, 1): "dense", (1, 1, 1, 1): "bn"}.get(tuple(axes))
    if by_axes is None or (kind is not None and kind != by_axes):
        shapes = ", ".join(str(array.shape) for array in arrays) or "none"
        raise WeightsError(
            f"layer {name!r} ({path}) has variables of shapes {shapes}: expected a convolution's or dense layer's "
            "kernel and bias, or the four vectors of a batch-norm with scale and center"
        )
    return KerasLayer(by_axes, name, path, dict(zip(_ROLES[by_axes], arrays, strict=False)), epsilon)


def _sorted_by_number(layers: list[KerasLayer]) -> list[KerasLayer]:
    """The order of the model, kind by kind, from numbers such as conv2d_10 (h5 lists that before conv2d_2).

    Raises:
        WeightsError: layers of one kind lie in containers whose order the file does not tell, or names contradict it.
    """
    result = []
    for kind in _ROLES:
        keyed = sorted((_number_key(layer.path), layer.name, layer) for layer in layers if layer.kind == kind)
        for (a, _, first), (b, _, second) in pairwise(keyed):
            stems = next(((x[0], y[0]) for x, y in zip(a, b, strict=False) if x != y), ("", ""))
            if stems[0] != stems[1]:
                raise WeightsError(
                    f"{first.path} and {second.path}: a bare weight file does not tell which of the two comes first: "
                    "save the whole model (.keras)"
                )
        ordered = [layer for _, _, layer in keyed]
        names = [layer.name for layer in ordered]
        if names != [layer.name for layer in _sorted_by_block(ordered)]:
            raise WeightsError(f"the layers lie in the order {', '.join(names)}, which their names contradict")
        result += ordered
    return result


def _number_key(path: str) -> tuple[tuple[str, int], ...]:
    parts = (re.fullmatch(r"(.*?)(?:_(\d+))?", part) for part in path.split("/"))
    return tuple((m.group(1), int(m.group(2) or 0)) for m in parts if m)


def _sorted_by_block(layers: list[KerasLayer]) -> list[KerasLayer]:
    """By block and number if every name is of the form block1_conv2; else as they are."""
    matches = [re.fullmatch(r"block(\d+)_(?:conv|bn)(\d+)", layer.name) for layer in layers]
    if layers and all(matches):
        keys = {layer.name: tuple(map(int, m.groups())) for layer, m in zip(layers, matches, strict=True) if m}
        return sorted(layers, key=lambda layer: keys[layer.name])
    return layers


def _sorted_by_name(layers: list[KerasLayer]) -> list[KerasLayer]:
    """By the numbers in the names, block1_conv2 or Keras' own conv2d_10; other names leave the order as it is."""
    automatic = r"(conv2d|batch_normalization|dense)(_\d+)?"
    if all(re.fullmatch(automatic, layer.name) for layer in layers):
        return sorted(layers, key=lambda layer: _number_key(layer.name))
    return _sorted_by_block(layers)


def _attribute(group: Any, name: str) -> list[str] | None:
    """A list of strings; Keras splits those over HDF5's 64 kB limit into name0, name1, …"""
    if name in group.attrs:
        values = list(group.attrs[name])
    elif f"{name}0" in group.attrs:
        chunks = (group.attrs[f"{name}{i}"] for i in range(len(group.attrs)) if f"{name}{i}" in group.attrs)
        values = [value for chunk in chunks for value in chunk]
    else:
        return None
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _read_legacy(file: Any) -> KerasFile:
    root = file.get("model_weights", file)
    layers: list[KerasLayer] = []
    for top in _attribute(root, "layer_names") or []:
        inner = list(_legacy_layers(root[top], top))
        # A base with some layers frozen stores the trainable ones first, so its order is no order.
        for kind in _ROLES:
            layers += _sorted_by_name([layer for layer in inner if layer.kind == kind])
    config = file.attrs.get("model_config")
    if config is None:
        return KerasFile("legacy weights (.h5)", layers)
    entries = list(_flatten(json.loads(config)))
    by_name = {(layer.path.split("/")[0], layer.name): layer for layer in layers}
    ordered = []
    for entry in entries:
        if entry.class_name not in _KINDS:
            continue
        layer = by_name.get((entry.container, entry.name))
        if layer is None or layer.kind != _KINDS[entry.class_name]:
            raise WeightsError(f"the configuration has a {entry.class_name} {entry.name!r}, the file no weights for it")
        ordered.append(KerasLayer(layer.kind, layer.name, layer.path, layer.arrays, entry.config.get("epsilon")))
    return KerasFile("legacy model (.h5)", ordered, [_describe(entry) for entry in entries if _matters(entry)])


def _legacy_layers(group: Any, top: str) -> Iterator[KerasLayer]:
    """The layers of one top-level group: one, or all of a nested base (block1_conv1/kernel:0, …)."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for weight_name in _attribute(group, "weight_names") or []:
        array = np.asarray(group[weight_name])
        if not np.issubdtype(array.dtype, np.floating):
            continue
        parts = weight_name.split("/")
        role = parts[-1].split(":")[0]  # Keras 2 adds :0
        name = parts[-2] if len(parts) > 1 else top
        found.setdefault(name, {})[role] = array
    for name, arrays in found.items():
        kind = next((k for k, roles in _ROLES.items() if set(arrays) <= set(roles)), None)
        roles = _ROLES["bn"] if kind == "bn" else _ROLES["conv"]
        if kind is None:
            raise WeightsError(f"layer {name!r} has the variables {', '.join(arrays)}, which is no layer of a VGG")
        yield _layer(name, f"{top}/{name}", [arrays[role] for role in roles if role in arrays])


def _matters(entry: _ConfigLayer) -> bool:
    linear = entry.class_name == "Activation" and entry.config.get("activation") == "linear"
    return entry.class_name not in _TRANSPARENT and not linear


# What a layer of a VGG has; other values are shown in the description and so make the comparison fail.
_USUAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "Conv2D": {
        "kernel_size": ([3, 3],),
        "strides": ([1, 1],),
        "padding": ("same",),
        "dilation_rate": ([1, 1],),
        "groups": (1,),
        "data_format": ("channels_last",),
    },
    "MaxPooling2D": {
        "pool_size": ([2, 2],),
        "strides": ([2, 2],),
        "padding": ("valid",),
        "data_format": ("channels_last",),
    },
    "BatchNormalization": {"axis": (-1, 3, [-1], [3])},
    "ReLU": {"max_value": (None,), "negative_slope": (0, None), "threshold": (0, None)},
    "GlobalAveragePooling2D": {"data_format": ("channels_last",), "keepdims": (False,)},
    "Flatten": {"data_format": ("channels_last",)},
    "Dense": {},
    "Softmax": {},
}


def _describe(entry: _ConfigLayer) -> tuple[str, str]:
    """``("Conv2D+relu", name)``; unusual settings as ``Conv2D(strides=[2, 2])+relu``."""
    config, kind = entry.config, entry.class_name
    if kind == "Activation":
        return str(config.get("activation")), entry.name
    usual = _USUAL.get(kind)
    if usual is None:
        return kind, entry.name
    odd = [f"{key}={config[key]!r}" for key, values in usual.items() if key in config and config[key] not in values]
    text = {"ReLU": "relu", "Softmax": "softmax"}.get(kind, kind) + (f"({', '.join(odd)})" if odd else "")
    activation = config.get("activation", "linear")
    return text + ("" if activation == "linear" else f"+{activation}"), entry.name
