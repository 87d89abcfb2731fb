"""Tensor memory access: which bytes a ``cp.async.bulk.tensor`` moves, as lists of addresses.

A :class:`TensorMap` stands for the opaque 128 bytes that cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col make. All
tuples are innermost dimension first, as in those functions and in the instruction's coordinates.
PTX ISA 9.2, 5.5 "Tensors" and 9.7.9.27.1; limits from the CUDA driver API, "Tensor Map Object Management".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .tensor import Addresses, swizzle

MAX_BOX = 256  # elements in each dimension


@dataclass(frozen=True)
class Im2col:
    """The im2col mode's own fields; corners are (w,), (w, h) or (w, h, d), the channels and the batch have none.

    Pixels run along w, then h, d and n, through the box from ``lower_corner`` to ``size - 1 + upper_corner``.
    """

    lower_corner: tuple[int, ...]
    upper_corner: tuple[int, ...]
    channels_per_pixel: int
    pixels_per_column: int


@dataclass(frozen=True)
class TensorMap:
    """A tensor in global memory and the box that one instruction moves.

    Args:
        address: of the first element, a multiple of 16.
        element_bytes: 1, 2, 4 or 8.
        sizes: elements in each of 1 to 5 dimensions.
        strides: bytes, of every dimension but the innermost, multiples of 16.
        box: elements in each dimension, at most 256; () with ``im2col``.
        steps: every how many-th element of the box is moved; () for all.
        swizzle: 0, 32, 64 or 128 bytes; the box's rows may then be no longer than that.
        im2col: the fields of that mode; None for the tiled one.

    Raises:
        ValueError: for what the driver would refuse, naming value and limit.

    Example:
        >>> TensorMap(0x1000, 2, sizes=(64, 100), strides=(128,), box=(64, 128)).bytes
        16384
    """

    address: int
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    swizzle: int = 0
    im2col: Im2col | None = None

    def __post_init__(self) -> None:
        rank, mode = len(self.sizes), "im2col" if self.im2col else "tiled"
        if len(self.box) != (0 if self.im2col else rank) or len(self.steps) not in (0, len(self.box)):
            raise ValueError(
                f"tensor map: has box {self.box} and steps {self.steps} for {rank} dimensions in {mode} mode; expected "
                "one entry per dimension, in im2col mode none"
            )
        inner = self.shape[0] * self.element_bytes
        wrong = {
            f"{rank} dimensions; 3 to 5 in im2col mode, else 1 to 5": not (3 if self.im2col else 1) <= rank <= 5,
            f"{len(self.strides)} strides; one less than dimensions": len(self.strides) != rank - 1,
            f"address {self.address:#x}; a multiple of 16": self.address % 16 != 0,
            f"strides {self.strides}; multiples of 16 bytes": any(s % 16 or s < 0 for s in self.strides),
            f"sizes {self.sizes}; at least 1": min(self.sizes) < 1,
            f"box {self.shape}; 1 to {MAX_BOX} elements": not 1 <= min(self.shape) <= max(self.shape) <= MAX_BOX,
            f"rows of {inner} bytes; a multiple of 16": inner % 16 != 0,
            f"rows of {inner} bytes under {self.swizzle}-byte swizzling; no longer": 0 < self.swizzle < inner,
            f"swizzle {self.swizzle}; 0, 32, 64 or 128 bytes": self.swizzle not in (0, 32, 64, 128),
        }
        if reasons := [reason for reason, holds in wrong.items() if holds]:
            raise ValueError("tensor map: has " + "; has ".join(reasons))

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements moved, as they lie in shared memory, innermost first."""
        if self.im2col:
            return self.im2col.channels_per_pixel, self.im2col.pixels_per_column
        steps = self.steps or (1,) * len(self.box)
        return tuple(-(-size // step) for size, step in zip(self.box, steps, strict=True))

    @property
    def bytes(self) -> int:
        """What the instruction adds to an mbarrier's transaction count, out-of-bounds elements included."""
        return int(np.prod(self.shape)) * self.element_bytes


class Copies(NamedTuple):
    """What to move between the two memories, for ``n`` instructions: units of ``unit`` bytes.

    Loads fill the units outside the tensor, stores leave them out; their global address means nothing.
    """

    unit: int
    global_address: Addresses  # [n, units]
    shared_address: Addresses  # [n, units]
    inside: NDArray[np.bool_]  # [n, units]


def copies(tensor: TensorMap, coordinates: Addresses, shared: Addresses, offsets: Addresses | None = None) -> Copies:
    """The bytes that ``n`` instructions move.

    Args:
        tensor: the map.
        coordinates: ``[n, rank]``, signed, innermost first.
        shared: ``[n]``, addresses of the box in shared memory.
        offsets: ``[n, rank - 2]``, in im2col mode only: what is added to w, h, d of every pixel.
    """
    n, rank = coordinates.shape
    if rank != len(tensor.sizes) or (offsets is not None) != (tensor.im2col is not None):
        raise ValueError(
            f"cp.async.bulk.tensor: {rank} coordinates and {'' if offsets is not None else 'no '}im2col offsets for a "
            f"map of {len(tensor.sizes)} dimensions in {'im2col' if tensor.im2col else 'tiled'} mode"
        )
    row_bytes, size = tensor.shape[0] * tensor.element_bytes, tensor.element_bytes
    # As large as possible, yet no unit lies across the tensor's edge, nor two units of the swizzle.
    unit = gcd(16, row_bytes, tensor.sizes[0] * size, *(coordinates[:, 0] * size).tolist())
    columns = np.arange(0, row_bytes, unit)
    rows = _im2col_rows(tensor, coordinates, offsets) if offsets is not None else _tiled_rows(tensor, coordinates)
    inner = coordinates[:, None, :1] * size + columns  # [n, 1, units in a row], bytes
    inside = np.all((rows >= 0) & (rows < np.array(tensor.sizes[1:])), axis=2, keepdims=True)
    inside = inside & (inner >= 0) & (inner < tensor.sizes[0] * size)
    outer = rows @ np.array(tensor.strides, dtype=np.int64)  # [n, rows]
    where = tensor.address + outer[:, :, None] + inner
    line = np.arange(rows.shape[1])[:, None] * row_bytes + columns
    target = swizzle(shared[:, None, None] + line, tensor.swizzle)
    return Copies(unit, where.reshape(n, -1), target.reshape(n, -1), inside.reshape(n, -1))


def _tiled_rows(tensor: TensorMap, coordinates: Addresses) -> Addresses:
    """Coordinates of the box's rows in all dimensions but the innermost: ``[n, rows, rank - 1]``."""
    steps = tensor.steps or (1,) * len(tensor.box)
    outer = tensor.shape[1:]
    grid = np.indices(outer[::-1]).reshape(len(outer), int(np.prod(outer)))[::-1].T  # the second dimension runs first
    return coordinates[:, None, 1:] + grid * np.array(steps[1:], dtype=np.int64)


def _im2col_rows(tensor: TensorMap, coordinates: Addresses, offsets: Addresses) -> Addresses:
    """Coordinates of the pixels (w, h, d, n; as many as there are): ``[n, pixels, rank - 1]`` (5.5.4)."""
    assert tensor.im2col is not None
    lower = np.array(tensor.im2col.lower_corner)
    extent = np.array(tensor.sizes[1:-1]) + tensor.im2col.upper_corner - lower
    start = coordinates[:, 1:-1] - lower
    if (extent < 1).any() or (start < 0).any() or (start >= extent).any():
        raise ValueError(
            f"cp.async.bulk.tensor: im2col coordinates {coordinates[:, 1:-1].tolist()} leave the box that begins at "
            f"{lower.tolist()} and has {extent.tolist()} pixels"
        )
    weight = np.concatenate([[1], np.cumprod(extent)])
    first = start @ weight[:-1] + coordinates[:, -1] * weight[-1]
    pixel = first[:, None] + np.arange(tensor.im2col.pixels_per_column)
    spatial = [pixel // weight[i] % extent[i] + lower[i] + offsets[:, i, None] for i in range(len(extent))]
    return np.stack([*spatial, pixel // weight[-1]], axis=2)
