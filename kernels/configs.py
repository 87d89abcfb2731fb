"""Which tile a convolution is cut into, per GPU: data, and a pure function that picks from it.

This file does not import Triton, so that a machine without it can ask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Architecture", "Config", "config"]

FP32 = ("ieee", "tf32", "bf16x3")  # how products of fp32 tensors are made
PRECISIONS = ("fp16", "bf16", *FP32)


class Architecture(NamedTuple):
    """A GPU as far as the choice depends on it: compute capability (80, 90, ...) and number of multiprocessors."""

    sm: int
    multiprocessors: int


class Config(NamedTuple):
    """How a convolution is cut.

    Attributes:
        bm, bn, bk: pixels and output channels of a program, and the length of one step of its inner product.
        num_warps, num_stages: of a program, and of its load pipeline.
        split: programs that share the inner product of a tile.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    split: int = 1


class Machine(NamedTuple):
    """What a multiprocessor can do: the numbers by which tiles are compared.

    Attributes:
        tensor: dense 16-bit operations per clock; tf32 has half of them.
        fma: fp32 operations per clock on its other units.
        l2: bytes per clock that it gets from the L2 when all of them ask.
        mma: whether each warp reads the operands of its own part of a tile from shared memory, 128 bytes per clock.
    """

    tensor: int
    fma: int
    l2: int
    mma: bool


MACHINES = {  # tests/virtual_gpu/counters.py says where these are from; sm_89 is an RTX 4090, its L2 is a guess
    "sm_80": Machine(2048, 128, 47, mma=True),
    "sm_89": Machine(1024, 256, 24, mma=True),
    "sm_90": Machine(4096, 256, 39, mma=False),
    "sm_100": Machine(8192, 256, 39, mma=False),
}

# Clocks of a program that are no products: the first loads, the epilogue. Measured on no GPU; 1 to 2 microseconds.
_START = 1500

# The tiles that are compiled, the best first where the model below sees no difference. ptxas spills none of them, and
# sm_89 has 99 KiB of shared memory for a program. Wide ones need fewer bytes from the L2 for a product.
_SM80 = (
    Config(128, 128, 64, 4, 3),
    Config(128, 128, 64, 8, 3),
    Config(256, 64, 64, 8, 3),
    Config(128, 64, 64, 4, 3),
    Config(64, 128, 64, 4, 3),
    Config(64, 64, 64, 4, 3),
)
_SMALL = (
    Config(128, 128, 64, 8, 4),
    Config(256, 64, 64, 8, 4),
    Config(128, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
)
_TF32 = (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 3))
_BF16X3 = (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3))
_IEEE = (Config(64, 64, 32, 4, 3),)

TILES = {
    "sm_80": {"16 bits": _SM80, "tf32": _TF32, "bf16x3": _BF16X3, "ieee": _IEEE},
    "sm_89": {"16 bits": _SM80, "tf32": _TF32, "bf16x3": (Config(64, 64, 32, 8, 3),), "ieee": _IEEE},
    "sm_90": {
        "16 bits": (
            Config(128, 256, 64, 8, 4),
            Config(256, 128, 64, 8, 4),
            Config(512, 64, 64, 8, 3),
            *_SMALL,
        ),
        "tf32": (Config(128, 256, 32, 8, 4), *_TF32),
        "bf16x3": _BF16X3,
        "ieee": _IEEE,
    },
    "sm_100": {
        "16 bits": (Config(256, 128, 64, 8, 4), *_SMALL),
        "tf32": _TF32,
        "bf16x3": _BF16X3,
        "ieee": _IEEE,
    },
}

# Accumulators of a thread that leave registers for an epilogue which holds some of them twice: taps, sums of parts.
_LEAN = 64


def family(sm: int) -> str:
    """The architecture whose tiles a GPU takes: those with 99 KiB of shared memory for a program take sm_89's.

    Example:
        >>> family(80), family(86), family(103)
        ('sm_80', 'sm_89', 'sm_100')
    """
    if sm in (80, 87):
        return "sm_80"
    if sm in (90, 100, 103):
        return f"sm_{sm // 10 * 10}"
    return "sm_89"


