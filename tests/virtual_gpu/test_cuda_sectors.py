"""What issue 6 asks of every CUDA kernel for sm_80, in every dtype and with every epilogue: full sectors on each access
to global memory, and no more wavefronts of shared memory than its bytes fill. One table says where that is not so,
exactly, and why. (conv3x3_sm90 has its own: test_conv3x3_sm90.py.)
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.virtual_gpu import cases
from tests.virtual_gpu.cases import cuda_conv3x3
from tests.virtual_gpu.counters import Counters, Row
from tests.virtual_gpu.cuda_cases import block1, conv3x3_mma, maxpool2x2
from vgg_fast import testing

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SIXTEEN_BITS = (HALF, BFLOAT)

# A part of the line of source that the instructions come from, and why they miss.
WHY = {
    # Sectors.
    "packed(y, T())": "a pixel of 48 bytes ends in the middle of a sector, which the next pixel's store takes again",
    "static_cast<const T*>(from) + element": "elements one by one: 3 channels are no part of a sector, 28 columns of 2 "
    "bytes no packets; a GPU's L1 serves the neighbours, the model has none",
    "static_cast<T*>(to) + element": "the same",
    # Wavefronts, none of them in a main loop. 16 bytes are served to 8 lanes at a time.
    "scale[v][i] = from[": "lanes of all pixels share a channel's scale: 64 bytes, 8 lanes at a time; once to a thread",
    "shift[v][i] = from[": "the same",
    "scale[i / 8][i % 8] = ": "the same in block1's first convolution",
    "shift[i / 8][i % 8] = ": "the same",
    "b[j][l] = ": "block1's first weights lie as in memory, in 2-byte elements, and are read once",
    "x[l][i] = words[": "pixels of three rows in a load: what is left over of each, and the ninth pixels of all",
    "x[4][i] = ": "the same",
    "middle + ((4 * v + t)": "the last product of each kind has 2 pixels, in different quarters of a warp",
    "cp.async.cg": "some rows of a narrow image touch fewer sectors than others: their units do not fill rounds of 8",
    "pixel[c] = ": "padding, where there is some",
}

Misses = dict[str, tuple[int, int]]  # measured and ideal, of all instructions of a line; sectors or wavefronts


class Audit(NamedTuple):
    """``run(dtype, counters)``, and what misses, the same for all of ``dtypes``."""

    dtypes: tuple[torch.dtype, ...]
    run: Callable[[torch.dtype, Counters], object]
    sectors: Misses
    wavefronts: Misses


Run = Callable[[torch.dtype, Counters], object]


def inputs(dtype: torch.dtype, cin: int, cout: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = testing.conv_inputs(testing.Shape("", 1, cin, cout, size, size, ""), dtype, integers=True)
    return x.contiguous(memory_format=torch.channels_last), weight, torch.stack([torch.ones(cout), bias.float()])


def of_block1(cin: int, tap: bool, size: int = 32) -> Run:
    def run(dtype: torch.dtype, counters: Counters) -> object:
        x, first, affine = inputs(dtype, cin, 64, size)
        _, second, other = inputs(dtype, 64, 64, size)
        return block1(x, (first, second), (affine, other), out=tap, observer=counters)

    return run


def of_mma(tile: int, relu: bool, tap: bool, pool: bool, split: int = 1, cout: int = 128) -> Run:
    def run(dtype: torch.dtype, counters: Counters) -> object:
        x, weight, affine = inputs(dtype, 32, cout, 28)
        return conv3x3_mma(x, weight, affine, relu, tap, pool, "80", tile, split, observer=counters)

    return run


def of_plain(cin: int, relu: bool, pool: bool) -> Run:
    def run(dtype: torch.dtype, counters: Counters) -> object:
        x, weight, affine = inputs(dtype, cin, 64, 14)
        return cuda_conv3x3(x, weight.permute(0, 2, 3, 1).contiguous(), affine, relu, pool, observer=counters)

    return run


def of_pool(size: tuple[int, ...], memory_format: torch.memory_format, backward: bool) -> Run:
    def run(dtype: torch.dtype, counters: Counters) -> object:
        x = testing.random_tensor(*size, dtype=dtype).contiguous(memory_format=memory_format)
        grad = testing.random_tensor(*size[:2], size[2] // 2, size[3] // 2, dtype=dtype) if backward else None
        grad = None if grad is None else grad.contiguous(memory_format=memory_format)
        return maxpool2x2(x, grad, observer=counters)

    return run


LAST, PLANAR = torch.channels_last, torch.contiguous_format


def epilogue(ideal: int) -> Misses:
    return dict.fromkeys(("scale[v][i] = from[", "shift[v][i] = from["), (4 * ideal, ideal))


def first_layer(tiles: int, **others: tuple[int, int]) -> Misses:
    """block1's, of so many tiles; others: of the image's words and the weights, which depend on the channels."""
    affine = dict.fromkeys(("scale[i / 8][i % 8] = ", "shift[i / 8][i % 8] = "), (64 * tiles, 16 * tiles))
    middle = {"middle + ((4 * v + t)": (168 * tiles, 164 * tiles)}
    words = {"b[j][l] = ": others["weights"], "x[l][i] = words[": others["words"]}
    return epilogue(16 * tiles) | affine | middle | words


RGB = first_layer(4, weights=(2048, 1024), words=(928, 704))
EPILOGUES = {  # relu, tap, pool, split
    "none": (False, True, False, 1),
    "ReLU": (True, True, False, 1),
    "pool": (True, False, True, 1),
    "tap and pool": (True, True, True, 1),
    "pool, sums shared": (True, False, True, 2),
}
ELEMENTS = "static_cast<const T*>(from) + element"

AUDITS = {
    "block1, rgb, pool": Audit(SIXTEEN_BITS, of_block1(3, False), {}, RGB),
    "block1, rgb, tap and pool": Audit(SIXTEEN_BITS, of_block1(3, True), {}, RGB),
    "block1, rgb, rows of 1.9 sectors": Audit(
        SIXTEEN_BITS,
        of_block1(3, True, 10),
        {},
        first_layer(1, weights=(512, 256), words=(228, 176)) | {"cp.async.cg": (40, 25)},
    ),
    "block1, gray": Audit((HALF,), of_block1(1, False), {}, first_layer(4, weights=(1536, 768), words=(944, 704))),
    "block1, two channels": Audit(
        (HALF,),
        of_block1(2, False),
        {},
        first_layer(4, weights=(1792, 768), words=(1560, 704)) | {"pixel[c] = ": (160, 100)},
    ),
    "block1, four channels": Audit(
        (HALF,),
        of_block1(4, False),
        {},
        first_layer(4, weights=(4352, 1280), words=(1064, 704)) | {"x[4][i] = ": (368, 176)},
    ),
    **{
        f"conv3x3_mma, {dtype}, {name}": Audit((dtype,), of_mma(tile, *cut), {}, epilogue(ideal))
        for tile, (dtype, ideal) in enumerate([(HALF, 128), (BFLOAT, 112), (FLOAT, 128)])
        for name, cut in EPILOGUES.items()
    },
    "conv3x3_mma, 1.5 sectors to a pixel": Audit(
        (HALF,), of_mma(1, True, True, True, 1, 24), {"packed(y, T())": (329, 301)}, epilogue(56)
    ),
    "conv3x3": Audit((*SIXTEEN_BITS, FLOAT), of_plain(32, True, False), {}, {}),
    "conv3x3, no ReLU, pool": Audit((*SIXTEEN_BITS, FLOAT), of_plain(32, False, True), {}, {}),
    "conv3x3, rgb": Audit((FLOAT,), of_plain(3, True, False), {ELEMENTS: (27666, 4272)}, {}),
    **{
        f"maxpool2x2{' backward' * backward}, {name}": Audit(
            (*SIXTEEN_BITS, FLOAT), of_pool(size, memory_format, backward), {}, {}
        )
        for backward in (False, True)
        for name, size, memory_format in [
            ("channels", (2, 64, 14, 14), LAST),
            ("odd map", (1, 64, 15, 15), LAST),
            ("NCHW", (1, 3, 8, 224), PLANAR),
        ]
    },
    "maxpool2x2, NCHW, rows of 1.75 sectors": Audit(
        (HALF,), of_pool((1, 4, 28, 28), PLANAR, False), {ELEMENTS: (630, 196)}, {}
    ),
    "maxpool2x2 backward, NCHW, rows of 1.75 sectors": Audit(
        (HALF,),
        of_pool((1, 4, 28, 28), PLANAR, True),
        {ELEMENTS: (630, 196), "static_cast<T*>(to) + element": (630, 196)},
        {},
    ),
}


def missed(counters: Counters, count: str) -> Misses:
    """By the entry of WHY, or by a line that it does not know."""
    found: dict[str, Row] = {}
    for row in counters.rows.values():
        if getattr(row, count) != getattr(row, f"{count}_ideal"):
            assert row.source is not None
            text = linecache.getline(*row.source).strip()
            found.setdefault(next((part for part in WHY if part in text), text), Row()).add(row)
    return {text: (getattr(row, count), getattr(row, f"{count}_ideal")) for text, row in found.items()}


@pytest.mark.parametrize("name", AUDITS)
def test_every_miss_is_known(name: str) -> None:
    if cases.find_nvcc() is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    audit = AUDITS[name]
    for dtype in audit.dtypes:
        counters = Counters()
        audit.run(dtype, counters)
        assert counters.total.sectors > 0
        assert missed(counters, "sectors") == audit.sectors
        assert missed(counters, "wavefronts") == audit.wavefronts


def test_every_reason_is_needed() -> None:
    assert {part for audit in AUDITS.values() for part in audit.sectors | audit.wavefronts} == {*WHY}
