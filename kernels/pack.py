"""Packed weights that keep themselves current on the device: no read-back, so that nothing waits and graphs replay it.

    one program:  a layer, one of its PARTS ranges of filters
                  hash of a sample of these filters' sources  ==  the hash stored when they were packed?  -> done
                  else pack these filters again, then store the hash

The sample holds all of every vector, and of the weights one element at least of every filter and, in each range, of
every input channel: every update of whole filters or channels changes it, as with ``vgg_fast::fingerprint`` on the CPU.

The salt stands for PyTorch's version counters, so that an edit of few elements that they do see is packed as well. A
hash is stored only when its filters are complete (release), and read before they count as such (acquire): launches on
several streams at worst pack the same values twice.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import current_stream, on_device, prepare

__all__ = ["PARTS", "Repacker", "Source"]

PARTS = 16  # ranges of filters per layer: 208 programs for VGG16, one or two on each multiprocessor
_BLOCK = 512
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# A row of the table, int64 each: the weight (address, dtype, four strides), five vectors (address or 0, dtype, stride),
# which are bias, mean, variance, weight and bias of batch norm; then Cout, Cin, the packed weight and the affine map
# (addresses), and the bits of eps.
_COLUMNS = 6 + 5 * 3 + 5

# Odd numbers of 63 random bits.
_MIX_1 = tl.constexpr(0x2545F4914F6CDD1D)
_MIX_2 = tl.constexpr(0x369DEA0F31A53F85)
_SALT = tl.constexpr(0x1E3779B97F4A7C15)


@triton.jit
def _mixed(bits, position):
    """64 bits that change altogether with any bit of a value (int64) or its position."""
    h = (bits + (position + 1) * _SALT).to(tl.uint64)
    h = (h ^ (h >> 33)) * _MIX_1
    h = (h ^ (h >> 29)) * _MIX_2
    return (h ^ (h >> 32)).to(tl.int64)


@triton.jit
def _bits(address, code, offset, mask):
    """Elements as they lie in memory, as int64."""
    if code == 0:
        bits = tl.load(address.to(tl.pointer_type(tl.int32)) + offset, mask=mask, other=0).to(tl.int64)
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + offset, mask=mask, other=0).to(tl.int64)
    return bits


@triton.jit
def _values(address, code, offset, mask):
    """Elements as fp32, which holds fp16 and bf16 exactly."""
    if code == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0.0)
    elif code == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _vector(row, j: tl.constexpr, co, mask, absent):
    """Elements ``co`` of a layer's j-th vector in fp32; ``absent`` where there is no such vector."""
    address = tl.load(row + 6 + 3 * j)
    value = tl.full(co.shape, absent, tl.float32)
    if address != 0:
        value = _values(address, tl.load(row + 7 + 3 * j), co * tl.load(row + 8 + 3 * j), mask)
    return value


@triton.jit
def _add(a, b):
    return a + b


