"""Small kernels in PTX for tests: a frame around a few lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.virtual_gpu.launch import Entry, launch, ptx_entry

# Registers that every snippet finds: its thread, the addresses of x[thread] and out[thread], and of shared memory.
_FRAME = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry snippet(.param .u64 x_ptr, .param .u64 out_ptr)
.reqntid {threads}
{{
.reg .pred %p<32>;
.reg .b16 %h<64>;
.reg .b32 %r<256>;
.reg .b64 %rd<64>;
.reg .b32 %tid, %at, %warp;
.reg .b64 %x, %out, %step, %xs, %outs;
ld.param.u64 %xs, [x_ptr];
ld.param.u64 %outs, [out_ptr];
mov.u32 %tid, %tid.x;
shr.u32 %warp, %tid, 5;
mul.wide.u32 %step, %tid, {size};
add.u64 %x, %xs, %step;
add.u64 %out, %outs, %step;
mov.b32 %at, smem;
mad.lo.u32 %at, %tid, {size}, %at;
{body}
ret;
}}
"""


def snippet(body: str, threads: int = 64, size: int = 4) -> Entry:
    """An entry with these lines in the middle; ``size`` bytes of x and out belong to each thread."""
    return ptx_entry(_FRAME.format(body=body.strip(), threads=threads, size=size))


def run(body: str, x: Tensor | None = None, out: Tensor | None = None, threads: int = 64, **options: Any) -> Tensor:
    """Runs one CTA of it; x is 0, 1, 2 … unless given."""
    x = torch.arange(threads, dtype=torch.int32) if x is None else x
    out = torch.zeros_like(x) if out is None else out
    size = out.numel() * out.element_size() // threads
    options = {"outputs": ["argument 1"], "shared_bytes": 8192} | options
    launch(snippet(body, threads, size), (1,), [x, out], **options)
    return out