@functools.lru_cache(maxsize=1024)
def config(
    precision: str,
    n: int,
    h: int,
    w: int,
    cin: int,
    cout: int,
    pool: bool,
    architecture: Architecture,
    tap: bool = False,
) -> Config:
    """The tile for a problem: the one whose slowest multiprocessor is done first, by :func:`clocks`.

    Args:
        precision: fp16, bf16 or, for fp32 tensors, ieee, tf32 or bf16x3.
        n, h, w, cin, cout: of the convolution.
        pool, tap: whether the maximum of 2x2 pixels follows it, and the value before is wanted too.
        architecture: of the GPU.

    Raises:
        ValueError: for a precision that is none of these.

    Example:
        >>> config("fp16", 32, 56, 56, 256, 256, False, Architecture(80, 108))
        Config(bm=128, bn=128, bk=64, num_warps=4, num_stages=3, split=1)
        >>> config("fp16", 1, 14, 14, 512, 512, False, Architecture(80, 108)).split
        3
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    tiles = TILES[family(architecture.sm)]["16 bits" if precision in ("fp16", "bf16") else precision]
    rows = rows_of(n, h, w, pool, tap)
    candidates = [
        c
        for tile in dict.fromkeys(_fitted(tiles, precision, cin, cout))
        for split in range(1, 17)
        if is_lean(c := tile._replace(split=split)) or not (tap or split > 1)
        if split <= math.ceil(9 * cin / c.bk)
    ]
    return min(candidates, key=lambda c: clocks(c, precision, rows, cin, cout, architecture))


def rows_of(n: int, h: int, w: int, pool: bool, tap: bool) -> int:
    """Pixels that programs share out: with a pool those of whole windows, with a tap of windows that hang over too.

    Example:
        >>> rows_of(1, 5, 4, False, False), rows_of(1, 5, 4, True, False), rows_of(1, 5, 4, True, True)
        (20, 16, 24)
    """
    return n * ((h + tap) // 2) * ((w + tap) // 2) * 4 if pool else n * h * w


def is_lean(c: Config) -> bool:
    """Whether the epilogue of this tile has registers to spare."""
    return c.bm * c.bn <= _LEAN * 32 * c.num_warps


def _fitted(tiles: Sequence[Config], precision: str, cin: int, cout: int) -> Iterator[Config]:
    """The tiles that have no more channels than there are, with a step that divides them; where none does, the small
    ones with a step that runs through taps and channels, whose loads have a pointer per element."""
    channels = max(16, 1 << (cout - 1).bit_length())  # 16: the smallest operand of tl.dot
    ragged = cin % 16 != 0
    for tile in tiles:
        if tile.bn <= max(64, channels) and (tile.bm * tile.bn <= 128 * 64 or not ragged):
            if ragged:  # ieee: a step of 32 ragged products spills
                bk = 16 if precision == "ieee" or 9 * cin <= 16 else 32
            else:
                bk = max(bk for bk in (64, 32, 16) if bk <= tile.bk and cin % bk == 0)
            yield tile._replace(bn=min(tile.bn, channels), bk=bk)


def clocks(c: Config, precision: str, rows: int, cin: int, cout: int, architecture: Architecture) -> float:
    """What the multiprocessor with the most programs needs at least: a model, to compare tiles by."""
    machine = MACHINES[family(architecture.sm)]
    products = {"ieee": machine.fma, "tf32": machine.tensor / 2, "bf16x3": machine.tensor / 3}
    size = 4 if precision in FP32 else 2
    programs = math.ceil(rows / c.bm) * math.ceil(cout / c.bn) * c.split
    steps = math.ceil(math.ceil(9 * cin / c.bk) / c.split)
    multiply = 2 * c.bm * c.bn * c.bk / products.get(precision, machine.tensor)
    copied = (c.bm + c.bn) * c.bk * size
    read = min(c.num_warps // n * c.bm + n * c.bn for n in (1, 2, 4)) * c.bk * size if machine.mma else 0
    step = max(multiply, copied / machine.l2, (copied + read) / 128)
    add_up = (c.split + 1) * c.bm * c.bn * 4 / machine.l2 if c.split > 1 else 0
    return math.ceil(programs / architecture.multiprocessors) * (steps * step + _START + add_up)