@triton.jit(do_not_specialize=["salt"])
def _repack_kernel(
    table_ptr,  # [layers, COLUMNS] int64
    stored_ptr,  # [layers, PARTS] int64
    salt: tl.int64,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,  # of the packed weights, as in _CODES
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = table_ptr + program // PARTS * COLUMNS
    part = program % PARTS
    cout = tl.load(row + 21)
    cin = tl.load(row + 22)
    first = part * cout // PARTS
    count = (part + 1) * cout // PARTS - first
    weight = tl.load(row)
    code = tl.load(row + 1)
    s_co = tl.load(row + 2)
    s_ci = tl.load(row + 3)
    s_kh = tl.load(row + 4)
    s_kw = tl.load(row + 5)
    lane = tl.arange(0, BLOCK).to(tl.int64)

    hashes = tl.full((BLOCK,), 0, tl.int64)
    samples = tl.where(count == 0, 0, tl.maximum(count, cin))
    for start in range(0, samples, BLOCK):
        i = start + lane
        tap = i % 9
        offset = (first + i % count) * s_co + i % cin * s_ci + tap // 3 * s_kh + tap % 3 * s_kw
        hashes += tl.where(i < samples, _mixed(_bits(weight, code, offset, i < samples), i), 0)
    for start in range(0, count, BLOCK):
        i = start + lane
        for j in tl.static_range(5):
            address = tl.load(row + 6 + 3 * j)
            if address != 0:
                offset = (first + i) * tl.load(row + 8 + 3 * j)
                bits = _bits(address, tl.load(row + 7 + 3 * j), offset, i < count)
                hashes += tl.where(i < count, _mixed(bits, i + (j + 1) * 0x10000000), 0)
    fresh = (tl.reduce(hashes, 0, _add) ^ salt) | 1  # never the 0 that nothing packed is stored as
    if tl.atomic_or(stored_ptr + program, 0, sem="acquire", scope="gpu") == fresh:
        return

    eps = tl.load(row + 25).to(tl.float64, bitcast=True)
    packed = tl.load(row + 23)
    affine = tl.load(row + 24).to(tl.pointer_type(tl.float32))
    one = tl.arange(0, 1)
    for co in range(first, first + count):
        at = co + one
        here = at < cout
        # The arithmetic of vgg_fast.fold.batchnorm_affine, in its order.
        bias = _vector(row, 0, at, here, 0.0)
        if DTYPE == 1:
            bias = bias.to(tl.float16).to(tl.float32)  # autocast casts a convolution's bias
        elif DTYPE == 2:
            bias = bias.to(tl.bfloat16).to(tl.float32)
        shift = bias.to(tl.float64)
        scale = tl.full((1,), 1.0, tl.float64)
        if tl.load(row + 6 + 3) != 0:
            scale = 1.0 / tl.sqrt(_vector(row, 2, at, here, 1.0).to(tl.float64) + eps)
            scale = scale * _vector(row, 3, at, here, 1.0).to(tl.float64)
            shift = (shift - _vector(row, 1, at, here, 0.0).to(tl.float64)) * scale
            shift = shift + _vector(row, 4, at, here, 0.0).to(tl.float64)
        sign = tl.where(scale < 0, -1.0, tl.where(scale == 0, 0.0, 1.0)).to(tl.float32)
        magnitude = tl.where(scale == 0, 1.0, tl.abs(scale))
        tl.store(affine + at, magnitude.to(tl.float32))
        tl.store(affine + cout + at, shift.to(tl.float32))
        for start in range(0, 9 * cin, BLOCK):
            i = start + lane
            inside = i < 9 * cin
            tap = i // cin
            offset = co * s_co + i % cin * s_ci + tap // 3 * s_kh + tap % 3 * s_kw
            value = _values(weight, code, offset, inside) * sign
            target = co * 9 * cin + i
            if DTYPE == 0:
                tl.store(packed.to(tl.pointer_type(tl.float32)) + target, value, mask=inside)
            elif DTYPE == 1:
                tl.store(packed.to(tl.pointer_type(tl.float16)) + target, value.to(tl.float16), mask=inside)
            else:
                tl.store(packed.to(tl.pointer_type(tl.bfloat16)) + target, value.to(tl.bfloat16), mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(stored_ptr + program, fresh, sem="release", scope="gpu")


class Source(NamedTuple):
    """What a layer is packed from, and eps of its batch norm.

    Attributes:
        weight: ``[Cout, Cin, 3, 3]``, any strides.
        vectors: bias, then mean, variance, weight and bias of batch norm: ``[Cout]`` each, or None.
        eps: added to the variance.
    """

    weight: Tensor
    vectors: Sequence[Tensor | None]
    eps: float


class Repacker:
    """Packs the layers of a chain again where their sources have changed, in one launch.

    It knows the sources by address: whoever calls it has to see to it that they are still there.

    Args:
        sources: of the layers; fp32, fp16 or bf16.
        packed: per layer ``[Cout, 3, 3, Cin]``, as ``vgg_fast::pack`` makes it; of one dtype.
        affines: per layer fp32 ``[2, Cout]``.
        parts: ranges of filters per layer.

    Example (on a machine without a GPU: with ``TRITON_INTERPRET=1``):
        >>> weight, packed, affine = torch.ones(2, 4, 3, 3), torch.zeros(2, 3, 3, 4), torch.zeros(2, 2)
        >>> repack = Repacker([Source(weight, [None] * 5, 0.0)], [packed], [affine])
        >>> repack(salt=0)
        >>> bool((packed == 1).all()), affine.tolist()
        (True, [[1.0, 1.0], [0.0, 0.0]])
    """

    def __init__(
        self, sources: Sequence[Source], packed: Sequence[Tensor], affines: Sequence[Tensor], parts: int = PARTS
    ) -> None:
        self.device = packed[0].device
        rows = [_row(*layer) for layer in zip(sources, packed, affines, strict=True)]
        self.stored = torch.zeros((len(rows), parts), dtype=torch.int64, device=self.device)
        # The last, as it waits for the stream: other streams may use all of this from now on.
        self.table = torch.tensor(rows, dtype=torch.int64, device=self.device)
        options = {"PARTS": parts, "COLUMNS": _COLUMNS, "DTYPE": _CODES[packed[0].dtype], "BLOCK": _BLOCK}
        arguments: dict[str, torch.dtype | int | None] = {
            "table_ptr": torch.int64,
            "stored_ptr": torch.int64,
            "salt": 2**61,
        }
        with on_device(self.device):
            self._launch = prepare(_repack_kernel, (len(rows) * parts,), arguments, options)

    def __call__(self, salt: int) -> None:
        """Queues the launch on the current stream.

        Args:
            salt: packs everything again where it is not that of last time.
        """
        with on_device(self.device):
            self._launch(current_stream(self.device), self.table.data_ptr(), self.stored.data_ptr(), salt % 2**61)


def _row(source: Source, packed: Tensor, affine: Tensor) -> list[int]:
    weight = source.weight
    row = [weight.data_ptr(), _CODES[weight.dtype], *weight.stride()]
    for vector in source.vectors:
        row += [0, 0, 0] if vector is None else [vector.data_ptr(), _CODES[vector.dtype], vector.stride(0)]
    row += [weight.shape[0], weight.shape[1], packed.data_ptr(), affine.data_ptr()]
    return [*row, *struct.unpack("<q", struct.pack("<d", source.eps))]
