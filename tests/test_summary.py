"""The table of seed B, character by character, and the same table for other models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vgg_fast.container.sequential import FusedSequential
from vgg_fast.models import VGG, VggNet, cfgs, make_layers, vgg16_bn, vggnet
from vgg_fast.models.summary import summary

# What the seed prints. It stops in the middle of the table, and lacks the line of "=" that Keras has under the header.
SEED = """\
Model: "model"
_________________________________________________________________
 Layer (type)                Output Shape              Param #   
 input_1 (InputLayer)        [(None, 224, 224, 3)]     0         
                                                                 
 block1_conv1 (Conv2D)       (None, 224, 224, 64)      1792      
                                                                 
 block1_conv2 (Conv2D)       (None, 224, 224, 64)      36928     
                                                                 
 block1_pool (MaxPooling2D)  (None, 112, 112, 64)      0         
                                                                 
 block2_conv1 (Conv2D)       (None, 112, 112, 128)     73856     
                                                                 
 block2_conv2 (Conv2D)       (None, 112, 112, 128)     147584    
                                                                 
 block2_pool (MaxPooling2D)  (None, 56, 56, 128)       0     """

# The rest: name (type), shape, parameters.
REST = [
    ("block3_conv1 (Conv2D)", "(None, 56, 56, 256)", "295168"),
    ("block3_conv2 (Conv2D)", "(None, 56, 56, 256)", "590080"),
    ("block3_conv3 (Conv2D)", "(None, 56, 56, 256)", "590080"),
    ("block3_pool (MaxPooling2D)", "(None, 28, 28, 256)", "0"),
    ("block4_conv1 (Conv2D)", "(None, 28, 28, 512)", "1180160"),
    ("block4_conv2 (Conv2D)", "(None, 28, 28, 512)", "2359808"),
    ("block4_conv3 (Conv2D)", "(None, 28, 28, 512)", "2359808"),
    ("block4_pool (MaxPooling2D)", "(None, 14, 14, 512)", "0"),
    ("block5_conv1 (Conv2D)", "(None, 14, 14, 512)", "2359808"),
    ("block5_conv2 (Conv2D)", "(None, 14, 14, 512)", "2359808"),
    ("block5_conv3 (Conv2D)", "(None, 14, 14, 512)", "2359808"),
    ("block5_pool (MaxPooling2D)", "(None, 7, 7, 512)", "0"),
    ("global_average_pooling2d (", "(None, 512)", "0"),
    ("GlobalAveragePooling2D)", "", ""),
    ("dropout (Dropout)", "(None, 512)", "0"),
    ("dense (Dense)", "(None, 120)", "61560"),
    ("dropout_1 (Dropout)", "(None, 120)", "0"),
    ("dense_1 (Dense)", "(None, 10)", "1210"),
]


def lines_of(model: nn.Module, *args: object, **kwargs: object) -> list[str]:
    lines: list[str] = []
    assert summary(model, *args, print_fn=lines.append, **kwargs) is None  # type: ignore[arg-type]
    return lines


def rows(lines: list[str]) -> list[tuple[str, str, str]]:
    """The cells of the 65-character table between the two double lines."""
    start, end = (i for i, line in enumerate(lines) if line.startswith("="))
    return [
        (line[:29].strip(), line[29:55].strip(), line[55:].strip()) for line in lines[start + 1 : end] if line.strip()
    ]


def test_the_seeds_table(capsys: pytest.CaptureFixture[str]) -> None:
    summary(vggnet(input_shape=(224, 224, 3), n_classes=10))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[3] == "=" * 65
    del lines[3]
    assert "\n".join(lines).startswith(SEED)


def test_the_rest_of_the_table_and_the_totals() -> None:
    lines = lines_of(vggnet())
    assert rows(lines)[7:] == REST
    assert lines[-5:] == [
        "=" * 65,
        "Total params: 14,777,458",
        "Trainable params: 14,777,458",
        "Non-trainable params: 0",
        "_" * 65,
    ]
    assert {len(line) for line in lines[3:-5]} == {65}


def test_frozen_layers_are_not_trainable() -> None:
    model = vggnet(n_classes=10)
    model.features.requires_grad_(False)
    assert lines_of(model)[-4:-1] == [
        "Total params: 14,777,458",
        "Trainable params: 62,770",
        "Non-trainable params: 14,714,688",
    ]


def test_other_sizes_and_open_sizes() -> None:
    table = rows(lines_of(vggnet(input_shape=(64, 48, 1), n_classes=2)))
    assert table[0] == ("input_1 (InputLayer)", "[(None, 64, 48, 1)]", "0")
    assert table[1] == ("block1_conv1 (Conv2D)", "(None, 64, 48, 64)", "640")
    assert ("block5_pool (MaxPooling2D)", "(None, 2, 1, 512)", "0") in table
    table = rows(lines_of(vggnet(input_shape=(None, 96, 3))))
    assert table[0][1] == "[(None, None, 96, 3)]"
    assert table[1][1] == "(None, None, 96, 64)"
    assert ("global_average_pooling2d (", "(None, 512)", "0") in table
    # The size can be given for this one table.
    assert rows(lines_of(vggnet(), (128, 128, 3)))[1][1] == "(None, 128, 128, 64)"


def test_family_and_batch_norm_as_keras_counts_it() -> None:
    with torch.device("meta"):
        model = vgg16_bn()
    text = "\n".join(lines_of(model))
    assert 'Model: "VGG"' in text
    assert "features.1 (BatchNormalization)   (None, 224, 224, 64)" in text  # no name is broken over two lines
    assert "avgpool (AdaptiveAvgPool2d)" in text
    assert "classifier.6 (Dense)" in text
    # Keras counts moving mean and variance, and does not train them: 2 * 4,224 channels.
    assert "Total params: 138,374,440" in text
    assert "Trainable params: 138,365,992" in text
    assert "Non-trainable params: 8,448" in text
    with torch.device("meta"):
        assert any("(None, 2048)" in line for line in lines_of(VggNet()))


def test_the_model_is_left_as_it_was() -> None:
    model = VGG(make_layers([4, "M", 512], batch_norm=True), num_classes=2, init_weights=False)
    model.features[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    lines_of(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_any_module_with_a_size() -> None:
    relu = nn.ReLU()
    model = FusedSequential(nn.Conv2d(3, 8, 3, padding=1), relu, nn.Conv2d(8, 8, 3, padding=1), relu, nn.MaxPool2d(2))
    table = rows(lines_of(model, (10, 12, 3)))
    assert table == [
        ("input_1 (InputLayer)", "[(None, 10, 12, 3)]", "0"),
        ("0 (Conv2D)", "(None, 10, 12, 8)", "224"),
        ("1 (ReLU)", "(None, 10, 12, 8)", "0"),  # shared: one row, as in Keras
        ("2 (Conv2D)", "(None, 10, 12, 8)", "584"),
        ("4 (MaxPooling2D)", "(None, 5, 6, 8)", "0"),
    ]
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert "Total params: 24" in lines_of(tied, (2, 4, 3))  # 16 once, and two biases


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"Sequential needs input_shape=\(height, width, channels\)"):
        summary(make_layers(cfgs["A"]))
    with pytest.raises(ValueError, match=r"got \(3, 224\)"):
        summary(vggnet(), (3, 224))
    with pytest.raises(ValueError, match=r"got \(224, 224, None\)"):
        summary(vggnet(), (224, 224, None))
