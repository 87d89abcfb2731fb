"""Counters of the shipped Triton kernel against hand arithmetic: a VGG layer, 14x14 pixels, 256 -> 256 channels, fp16.

The kernel reads each tile of pixels once for each tile of channels, and copies two k-steps ahead, also past the last
one (nothing is read then, but zeros are written to shared memory).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, whose kernels are looked at")
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.virtual_gpu import launch
from tests.virtual_gpu.cases import triton_conv3x3
from tests.virtual_gpu.counters import GPUS, Counters, Row, predict
from tests.virtual_gpu.launch import compile_triton
from tests.virtual_gpu.machine_code import rows_of
from tests.virtual_gpu.tma_gemm import gemm
from vgg_fast import reference, testing
from vgg_fast.kernels import conv3x3

SIZE, CHANNELS = 14, 256


def counted(sm: int, pool: bool) -> tuple[Counters, dict[str, int]]:
    """The layer's counters, after a look at its result, and the kernel's constants."""
    x = testing.integer_tensor(1, CHANNELS, SIZE, SIZE, limit=2).half().contiguous(memory_format=torch.channels_last)
    weight = testing.integer_tensor(CHANNELS, CHANNELS, 3, 3, limit=1).half()
    affine = torch.stack([torch.full([CHANNELS], 2.0**-6), torch.zeros(CHANNELS)])
    layout, counters = weight.permute(0, 2, 3, 1).contiguous(), Counters()
    out = triton_conv3x3(x, layout, affine, relu=True, pool=pool, target=sm, observer=counters)
    expected = reference.conv3x3(x.float(), weight.float(), relu=True, pool=pool) * 2.0**-6
    assert torch.equal(out, expected.half())
    return counters, conv3x3.constants(x.dtype, CHANNELS, CHANNELS, relu=True, pool=pool)


def of(counters: Counters, op: str) -> Row:
    total = Row()
    for row in counters.rows.values():
        if row.op.startswith(op):
            total.add(row)
    assert total.issues > 0, f"no instruction begins with {op}"
    return total


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("sm", [80, 90])
def test_conv3x3(sm: int, pool: bool) -> None:
    counters, c = counted(sm, pool)
    tiles, warps, steps = counters.ctas, c["num_warps"], 9 * CHANNELS // c["BK"]
    assert (tiles, warps, steps) == (8, 4, 36)
    total, copies, stores = counters.total, of(counters, "cp.async.cg"), of(counters, "st.global")

    # The tensor cores multiply whole tiles, those past the last pixel too.
    products = of(counters, "mma.sync" if sm == 80 else "wgmma.mma_async")
    assert total.flops == products.flops == tiles * steps * 2 * c["BM"] * c["BN"] * c["BK"]

    # 128 bytes to a wavefront: none is lost to a bank conflict, in the epilogue neither.
    tile_bytes = (c["BM"] + c["BN"]) * c["BK"] * 2
    assert copies.wavefronts == tiles * (steps + 2) * tile_bytes // 128
    assert total.wavefronts == total.wavefronts_ideal
    if sm == 80:  # two by two warps: each reads the tile's half of the pixels and of the channels, 512 bytes at a time
        matrices = tile_bytes // 2 // 512
        assert of(counters, "ldmatrix").issues == tiles * warps * (steps * matrices + matrices // 4)  # one of 4 ahead
        assert of(counters, "ldmatrix").wavefronts == 4 * of(counters, "ldmatrix").issues
    else:  # wgmma.m64n64k16 reads 64 x 16 elements of both operands
        assert products.wavefronts == tiles * steps * (c["BM"] // 64) * (c["BK"] // 16) * (64 + c["BN"]) * 32 // 128

    # 32 bytes to a sector; a tap is outside the image for one row or column of pixels in three of nine cases each.
    inside = (SIZE + 2 * (SIZE - 1)) ** 2  # pixels x taps
    columns = CHANNELS // c["BN"]
    pixels = inside * CHANNELS * 2 * columns
    weights = tiles * steps * c["BN"] * c["BK"] * 2
    assert copies.sectors == copies.sectors_ideal == (pixels + weights) // 32
    outputs = SIZE * SIZE // (4 if pool else 1) * CHANNELS
    assert stores.sectors == stores.sectors_ideal == outputs * 2 // 32

    # Memory sees everything once: x, weights, scale and shift; the outputs.
    assert counters.read.bytes == (SIZE * SIZE * CHANNELS + 9 * CHANNELS * CHANNELS) * 2 + 2 * CHANNELS * 4
    assert counters.written.bytes == outputs * 2


def test_prediction() -> None:
    """On A100 each of the 8 CTAs has an SM. A k-step takes 512 clocks of the tensor cores, but 192 wavefronts for the
    copies and 384 for ldmatrix: 64 output channels are too few, as each warp reads its 64 pixels for 32 of them."""
    counters, c = counted(80, pool=False)
    gpu, steps = GPUS["A100"], 36
    got = predict(counters, gpu, registers=188, shared_bytes=49_152)
    assert got.times["tensor"] == pytest.approx(steps * 512 / gpu.clock)
    epilogue = 2 * c["BM"] * c["BN"] * 2 // 128  # out to shared memory and back
    ahead = 2 * 192 + 384 // 4
    assert got.times["shared"] == pytest.approx((steps * (192 + 384) + ahead + epilogue) / gpu.clock)
    assert got.bound == "shared"
    assert got.busy == 8 / 108
    assert got.occupancy == 2 * 4 / 64


@pytest.mark.parametrize("sm", [80, 90])
def test_issue_slots_are_near_those_of_the_machine_code(sm: int) -> None:
    """PTX is not what issues. For these kernels ptxas makes 0.88 and 1.08 instructions of one of PTX."""
    counters, c = counted(sm, pool=False)
    arguments = {name: torch.empty(0, dtype=torch.float16) for name in ("x_ptr", "weight_ptr", "out_ptr")}
    arguments |= {"affine_ptr": torch.empty(0), "N": 1, "H": SIZE, "W": SIZE} | c
    compiled, _ = compile_triton(conv3x3._conv3x3_kernel, arguments, sm)
    (row,) = rows_of(compiled.asm["cubin"], "conv3x3", sm)
    executed = row["sass"] + (9 * CHANNELS // c["BK"] - 1) * row["loop"]
    assert executed * counters.ctas * c["num_warps"] / counters.total.issues == pytest.approx(1, abs=0.15)


def test_tensor_memory_access() -> None:
    """A product through tensor maps: 2 x 2 tiles that hang over, 4 k-steps. Shared memory takes whole boxes, global
    memory what lies inside, and every box again for each tile beside it."""
    m, n, k, bm, bn, bk = 200, 104, 232, 128, 64, 64
    a = testing.integer_tensor(m, k, limit=4).half()
    b = testing.integer_tensor(n, k, limit=2, seed=1).half()
    out, counters = torch.empty(m, n, dtype=torch.float16), Counters()
    boxes = {"a": (a, [bm, bk]), "b": (b, [bn, bk]), "c": (out, [bm, bn])}
    arguments = {name: TensorDescriptor.from_tensor(tensor, box) for name, (tensor, box) in boxes.items()}
    arguments |= {"K": k, "BM": bm, "BN": bn, "BK": bk, "num_warps": 4, "num_stages": 3}
    launch(gemm, (2, 2), arguments, outputs=["c"], target=90, observer=counters)
    assert torch.equal(out, (a.float() @ b.float().T).half())
    loads = of(counters, "cp.async.bulk.tensor.2d.shared")
    assert loads.wavefronts == 4 * 4 * (bm + bn) * bk * 2 // 128
    # A row is 14.5 sectors. Of an even one the four boxes take 4, 4, 4 and 3; an odd one begins in the middle of one.
    assert loads.sectors == 2 * (m + n) // 2 * (15 + 18)
    stores = of(counters, "cp.async.bulk.tensor.2d.global")
    assert stores.sectors == m // 2 * (4 + 3 + 5 + 3)  # of 6.5 in a row
    assert (loads.sectors_ideal, stores.sectors_ideal) == (
        (2 * a.numel() + 2 * b.numel()) * 2 // 32,
        pytest.approx(out.numel() * 2 / 32, abs=4),
    )
    assert (counters.read.bytes, counters.written.bytes) == ((a.numel() + b.numel()) * 2, out.numel() * 2)
