"""When the children of a container must see for themselves, whatever chains they make: what goes on, and the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext

from vgg_fast.container import linear_chains
from vgg_fast.container.chains import Chain, LinearChain

_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def _replaceable() -> tuple[Any, ...]:
    """What profilers and patches replace for all modules at once."""
    return (
        nn.Module.__call__,
        nn.Conv2d.forward,
        nn.Conv2d._conv_forward,
        nn.BatchNorm2d.forward,
        nn.ReLU.forward,
        nn.MaxPool2d.forward,
        nn.Linear.forward,
        nn.Dropout.forward,
        F.conv2d,
        F.batch_norm,
        F.relu,
        F.max_pool2d,
        F.linear,
        F.dropout,
    )


_ORIGINALS = _replaceable()


def context_reason() -> str | None:
    """Why nothing may be fused at this moment, whatever the input."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._len_torch_function_stack() and not _only_device_contexts():
        return "a TorchFunctionMode is active"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    if _replaceable() != _ORIGINALS:
        return "a class or function that the children use was replaced (monkeypatched)"
    return None


def _only_device_contexts() -> bool:
    # torch.set_default_device works through such a mode; it concerns the creation of tensors only.
    count = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(count))


def input_reason(x: Any, chain: Chain | LinearChain) -> str | None:
    """Why this input is left to the children of a chain."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain Tensor"
    if x.layout is not torch.strided or x.is_nested:
        return f"the input's layout is not dense ({x.layout}, nested={x.is_nested})"
    if isinstance(chain, LinearChain):
        return linear_chains.input_reason(x)
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, fused: 4"
    _, channels, height, width = x.shape
    if not x.numel():
        return f"the input is empty: {tuple(x.shape)}"
    if not (height >> chain.pools and width >> chain.pools):
        return f"{height}x{width} is too small for {chain.pools} pools"
    if channels == height == width == 1:
        return "a 1x1 map of one channel is not worth it"  # and its strides do not tell its memory format
    return None
