"""VGG-like convolution stacks in PyTorch, fused and fast, with the same answers."""

# Functions whose module has their name are bound here at once: imported lazily, they would lose the name to the module.
from vgg_fast import ops
from vgg_fast.accelerate import accelerate, refresh, restore
from vgg_fast.container.sequential import FusedSequential
from vgg_fast.explain import explain
from vgg_fast.models import (
    VGG,
    KerasVGG,
    VggNet,
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
from vgg_fast.models.convert import ConversionReport, convert
from vgg_fast.models.summary import summary
from vgg_fast.models.weights import WeightsError, load_weights, save_weights
from vgg_fast.selection import backends

__version__ = "0.1.0"
__all__ = [
    "VGG",
    "ConversionReport",
    "FusedSequential",
    "KerasVGG",
    "VggNet",
    "WeightsError",
    "__version__",
    "accelerate",
    "backends",
    "convert",
    "explain",
    "load_weights",
    "ops",
    "refresh",
    "restore",
    "save_weights",
    "summary",
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
