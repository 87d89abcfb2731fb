"""What the model of counters.py says Hopper's conv3x3 (csrc/cuda/conv3x3_sm90.cuh) takes for the layers of a VGG16.

    python -m tests.virtual_gpu.predict_sm90              # batches 1, 32 and 128

The tiles of an image (at batch 1 of a corner of it) are simulated, for 64 output channels; the rest does the same. An
SM's time is that of its items one after the other. What an item adds up of other CTAs' sums comes after its products,
not beside them. The last columns: the share of the tensor cores' peak that is left for the products that were asked
for, and the bytes to and from the L2 in those of an implicit GEMM, which reads every pixel for each tap: with tiles of
128 x 128, and of 256 x 128 (Triton's best here).
"""

from __future__ import annotations

import argparse
import functools
from typing import NamedTuple

import torch

from tests.virtual_gpu import sm90
from tests.virtual_gpu.counters import GPUS, SECTOR, Counters, Gpu
from tests.virtual_gpu.predicted import layers
from vgg_fast import testing


@functools.cache
def sample(cin: int, size: int, pool: bool, rows: int, split: int, whole: bool) -> Counters:
    """Counts of tiles (of all parts of one, where its sum is shared) with blocks of so many rows."""
    h = w = size if whole else min(size, 28)
    cut = sm90.Plan(rows=rows, down=-(-h // rows), across=-(-w // sm90.WIDTH), split=split)
    n = 1 if cut.down * cut.across % 4 == 0 or not whole else 2
    tiles = n * cut.down * cut.across // (4 if whole else 2)
    cut.whole, cut.items = (tiles, tiles) if whole else (0, tiles * split)
    cut.partial_bytes, cut.counter_bytes = tiles * split * 2 * rows * sm90.WIDTH * sm90.COLUMNS * 4, tiles * 4
    x = testing.random_tensor(n, cin, h, w).half().contiguous(memory_format=torch.channels_last)
    weight, counters = testing.random_tensor(sm90.COLUMNS, cin, 3, 3).half(), Counters()
    affine = torch.ones(2, sm90.COLUMNS)
    sm90.conv3x3(x, weight, affine, True, not pool, pool, cut=cut, observer=counters)
    counters.ctas = cut.items
    return counters


def times(counters: Counters, gpu: Gpu, split: int) -> tuple[float, float]:
    """Seconds of the SM that an item occupies, and bytes from the L2."""
    total, items, l2 = counters.total, counters.ctas, gpu.l2 / gpu.sms
    gathers = [row for row in counters.rows.values() if "f32" in row.op and row.op.startswith("ld.global.v4")]
    bytes_gathered = sum(row.sectors for row in gathers) * SECTOR
    bytes_read = total.sectors * SECTOR - bytes_gathered
    clocks = (total.flops / gpu.tensor, total.issues / gpu.schedulers, total.wavefronts, bytes_read / l2)
    after = bytes_gathered / (items / split) / l2 if split > 1 else 0.0
    return (max(clocks) / items + after) / gpu.clock, total.sectors * SECTOR / items


class Row(NamedTuple):
    """Of a layer: seconds, the share of the roofline, bytes of the L2, and the plan."""

    seconds: float
    share: float
    l2: float
    cut: sm90.Plan


def predicted(batch: int, cin: int, cout: int, size: int, pool: bool, gpu: Gpu) -> Row:
    cut = sm90.plan(sm90.problem(batch, size, size, cin, cout), gpu.sms)
    parts = [(cut.whole, sample(cin, size, pool, cut.rows, 1, True), 1)] if cut.whole else []
    if cut.items > cut.whole:
        parts.append((cut.items - cut.whole, sample(cin, size, pool, cut.rows, cut.split, False), cut.split))
    busy = [0.0] * gpu.sms
    l2, first = 0.0, 0
    for items, counters, split in parts:
        seconds, moved = times(counters, gpu, split)
        l2 += items * moved
        for item in range(first, first + items):
            busy[item % gpu.sms] += seconds
        first += items
    pixels = batch * size * size
    hbm = (pixels * cin + 9 * cin * cout + pixels * cout // (4 if pool else 1)) * 2 / gpu.hbm
    seconds = max(*busy, hbm)
    flops = 2 * 9 * pixels * cin * cout
    return Row(seconds, flops / (gpu.tensor * gpu.sms * gpu.clock) / seconds, l2, cut)


def implicit_gemm(batch: int, cin: int, cout: int, size: int, pool: bool, tile: int) -> float:
    """Bytes to and from the L2 with tiles of ``tile`` pixels x 128 channels."""
    pixels = batch * size * size
    return 9 * pixels * cin * cout * 2 * (1 / tile + 1 / 128) + pixels * cout * 2 // (4 if pool else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [(layer.cin, layer.cout, layer.pool, layer.size) for layer in layers()]
    problems = [(cin, cout, size, pool) for cin, cout, pool, size in every if cin % 64 == 0]
    line = "{:5}  {:22} {:26} {:>9} {:>9} {:>9} {:>12} {:>12}"
    titles = "rows: whole + half / split", "H100 us", "H200 us", "roofline", "L2 / 128x128", "L2 / 256x128"
    print(line.format("batch", "layer", *titles))
    for batch in options.batch:
        sums = [0.0, 0.0, 0.0]
        for problem in problems:
            h100, h200 = (predicted(batch, *problem, GPUS[gpu]) for gpu in ("H100", "H200"))
            sums = [a + b for a, b in zip(sums, (h100.seconds, h200.seconds, h100.seconds * h100.share), strict=True)]
            cin, cout, size, pool = problem
            cut = h100.cut
            print(
                line.format(
                    batch,
                    f"{cin}->{cout} {size}x{size}{' pool' if pool else ''}",
                    f"{cut.rows}: {cut.whole} + {cut.items - cut.whole} / {cut.split}",
                    *(f"{row.seconds * 1e6:.1f}" for row in (h100, h200)),
                    f"{h100.share:.2f}",
                    *(f"{h100.l2 / implicit_gemm(batch, *problem, tile):.2f}" for tile in (128, 256)),
                ),
                flush=True,
            )
        total = (f"{seconds * 1e6:.1f}" for seconds in sums[:2])
        print(line.format(batch, "all of them", "", *total, f"{sums[2] / sums[0]:.2f}", "", ""))


if __name__ == "__main__":
    main()
