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
from tests.virtual_gpu.cases import ARCHITECTURES, triton_conv3x3
from tests.virtual_gpu.counters import GPUS, Counters, Row, predict
from tests.virtual_gpu.launch import compile_triton
from tests.virtual_gpu.machine_code import rows_of
from tests.virtual_gpu.tma_gemm import gemm
from vgg_fast import reference, testing
from vgg_fast.kernels.configs import Config
from vgg_fast.kernels.conv3x3 import Launch, launch_of

SIZE, CHANNELS = 14, 256
CONFIGS = {80: Config(128, 128, 64, 4, 3), 90: Config(128, 256, 64, 8, 3)}


def launch_for(sm: int, pool: bool) -> Launch:
    size = (1, SIZE, SIZE, CHANNELS, CHANNELS)
    return launch_of(torch.float16, *size, True, pool, ARCHITECTURES[sm], config=CONFIGS[sm])


def counted(sm: int, pool: bool) -> tuple[Counters, dict[str, int]]:
    """The layer's counters, after a look at its result, and the kernel's constants."""
    x = testing.integer_tensor(1, CHANNELS, SIZE, SIZE, limit=2).half().contiguous(memory_format=torch.channels_last)
    weight = testing.integer_tensor(CHANNELS, CHANNELS, 3, 3, limit=1).half()
    affine = torch.stack([torch.full([CHANNELS], 2.0**-6), torch.zeros(CHANNELS)])
    layout, counters, launched = weight.permute(0, 2, 3, 1).contiguous(), Counters(), launch_for(sm, pool)
    out = triton_conv3x3(x, layout, affine, target=sm, launched=launched, observer=counters)
    expected = reference.conv3x3(x.float(), weight.float(), relu=True, pool=pool) * 2.0**-6
    assert torch.equal(out, expected.half())
    return counters, launched.options


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
    assert (tiles, warps, steps) == {80: (4, 4, 36), 90: (2, 8, 36)}[sm]
    total, copies, stores = counters.total, of(counters, "cp.async.cg"), of(counters, "st.global")

    # The tensor cores multiply whole tiles, those past the last pixel too.
    products = of(counters, "mma.sync" if sm == 80 else "wgmma.mma_async")
    assert total.flops == products.flops == tiles * steps * 2 * c["BM"] * c["BN"] * c["BK"]

    # 128 bytes to a wavefront: none is lost to a bank conflict. (Scale and shift, of which a warp's threads read the
    # same few words, are counted as four wavefronts where they may be one.)
    tile_bytes = (c["BM"] + c["BN"]) * c["BK"] * 2
    assert copies.wavefronts == tiles * (steps + 2) * tile_bytes // 128
    excess = {row.op for row in counters.rows.values() if row.wavefronts > row.wavefronts_ideal}
    assert excess <= {"ld.shared.v4.b32"}
    assert total.wavefronts < 1.03 * total.wavefronts_ideal
    if sm == 80:  # two by two warps: each reads the tile's half of the pixels and of the channels, 512 bytes at a time
        matrices = tile_bytes // 2 // 512
        assert of(counters, "ldmatrix").issues == tiles * warps * (steps * matrices + matrices // 4)  # one of 4 ahead
        assert of(counters, "ldmatrix").wavefronts == 4 * of(counters, "ldmatrix").issues
    else:  # each of two wgmma.m64n256k16 reads its 64 x 16 elements of the pixels and all of the weights
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
    """On A100 each of the 4 CTAs has an SM. A k-step takes 1024 clocks of the tensor cores, and 256 wavefronts for the
    copies and 512 for ldmatrix: 128 output channels are enough, as each warp reads its 64 pixels for 64 of them."""
    counters, c = counted(80, pool=False)
    gpu, steps = GPUS["A100"], 36
    got = predict(counters, gpu, registers=255, shared_bytes=65_536)
    assert got.times["tensor"] == pytest.approx(steps * 1024 / gpu.clock)
    epilogue = 2 * c["BM"] * c["BN"] * 2 // 128  # out to shared memory and back
    ahead = 2 * 256 + 512 // 4
    assert got.times["shared"] == pytest.approx((steps * (256 + 512) + ahead + epilogue) / gpu.clock, rel=0.01)
    assert got.bound == "tensor"
    assert got.busy == 4 / 108
    assert got.occupancy == 2 * 4 / 64


@pytest.mark.parametrize("sm", [80, 90])
def test_issue_slots_are_near_those_of_the_machine_code(sm: int) -> None:
    """PTX is not what issues. For these kernels ptxas makes 0.85 and 1.04 instructions of one of PTX."""
    counters, c = counted(sm, pool=False)
    launched, x = launch_for(sm, pool=False), torch.empty(0, dtype=torch.float16)
    compiled, _ = compile_triton(launched.kernel, launched.arguments(x, x, torch.empty(0), x), sm)
    (row,) = rows_of(compiled.asm["cubin"], "conv3x3", sm)
    executed = row["sass"] + (9 * CHANNELS // c["BK"] - 1) * row["loop"]
    assert executed * counters.ctas * c["num_warps"] / counters.total.issues == pytest.approx(1, abs=0.2)


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
    assert loads.sectors == (2 * a.numel() + 2 * b.numel()) * 2 // 32
    assert of(counters, "cp.async.bulk.tensor.2d.global").sectors == pytest.approx(out.numel() * 2 / 32, abs=4)
    assert (counters.read.bytes, counters.written.bytes) == ((a.numel() + b.numel()) * 2, out.numel() * 2)
