"""Predicted time of VGG16 with the tensor-core kernels of csrc/cuda for sm_80: conv3x3_mma and block1.

    python -m tests.virtual_gpu.vgg16 --kernel cuda --batch 1,32,128 --gpu A100,H100

On H100 this is what conv3x3_mma would do there; conv3x3_sm90 serves it better (predict_sm90.py).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from tests.virtual_gpu import cuda_cases
from tests.virtual_gpu.counters import GPUS, SECTOR, Counters, Prediction, predict
from tests.virtual_gpu.cuda_cases import TILES, MmaPlan, block1, conv3x3_mma, plan, plan_block1, problem
from tests.virtual_gpu.predicted import SAMPLE, Layer, layers, peak

HALF = torch.float16
WARPS = {"256x128": 8, "128x64": 12, "256x64": 8}  # on a multiprocessor, by __launch_bounds__


class Row(NamedTuple):
    """A launch; ``l2`` is its traffic to the L2 relative to that of an implicit GEMM of 128x128 tiles."""

    name: str
    flops: int
    cut: str
    model: Prediction
    l2: float


def channels_last_zeros(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=HALF).contiguous(memory_format=torch.channels_last)


@functools.cache
def simulate(layer: Layer, images: int, tile: int, split: int, multiprocessors: int, batch: int) -> Counters:
    """Of some tiles, spread evenly, of one column; values do not matter: all zeros."""
    cut = real_plan(layer, batch, multiprocessors, tile, split)
    positions = int(TILES[tile].split("x")[0]) // 2
    cut.rows = math.ceil(images * cut.strips * cut.pairs * cut.strip / positions)
    chosen = sorted({int((n + 0.5) * cut.rows / SAMPLE) for n in range(SAMPLE)})
    only = [row * cut.columns * split + part for row in chosen for part in range(split)]
    counters = Counters()
    x, weight = channels_last_zeros(images, layer.cin, layer.size, layer.size), torch.zeros(layer.cout, layer.cin, 3, 3)
    affine = torch.ones(2, layer.cout)
    conv3x3_mma(x, weight.half(), affine, True, not layer.pool, layer.pool, cut=cut, observer=counters, only=only)
    return counters


def real_plan(layer: Layer, batch: int, multiprocessors: int, tile: int = -1, split: int = 0) -> MmaPlan:
    return plan(problem(batch, layer.size, layer.size, layer.cin, layer.cout, HALF), multiprocessors, tile, split)


def prediction(layer: Layer, batch: int, gpu: str, tile: int = -1, split: int = 0) -> Row:
    """``tile`` (of TILES) and ``split`` where they shall be others than the planner's."""
    cut = real_plan(layer, batch, GPUS[gpu].sms, tile, split)
    tile = TILES[cut.tile]
    bm = int(tile.split("x")[0])
    period = math.lcm(cut.strips * cut.pairs * cut.strip, bm // 2) // (cut.strips * cut.pairs * cut.strip)
    counters = simulate(layer, min(batch, period, 8), cut.tile, cut.split, GPUS[gpu].sms, batch)
    written = layer.output_bytes(batch) // (4 if layer.pool else 1)
    # Partial sums, 15 MB at most, are read again at once: they are traffic of the L2, which holds them, and not of HBM.
    moved = layer.input_bytes(batch) + written + layer.weight_bytes + 8 * layer.cout
    registers = 65536 // (32 * WARPS[tile]) // 8 * 8 - 8
    model = predict(counters, GPUS[gpu], registers, cut.shared_bytes, cut.ctas, moved)
    split = f" / {cut.split}" if cut.split > 1 else ""
    sectors = counters.total.sectors / counters.ctas * cut.ctas
    return Row(str(layer), layer.flops(batch), tile + split, model, relative(sectors, layer, batch, written))


def relative(sectors: float, layer: Layer, batch: int, written: int) -> float:
    implicit = layer.flops(batch) / (2 * 128 * 128) * 2 * 128 * 2 + written
    return sectors * SECTOR / implicit


def first_block(first: Layer, second: Layer, batch: int, gpu: str) -> Row:
    """The first two layers, from two of its tiles: no tile knows where it lies, but for the padding."""
    cut, counters = plan_block1(batch, first.size, first.size), Counters()
    weights = torch.zeros(64, 3, 3, 3, dtype=HALF), torch.zeros(64, 64, 3, 3, dtype=HALF)
    affines = torch.ones(2, 64), torch.ones(2, 64)
    block1(channels_last_zeros(1, 3, 64, 64), weights, affines, out=False, observer=counters, only=[5, 6])
    written = second.output_bytes(batch) // 4
    moved = first.input_bytes(batch) + written + first.weight_bytes + second.weight_bytes
    model = predict(counters, GPUS[gpu], 240, cut.shared_bytes, cut.ctas, moved)
    l2 = relative(counters.total.sectors / counters.ctas * cut.ctas, second, batch, written)
    return Row("block1", first.flops(batch) + second.flops(batch), "256x64", model, l2)


def report(batches: list[int], names: list[str]) -> None:
    """A table for each batch size, as predicted.report, with the traffic to the L2."""
    cuda_cases.planner()
    first, second, *others = layers()
    for batch in batches:
        print(f"\nVGG16 features, batch {batch}, 224x224, fp16, csrc/cuda for sm_80: predicted us, share of the tensor")
        print("cores' peak, bound, bytes to the L2 relative to an implicit GEMM of 128x128 tiles\n")
        print("| layer | " + " | ".join(f"{name}: tile | us | share | bound | L2" for name in names) + " |")
        print("|---|" + "---|---|---|---|---|" * len(names))
        columns = [
            [first_block(first, second, batch, name), *(prediction(layer, batch, name) for layer in others)]
            for name in names
        ]
        for rows in zip(*columns, strict=True):
            cells = [
                f"{r.cut} | {r.model.seconds * 1e6:.1f} | {r.flops / peak(name) / r.model.seconds:.2f} | "
                f"{r.model.bound} | {r.l2:.2f}"
                for r, name in zip(rows, names, strict=True)
            ]
            print(f"| {rows[0].name} | " + " | ".join(cells) + " |")
        sums = [sum(row.model.seconds for row in column) for column in columns]
        flops = sum(row.flops for row in columns[0])
        totals = [f" | {s * 1e6:.0f} | {flops / peak(n) / s:.2f} | | " for s, n in zip(sums, names, strict=True)]
        print("| all | " + " | ".join(totals) + " |", flush=True)
