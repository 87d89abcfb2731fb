"""VGG-like convolution stacks in PyTorch, fused and fast, with the same answers."""

from vgg_fast import ops
from vgg_fast.selection import backends

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "ops"]
