"""The ops of the namespace ``vgg_fast``: one file per op with schema, fake, autograd and dispatch together.

Importing this package declares them and loads the compiled library, which brings the CPU implementations. Where that is
missing, and on GPUs, Python functions stand behind the same names.
"""

# ruff: noqa: F401  (a module declares its ops when it is imported)
from vgg_fast import library
from vgg_fast.ops import (
    _cpu,
    _declare,
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

_declare.register_fallbacks(["CUDA"] if library.missing("_C") is None else ["CUDA", "CPU"])
