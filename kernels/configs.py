"""Which tile a convolution is cut into, per GPU: data, and a pure function that picks from it.

This file does not import Triton, so that a machine without it can ask.
"""

from __future__ import annotations

import functools
import math
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
        tensor: dense 16-bit operations per clock, tf32 has half of them; ``fma``: fp32 operations on its other units.
        l2: bytes per clock that it gets from the L2 when all of them ask.
    """

    tensor: int
    fma: int
    l2: int


MACHINES = {  # tests/virtual_gpu/counters.py says where these are from
    "sm_80": Machine(2048, 128, 47),
    "sm_89": Machine(1024, 256, 24),
    "sm_90": Machine(4096, 256, 39),
    "sm_100": Machine(8192, 256, 39),
}

_START = 1500  # clocks from the start of a program to its first product, and from its last one to its end

_SMALL = (Config(128, 64, 64, 4, 3), Config(64, 64, 64, 4, 3))
FORMS_16BIT = {
    "sm_80": (Config(128, 128, 64, 4, 3), *_SMALL),
    "sm_89": (Config(128, 128, 64, 4, 3), *_SMALL),
    "sm_90": (Config(128, 256, 64, 8, 3), Config(256, 128, 64, 8, 3), Config(128, 128, 64, 8, 3), *_SMALL),
    "sm_100": (Config(128, 128, 64, 8, 3), *_SMALL),
}
FORMS_FP32 = (Config(64, 64, 32, 4, 3),)


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
    precision: str, n: int, h: int, w: int, cin: int, cout: int, pool: bool, architecture: Architecture
) -> Config:
    """The tile for a problem: the one whose slowest multiprocessor is done first, by :func:`clocks`.

    Args:
        precision: fp16, bf16 or, for fp32 tensors, ieee, tf32 or bf16x3.
        n, h, w, cin, cout: of the convolution.
        pool: whether the maximum of 2x2 pixels follows it.
        architecture: of the GPU.

    Raises:
        ValueError: for a precision that is none of these.

    Example:
        >>> config("fp16", 32, 56, 56, 256, 256, False, Architecture(80, 108))
        Config(bm=128, bn=128, bk=64, num_warps=4, num_stages=3, split=1)
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    forms = FORMS_FP32 if precision in FP32 else FORMS_16BIT[family(architecture.sm)]
    fitted = dict.fromkeys(_fitted(form, cin, cout) for form in forms)
    rows = n * (h // 2) * (w // 2) * 4 if pool else n * h * w
    candidates = [
        form._replace(split=split) for form in fitted for split in range(1, 17) if split <= math.ceil(9 * cin / form.bk)
    ]
    return min(candidates, key=lambda c: clocks(c, precision, rows, cin, cout, architecture))


def _fitted(form: Config, cin: int, cout: int) -> Config:
    """No more channels than there are; a step that divides them, else one that runs through taps and channels."""
    bn = min(form.bn, max(16, 1 << (cout - 1).bit_length()))
    bk = next((bk for bk in (64, 32, 16) if bk <= form.bk and cin % bk == 0), 32)
    return form._replace(bn=bn, bk=bk)


def clocks(c: Config, precision: str, rows: int, cin: int, cout: int, architecture: Architecture) -> float:
    """What the multiprocessor with the most programs needs at least: a model, to compare tiles by."""
    machine = MACHINES[family(architecture.sm)]
    products = {"ieee": machine.fma, "tf32": machine.tensor / 2, "bf16x3": machine.tensor / 3}
    size = 4 if precision in FP32 else 2
    programs = math.ceil(rows / c.bm) * math.ceil(cout / c.bn) * c.split
    steps = math.ceil(math.ceil(9 * cin / c.bk) / c.split)
    multiply = 2 * c.bm * c.bn * c.bk / products.get(precision, machine.tensor)
    load = (c.bm + c.bn) * c.bk * size / machine.l2
    add_up = (c.split + 1) * c.bm * c.bn * 4 / machine.l2 if c.split > 1 else 0
    return math.ceil(programs / architecture.multiprocessors) * (steps * max(multiply, load) + _START + add_up)
