"""Weights of real Keras models give the same outputs here; other formats keep every bit; what does not fit is refused.

Keras 2 cannot be installed beside Keras 3: its legacy files are written with h5py, from the weights of a real model.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keras_models import h5py, keras, keras_base, keras_head, keras_seed_a, outputs, randomize, save, write_keras2

from vgg_fast import models
from vgg_fast.models.convert import convert, read_keras_state
from vgg_fast.models.keras_files import read_keras
from vgg_fast.models.summary import summary
from vgg_fast.models.weights import WeightsError, load_weights, read_weights, save_weights

# Keras' own calls of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FORMATS = (".keras", ".weights.h5", ".h5")


def assert_same_answers(path: Path, model: torch.nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    """The converted file in our model gives Keras' outputs to 1e-4 of the largest."""
    load_weights(model, path)
    with torch.no_grad():
        y = model.eval()(x)
    assert expected.std() > 1e-3, "the outputs say nothing about the weights"
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose files (60 MB a piece) are gone after the module; pytest keeps its own for three runs."""
    path = tmp_path_factory.mktemp("convert")
    yield path
    for file in path.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def seed_b() -> Any:
    inputs, x = keras_base((64, 64, 3))
    return randomize(keras.Model(inputs, keras_head(x, 10)))


@pytest.fixture(scope="module")
def files(seed_b: Any, folder: Path) -> dict[str, Path]:
    return {suffix: save(seed_b, folder, suffix) for suffix in FORMATS}


# Real Keras models


@pytest.mark.parametrize(
    ("suffix", "target"), [(".keras", "out.safetensors"), (".weights.h5", "out.pth"), (".h5", "out.pt")]
)
def test_seed_b(seed_b: Any, files: dict[str, Path], tmp_path: Path, suffix: str, target: str) -> None:
    report = convert(files[suffix], tmp_path / target)
    x, expected = outputs(seed_b, (64, 64, 3))
    assert_same_answers(tmp_path / target, models.vggnet((64, 64, 3), 10), x, expected)
    assert report.architecture == "vggnet"
    assert report.build == "vgg_fast.vggnet(input_shape=(None, None, 3), n_classes=10)"
    assert report.parameters == 14_777_458
    assert report.tensors == 30
    assert bool(report.notes) == (suffix == ".weights.h5")  # a bare weight file does not tell pools and activations
    assert os.listdir(tmp_path) == [target]
    (tmp_path / target).unlink()


def test_summary_has_keras_names_and_counts(seed_b: Any) -> None:
    text: list[str] = []
    summary(models.vggnet((64, 64, 3), 10), print_fn=text.append)
    for layer in seed_b.layers[1:]:
        name = layer.name if layer.name in "".join(text) else layer.name.rpartition("_")[0]  # Keras counts on: dense_3
        row = next(line for line in text if line.startswith(f" {name} ("))
        assert str(tuple(layer.output.shape)) in row
        assert row.split()[-1] == str(layer.count_params())


@pytest.mark.parametrize("suffix", FORMATS)
def test_nested_base_with_frozen_layers(tmp_path: Path, suffix: str) -> None:
    """Transfer learning as everybody does it. A legacy file stores the trainable block 5 before the frozen blocks."""
    inputs, x = keras_base((32, 32, 3))
    base = keras.Model(inputs, x, name="vgg16")
    for layer in base.layers:
        layer.trainable = layer.name.startswith("block5")
    inputs = keras.Input((32, 32, 3))
    model = randomize(keras.Model(inputs, keras_head(base(inputs), 3)))
    source = save(model, tmp_path, suffix)
    convert(source, tmp_path / "out.pth")
    x, expected = outputs(model, (32, 32, 3))
    assert_same_answers(tmp_path / "out.pth", models.vggnet(n_classes=3), x, expected)
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])  # a legacy file lists the names in order
def test_layers_without_names_of_their_own(tmp_path: Path, suffix: str) -> None:
    """conv2d_10 comes after conv2d_9, not after conv2d_1; and a Sequential works like a functional model."""
    inputs, x = keras_base((32, 32, 1), named=False)
    base = keras.Model(inputs, x)
    layers = [keras.Input((32, 32, 1)), *base.layers[1:]]
    model = keras.Sequential([*layers, *keras.Model(inputs, keras_head(x, 4)).layers[-5:]])
    randomize(model)
    assert model.layers[0].name.startswith("conv2d")
    source = save(model, tmp_path, suffix)
    report = convert(source, tmp_path / "out.pth")
    assert report.build == "vgg_fast.vggnet(input_shape=(None, None, 1), n_classes=4)"
    x, expected = outputs(model, (32, 32, 1))
    assert_same_answers(tmp_path / "out.pth", models.vggnet((32, 32, 1), 4), x, expected)
    for file in tmp_path.iterdir():
        file.unlink()


def test_trained_model_without_softmax(tmp_path: Path) -> None:
    """fit() leaves an optimizer in the file; a model of logits is accepted with a note."""
    inputs, x = keras_base((32, 32, 3))
    model = randomize(keras.Model(inputs, keras_head(x, 2, softmax=False)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(2)
    model.fit(rng.normal(size=(2, 32, 32, 3)).astype("float32"), np.array([0, 1]), verbose=0)
    source = save(model, tmp_path, ".keras")
    report = convert(source, tmp_path / "out.safetensors")
    assert "model.logits(x)" in report.notes[0]
    ours = models.vggnet(n_classes=2, weights=tmp_path / "out.safetensors").eval()
    x, expected = outputs(model, (32, 32, 3))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_seed_a_with_batch_norm_and_flatten(tmp_path: Path) -> None:
    model = randomize(keras_seed_a(6, epsilon=2e-3))
    source = save(model, tmp_path, ".keras")
    report = convert(source, tmp_path / "out.safetensors")
    source.unlink()
    assert report.build == "vgg_fast.VggNet(num_classes=6)"
    assert "softmax" in report.notes[0]
    ours = models.VggNet(num_classes=6, init_weights=False, weights=tmp_path / "out.safetensors").eval()
    (tmp_path / "out.safetensors").unlink()
    x, expected = outputs(model, (224, 224, 3), images=1)
    with torch.no_grad():
        y = ours(x).softmax(1)
    assert expected.std() > 1e-2
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)


# Files as other versions write them


@pytest.mark.parametrize(
    ("nested", "whole", "chunked"),
    [(False, True, False), (True, True, False), (False, False, True), (True, False, False)],
    ids=["model", "nested-model", "weights-chunked", "nested-weights"],
)
def test_keras_2_files(seed_b: Any, tmp_path: Path, nested: bool, whole: bool, chunked: bool) -> None:
    source = tmp_path / "keras2.h5"
    write_keras2(source, seed_b, nested, whole, chunked)
    report = convert(source, tmp_path / "out.pth")
    assert report.source_format == "legacy weights (.h5)"
    x, expected = outputs(seed_b, (64, 64, 3))
    assert_same_answers(tmp_path / "out.pth", models.vggnet(n_classes=10), x, expected)
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.fixture
def layers_of_file(tmp_path: Path) -> Any:
    """Writes a tiny Keras 3 weight file from {path: (layer name, shapes)} and reads it back."""

    def write(entries: dict[str, tuple[str, list[tuple[int, ...]]]]) -> Any:
        path = tmp_path / "tiny.weights.h5"
        with h5py.File(path, "w") as file:
            for where, (name, shapes) in entries.items():
                group = file.create_group(f"{where}/vars")
                group.attrs["name"] = name
                for i, shape in enumerate(shapes):
                    group[str(i)] = np.zeros(shape, "float32")
        return read_keras(path)

    return write


def test_order_in_a_bare_weight_file(layers_of_file: Any) -> None:
    conv = [(3, 3, 4, 4), (4,)]
    numbers = [0, *range(2, 12), 1]
    file = layers_of_file({f"layers/conv2d{f'_{i}' if i else ''}": (f"c{i}", conv) for i in numbers})
    assert [layer.name for layer in file.layers] == [f"c{i}" for i in range(12)]
    # Blocks of their own: sequential_1/conv2d follows sequential/conv2d_1.
    file = layers_of_file(
        {f"layers/sequential{s}/layers/conv2d{c}": (f"c{s}{c}", conv) for s in ("_1", "") for c in ("_1", "")}
    )
    assert [layer.name for layer in file.layers] == ["c", "c_1", "c_1", "c_1_1"]
    # A Dropout of Keras 3 may hold the state of its generator, which is no weight.
    file = layers_of_file({"layers/conv2d": ("c", conv), "layers/dropout/seed_generator": ("s", [(2,)])})
    assert [layer.name for layer in file.layers] == ["c"]


def test_order_that_a_bare_weight_file_does_not_tell(layers_of_file: Any) -> None:
    conv = [(3, 3, 4, 4), (4,)]
    with pytest.raises(WeightsError, match=r"does not tell which of the two comes first: save the whole model"):
        layers_of_file({"layers/conv2d": ("a", conv), "layers/functional/layers/conv2d": ("b", conv)})
    with pytest.raises(WeightsError, match=r"block1_conv2, block1_conv1, which their names contradict"):
        layers_of_file({"layers/conv2d": ("block1_conv2", conv), "layers/conv2d_1": ("block1_conv1", conv)})
    with pytest.raises(WeightsError, match=r"layer 'n' .*\(4,\), \(4,\), \(4,\).*four vectors"):
        layers_of_file({"layers/batch_normalization": ("n", [(4,)] * 3)})


# What does not fit


def assert_refused(source: Path, message: str, target: str = "refused.pth") -> None:
    path = source.parent / target
    with pytest.raises(WeightsError, match=message):
        convert(source, path)
    assert not path.exists()
    assert not [p for p in source.parent.iterdir() if p.suffix == ".part"]


def edited(source: Path, target: Path, edit: Any) -> Path:
    """A ``.keras`` file with another configuration; ``edit`` gets the list of layers."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                edit(config["config"]["layers"])
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("layer", "setting", "value", "message"),
    [
        ("block3_conv2", "activation", "elu", r"found elu \('block3_conv2'\) where vggnet has relu"),
        ("block2_conv1", "padding", "valid", r"Conv2D\(padding='valid'\) \('block2_conv1'\) where vggnet has Conv2D"),
        ("block5_pool", "strides", [1, 1], r"MaxPooling2D\(strides=\[1, 1\]\)"),
        ("block1_conv1", "data_format", "channels_first", r"channels_first"),
    ],
)
def test_same_shapes_but_another_model(
    files: dict[str, Path], tmp_path: Path, layer: str, setting: str, value: Any, message: str
) -> None:
    def edit(layers: list[dict[str, Any]]) -> None:
        next(entry for entry in layers if entry["name"] == layer)["config"][setting] = value

    source = edited(files[".keras"], tmp_path / "other.keras", edit)
    assert_refused(source, message)
    source.unlink()


