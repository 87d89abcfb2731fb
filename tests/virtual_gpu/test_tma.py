"""Tensor memory access against a scalar oracle: every element's place in both memories, by the rules of PTX ISA 5.5."""

from __future__ import annotations

import doctest
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.virtual_gpu import Mapped, launch, tma
from tests.virtual_gpu.snippets import snippet

Place = tuple[int, int | None]  # byte in shared memory, byte in global memory or None where out of bounds


def test_examples() -> None:
    assert doctest.testmod(tma).attempted > doctest.testmod(tma).failed == 0


def swizzled(address: int, width: int) -> int:
    """5.5.7: the 16-byte unit within a row of ``width`` bytes is exchanged by the number of the 128-byte line."""
    return address ^ (address >> 7 & (width // 16 - 1)) << 4 if width else address


def place(tensor: tma.TensorMap, index: tuple[int, ...]) -> int | None:
    if not all(0 <= i < size for i, size in zip(index, tensor.sizes, strict=True)):
        return None
    strides = (tensor.element_bytes, *tensor.strides)
    return tensor.address + sum(i * stride for i, stride in zip(index, strides, strict=True))


def tiled(tensor: tma.TensorMap, corner: tuple[int, ...], shared: int) -> set[Place]:
    steps = tensor.steps or (1,) * len(tensor.box)
    ranges = [range(0, size, step) for size, step in zip(tensor.box, steps, strict=True)]
    offsets = (tuple(reversed(o)) for o in itertools.product(*reversed(ranges)))  # the innermost dimension runs first
    return {
        (
            swizzled(shared + n * tensor.element_bytes, tensor.swizzle),
            place(tensor, tuple(c + o for c, o in zip(corner, offset, strict=True))),
        )
        for n, offset in enumerate(offsets)
    }


def im2col(tensor: tma.TensorMap, corner: tuple[int, ...], offsets: tuple[int, ...], shared: int) -> set[Place]:
    """5.5.4 for [N, H, W, C]: pixel after pixel along w, then h, then n, inside the box."""
    assert tensor.im2col is not None
    c, w, h, n = corner
    (low_w, low_h), (up_w, up_h) = tensor.im2col.lower_corner, tensor.im2col.upper_corner
    places = set()
    for pixel in range(tensor.im2col.pixels_per_column):
        for channel in range(tensor.im2col.channels_per_pixel):
            target = shared + (pixel * tensor.im2col.channels_per_pixel + channel) * tensor.element_bytes
            index = (c + channel, w + offsets[0], h + offsets[1], n)
            places.add((swizzled(target, tensor.swizzle), place(tensor, index)))
        w += 1
        if w > tensor.sizes[1] - 1 + up_w:
            w, h = low_w, h + 1
        if h > tensor.sizes[2] - 1 + up_h:
            h, n = low_h, n + 1
    return places


def elements(tensor: tma.TensorMap, copies: tma.Copies, n: int = 0) -> set[Place]:
    """The first bytes of all elements that the ``n``-th instruction moves."""
    per_unit = range(0, copies.unit, tensor.element_bytes)
    rows = zip(copies.shared_address[n], copies.global_address[n], copies.inside[n], strict=True)
    return {(int(s) + i, int(g) + i if inside else None) for s, g, inside in rows for i in per_unit}


IMAGE = tma.TensorMap(0x4000, 2, sizes=(64, 9, 7, 3), strides=(128, 9 * 128, 7 * 9 * 128 + 64), box=(32, 4, 3, 2))
TILED = {
    "1 dimension, past its end": (tma.TensorMap(0x100, 4, (100,), (), (64,)), (72,)),
    "2 dimensions, rows padded": (tma.TensorMap(0x100, 2, (40, 50), (96,), (16, 8)), (8, 3)),
    "a unit of 16 bytes would lie across the edge": (tma.TensorMap(0x100, 2, (37, 50), (80,), (16, 8)), (24, 3)),
    "an odd coordinate": (tma.TensorMap(0x100, 2, (40, 50), (96,), (16, 8)), (33, 3)),
    "128-byte swizzling": (tma.TensorMap(0x100, 2, (128, 50), (256,), (64, 20), swizzle=128), (64, 40)),
    "64-byte swizzling": (tma.TensorMap(0x100, 2, (128, 50), (256,), (32, 20), swizzle=64), (64, -3)),
    "32-byte swizzling": (tma.TensorMap(0x100, 1, (128, 50), (256,), (32, 20), swizzle=32), (64, -3)),
    "128-byte swizzling of 32-byte rows": (tma.TensorMap(0x100, 4, (128, 50), (512,), (8, 20), swizzle=128), (0, 0)),
    "an image's corner, before its first pixel": (IMAGE, (32, -1, -1, 0)),
    "an image's other corner": (IMAGE, (48, 7, 5, 2)),
    "every second pixel": (replace(IMAGE, steps=(1, 2, 2, 1)), (0, 1, 0, 0)),
    "5 dimensions": (tma.TensorMap(0, 8, (4, 3, 3, 3, 3), (32, 96, 288, 864), (2, 2, 2, 2, 2)), (2, 2, -1, 0, 2)),
}


@pytest.mark.parametrize("case", TILED.values(), ids=TILED)
def test_tiled(case: tuple[tma.TensorMap, tuple[int, ...]]) -> None:
    tensor, corner = case
    shared = 5 * 1024
    copies = tma.copies(tensor, np.array([corner]), np.array([shared]))
    expected = tiled(tensor, corner, shared)
    assert elements(tensor, copies) == expected
    assert len(expected) * tensor.element_bytes == tensor.bytes == copies.inside.size * copies.unit


def test_units_are_16_bytes_where_they_can_be() -> None:
    units = {name: tma.copies(t, np.array([c]), np.array([0])).unit for name, (t, c) in TILED.items()}
    assert {name for name, unit in units.items() if unit < 16} == {
        "a unit of 16 bytes would lie across the edge",
        "an odd coordinate",
    }


@pytest.mark.parametrize("offsets", [(0, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("corner", [(0, -1, -1, 0), (32, 7, 5, 0), (32, 3, 2, 2)], ids=str)
def test_im2col(corner: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    """A 3x3 convolution with padding 1: the box begins at -1 and ends 1 before the last pixel, taps are offsets."""
    fields = tma.Im2col(lower_corner=(-1, -1), upper_corner=(-1, -1), channels_per_pixel=32, pixels_per_column=80)
    tensor = replace(IMAGE, box=(), swizzle=64, im2col=fields)
    copies = tma.copies(tensor, np.array([corner]), np.array([1024]), np.array([offsets]))
    expected = im2col(tensor, corner, offsets, 1024)
    assert elements(tensor, copies) == expected
    assert len(expected) == 80 * 32


IM2COL = """
setp.eq.u32 %p1, %tid, 0; mov.b32 %r10, smem; add.u32 %r11, %r10, 4096; mov.b64 %rd1, x_ptr;
@%p1 mbarrier.init.shared::cta.b64 [%r11], 1;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 4096;
mov.b32 %r12, 0; mov.b32 %r13, -1; mov.b16 %h1, 2; mov.b16 %h2, 1;
@%p1 cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes
    [%r10], [%rd1, {%r12, %r13, %r13, %r12}], [%r11], {%h1, %h2};
{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r11], 0; @!done bra again; }
ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%at];
st.global.v4.b32 [%out], {%r1, %r2, %r3, %r4};
"""


def test_im2col_in_ptx() -> None:
    """The tap (1, 2) of a 3x3 convolution: 64 pixels of 32 channels, the last four past the second and last image."""
    x = torch.arange(2 * 5 * 6 * 32, dtype=torch.int16).view(2, 5, 6, 32) + 1
    out = torch.empty(256, 8, dtype=torch.int16)
    mapped = Mapped(x, box=(), options={"im2col": tma.Im2col((-1, -1), (-1, -1), 32, 64)})
    launch(snippet(IM2COL, threads=256, size=16), (1,), [mapped, out], outputs=[1], shared_bytes=8192)
    shifted = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))[:, 1:6, 2:8]
    assert torch.equal(out.view(64, 32)[:60], shifted.reshape(60, 32))
    assert not out.view(64, 32)[60:].any()


def test_im2col_in_three_and_five_dimensions_is_that_of_four() -> None:
    fields = tma.Im2col((-1,), (-1,), 32, 20)
    line = tma.TensorMap(0, 2, (64, 9, 5), (128, 9 * 128), im2col=fields)
    image = replace(line, sizes=(64, 9, 1, 5), strides=(128, 9 * 128, 9 * 128))
    image = replace(image, im2col=tma.Im2col((-1, 0), (-1, 0), 32, 20))
    volume = replace(line, sizes=(64, 9, 1, 1, 5), strides=(128, 9 * 128, 9 * 128, 9 * 128))
    volume = replace(volume, im2col=tma.Im2col((-1, 0, 0), (-1, 0, 0), 32, 20))
    zero = np.zeros(1, np.int64)
    of_line = tma.copies(line, np.array([[0, 3, 1]]), zero, np.array([[1]]))
    of_image = tma.copies(image, np.array([[0, 3, 0, 1]]), zero, np.array([[1, 0]]))
    of_volume = tma.copies(volume, np.array([[0, 3, 0, 0, 1]]), zero, np.array([[1, 0, 0]]))
    assert elements(line, of_line) == elements(image, of_image) == elements(volume, of_volume)


def test_several_instructions_at_once() -> None:
    corners, shared = [(32, -1, -1, 0), (0, 3, 2, 1)], [0, 4096]
    copies = tma.copies(IMAGE, np.array(corners), np.array(shared))
    for n, (corner, target) in enumerate(zip(corners, shared, strict=True)):
        assert elements(IMAGE, copies, n) == tiled(IMAGE, corner, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 0x4008}, "has address 0x4008; a multiple of 16"),
        ({"strides": (128, 1152, 8072)}, r"strides \(128, 1152, 8072\); multiples of 16 bytes"),
        ({"strides": (128,)}, "1 strides; one less than dimensions"),
        ({"box": (32, 4, 257, 2)}, r"box \(32, 4, 257, 2\); 1 to 256 elements"),
        ({"box": (3, 4, 3, 2)}, "rows of 6 bytes; a multiple of 16"),
        ({"box": (32, 4)}, r"box \(32, 4\) and steps \(\) for 4 dimensions in tiled mode"),
        ({"swizzle": 32}, "rows of 64 bytes under 32-byte swizzling; no longer"),
        ({"swizzle": 96}, "swizzle 96; 0, 32, 64 or 128 bytes"),
    ],
)
def test_maps_that_the_driver_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(IMAGE, **change)


def test_instructions_that_do_not_fit_their_map() -> None:
    zero = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="3 coordinates and no im2col offsets for a map of 4 dimensions in tiled mode"):
        tma.copies(IMAGE, np.zeros((1, 3), np.int64), zero)
    image = replace(IMAGE, box=(), im2col=tma.Im2col((-1, -1), (-1, -1), 32, 64))
    with pytest.raises(ValueError, match=r"im2col coordinates \[\[-2, 0\]\] leave the box that begins at \[-1, -1\]"):
        tma.copies(image, np.array([[0, -2, 0, 0]]), zero, np.zeros((1, 2), np.int64))
