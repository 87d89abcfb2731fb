"""The ops of the namespace ``vgg_fast``: one file per op with schema, fake, autograd and dispatch together.

Importing this package declares them and loads the compiled library, which brings the CPU implementations. Where that is
missing, and on GPUs, Python functions stand behind the same names.
"""

from vgg_fast import library
from vgg_fast.ops import (
    _cpu,
    batch_norm,
    conv3x3,
    conv3x3_input_grad,
    conv3x3_weight_grad,
    conv_stack,
    conv_stack_backward,
    fingerprint,
    linear,
    maxpool2x2,
    pack,
)

library.missing("_C")

for _op in (
    batch_norm,
    conv3x3,
    conv3x3_input_grad,
    conv3x3_weight_grad,
    conv_stack,
    conv_stack_backward,
    fingerprint,
    linear,
    maxpool2x2,
    pack,
):
    _op.register(["CUDA"] if library.missing("_C") is None else ["CUDA", "CPU"])

__all__ = [
    "_cpu",
    "batch_norm",
    "conv3x3",
    "conv3x3_input_grad",
    "conv3x3_weight_grad",
    "conv_stack",
    "conv_stack_backward",
    "fingerprint",
    "linear",
    "maxpool2x2",
    "pack",
]
