"""The VGG networks, and reading, writing and converting their weights."""

from vgg_fast.models.vgg import (
    ARCHITECTURES,
    VGG,
    KerasVGG,
    VggNet,
    cfgs,
    make_layers,
    vgg11,
    vgg11_bn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg19,
    vgg19_bn,
    vggnet,
)

__all__ = [
    "ARCHITECTURES",
    "VGG",
    "KerasVGG",
    "VggNet",
    "cfgs",
    "make_layers",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vggnet",
]
