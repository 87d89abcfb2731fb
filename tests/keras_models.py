"""Real Keras models for the tests of the conversion: Keras runs on PyTorch (KERAS_BACKEND=torch)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="keras is not installed: no real Keras model to compare with")
h5py = pytest.importorskip("h5py", reason="h5py is not installed: Keras files cannot be read")

if keras.backend.backend() != "torch":
    pytest.skip(f"Keras runs on {keras.backend.backend()}, not on torch", allow_module_level=True)

CONVS = [f"block{b}_conv{i}" for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)]


def keras_base(shape: tuple[int, int, int], named: bool = True, activation: str = "relu") -> Any:
    """The seed's convolutions, as it writes them; returns (input, output)."""
    layers = keras.layers
    x = inputs = keras.Input(shape)
    for block, (count, filters) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], 1):
        for i in range(1, count + 1):
            name = f"block{block}_conv{i}" if named else None
            x = layers.Conv2D(filters, (3, 3), activation=activation, padding="same", name=name)(x)
        x = layers.MaxPooling2D((2, 2), strides=(2, 2), name=f"block{block}_pool" if named else None)(x)
    return inputs, x


def keras_head(x: Any, classes: int, softmax: bool = True) -> Any:
    layers = keras.layers
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Dense(units=120, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    return layers.Dense(units=classes, activation="softmax" if softmax else None)(x)


def randomize(model: Any) -> Any:
    """Biases and batch-norm vectors away from 0 and 1, kernels at a scale that keeps the activations of order 1."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        shape, name = variable.shape, variable.path.rpartition("/")[2]
        if name == "kernel":
            value = rng.standard_normal(shape, dtype="float32") * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
        elif name in ("gamma", "moving_variance"):
            # Small variances: there Keras' epsilon of 1e-3 weighs ten per cent, and one of 1e-5 would be noticed.
            value = rng.uniform(0.5, 1.5, shape) * (0.01 if name == "moving_variance" else 0.1)
        else:
            value = rng.normal(size=shape) * 0.1
        variable.assign(value.astype("float32"))
    return model


def save(model: Any, folder: Path, suffix: str, name: str = "model") -> Path:
    path = folder / f"{name}{suffix}"
    if suffix == ".weights.h5":
        model.save_weights(path)
    else:
        model.save(path)
    return path


def outputs(model: Any, size: tuple[int, int, int], images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in PyTorch's order, and what the Keras model says to them."""
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(images, *size)).astype("float32"))
    with torch.no_grad():
        y = model(x, training=False).detach().clone()
    return x.permute(0, 3, 1, 2), y


def keras_seed_a(classes: int, epsilon: float) -> Any:
    """Seed A written in Keras: batch-norm after each convolution, and a Flatten whose order differs from PyTorch's."""
    layers = keras.layers
    x = inputs = keras.Input((224, 224, 3))
    for count, filters in [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]:
        for _ in range(count):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=filters != 128)(x)
            x = layers.ReLU()(layers.BatchNormalization(epsilon=epsilon)(x))
        x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    for width in (2048, 1024):
        x = layers.Dropout(0.5)(layers.Dense(width, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(classes, activation="softmax")(x))


def write_keras2(path: Path, seed_b: Any, nested: bool, whole: bool, chunked: bool = False) -> None:
    """A legacy file as Keras 2 wrote it: names end in :0 and are bytes; ``whole`` is model.save, else save_weights."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole else file
        convs = [layer for layer in seed_b.layers if layer.name in CONVS]
        denses = [layer for layer in seed_b.layers if layer.name.startswith("dense")]
        groups = [("vgg16", convs)] if nested else [(layer.name, [layer]) for layer in convs]
        groups += [("dropout", []), *((layer.name, [layer]) for layer in denses)]
        names = [name.encode() for name, _ in groups]
        if chunked:
            root.attrs["layer_names0"], root.attrs["layer_names1"] = names[:5], names[5:]
        else:
            root.attrs["layer_names"] = names
        for name, layers in groups:
            group = root.create_group(name)
            # Frozen layers come last in the file of a nested base.
            ordered = layers[-3:] + layers[:-3] if nested else layers
            weights = [(f"{layer.name}/{w.path.rpartition('/')[2]}:0", w) for layer in ordered for w in layer.weights]
            group.attrs["weight_names"] = [weight_name.encode() for weight_name, _ in weights]
            for weight_name, weight in weights:
                group[weight_name] = weight.numpy()