def test_a_layer_too_many(files: dict[str, Path], tmp_path: Path) -> None:
    def edit(layers: list[dict[str, Any]]) -> None:
        layers.insert(1, {"class_name": "Rescaling", "name": "r", "config": {"name": "r"}})

    source = edited(files[".keras"], tmp_path / "other.keras", edit)
    assert_refused(source, r"found Rescaling \('r'\) where vggnet has Conv2D")
    source.unlink()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_keras_file(files: dict[str, Path], tmp_path: Path, suffix: str, share: float) -> None:
    source = tmp_path / f"short{suffix}"
    content = files[suffix].read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    assert_refused(source, rf"short\{suffix}.*damaged or truncated")
    source.unlink()


def test_a_flipped_bit_in_a_keras_file(files: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "flipped.keras"
    content = bytearray(files[".keras"].read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    assert_refused(source, r"flipped\.keras.*CRC")
    source.unlink()


def test_files_of_other_models(tmp_path: Path) -> None:
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    for suffix in FORMATS:
        source = save(model, tmp_path, suffix)
        assert_refused(source, r"1 convolutions with \[8\] filters, 0 batch-norms, head 8 -> 2\. Known heads")
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["images"] = np.zeros(3)
    assert_refused(other, r"found the groups images where")
    assert_refused(tmp_path / "no.keras", "no such file")


def test_unknown_endings_and_existing_targets(tmp_path: Path) -> None:
    source = tmp_path / "a.pth"
    save_weights({"w": torch.ones(3)}, source)
    assert_refused(source, r"can write \.pth, \.pt, \.safetensors, not '\.h5'", "out.h5")
    with pytest.raises(WeightsError, match=r"can read \.keras, .*not '\.onnx'"):
        convert(tmp_path / "m.onnx", tmp_path / "out.pth")
    target = tmp_path / "b.safetensors"
    convert(source, target)
    before = target.read_bytes()
    save_weights({"w": torch.zeros(3)}, source, force=True)
    with pytest.raises(WeightsError, match=r"b\.safetensors exists.*force"):
        convert(source, target)
    assert target.read_bytes() == before
    convert(source, target, force=True)
    assert torch.equal(read_weights(target)["w"], torch.zeros(3))
    with pytest.raises(WeightsError, match="same file"):
        convert(source, source, force=True)


def test_without_h5py_the_message_names_the_extra(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # what Python does for a package that is not there
    with pytest.raises(ImportError, match=r"pip install vgg-fast\[keras\]"):
        convert(files[".h5"], tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


# Between the formats of PyTorch


@pytest.mark.parametrize(("first", "second"), [(".pth", ".safetensors"), (".safetensors", ".pt"), (".pt", ".pth")])
def test_other_formats_keep_every_bit(tmp_path: Path, first: str, second: str) -> None:
    state = {
        "half": torch.randn(3, 4).half(),
        "brain": torch.randn(5).bfloat16(),
        "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "last": torch.randn(2, 3, 3, 3).to(memory_format=torch.channels_last),
        "counter": torch.tensor(2**40),
        "empty": torch.empty(0, 3),
    }
    source, target = tmp_path / f"a{first}", tmp_path / f"b{second}"
    save_weights(state, source)
    report = convert(source, target)
    assert (report.architecture, report.build, report.tensors, report.parameters) == (None, None, 6, 12 + 5 + 4 + 54)
    result = read_weights(target)
    assert result.keys() == state.keys()
    for key, value in state.items():
        assert result[key].dtype == value.dtype
        assert result[key].shape == value.shape
        a, b = (t.contiguous().view(-1).view(torch.uint8) for t in (value, result[key]))
        assert torch.equal(a, b), key


def test_state_can_be_had_without_a_file(files: dict[str, Path]) -> None:
    keras_state = read_keras_state(files[".weights.h5"])
    with torch.device("meta"):
        model = models.vggnet(n_classes=10)
    assert list(keras_state.state) == list(model.state_dict())
    model.load_state_dict(keras_state.state, assign=True)
    assert model.dense_1.bias.shape == (10,)
