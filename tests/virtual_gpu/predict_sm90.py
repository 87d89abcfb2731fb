"""What the model of counters.py says Hopper's conv3x3 (csrc/cuda/conv3x3_sm90.cuh) takes for the layers of a VGG16.

    python -m tests.virtual_gpu.predict_sm90              # batches 1, 32 and 128

A few tiles of each layer are simulated, with all of its input channels; the rest does the same. An SM's time is that of
its items one after the other. What an item adds up of other CTAs' sums comes after its products, not beside them.
The last columns: the share of the tensor cores' peak that is left for the products that were asked for, and the bytes
from the L2 in those of an implicit GEMM with tiles of 256 x 128 (Triton's best), which reads every pixel for each tap.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter

import torch

from tests.virtual_gpu import sm90
from tests.virtual_gpu.counters import GPUS, SECTOR, Counters, Gpu
from tests.virtual_gpu.predicted import layers
from vgg_fast import testing


@functools.cache
def sample(cin: int, size: int, pool: bool, split: int, whole: bool) -> Counters:
    """Counts of tiles (of all parts of one, where its sum is shared), in an image of this size or a corner of it."""
    h = w = min(size, 56)
    if not whole:  # two half tiles for two multiprocessors, or one for as many as share its sum
        h, w = 16 if split == 1 else 8, 16
    x = testing.random_tensor(1, cin, h, w).half().contiguous(memory_format=torch.channels_last)
    weight, counters = testing.random_tensor(sm90.COLUMNS, cin, 3, 3).half(), Counters()
    multiprocessors = 1 if whole else max(2, split)
    cut = sm90.plan(sm90.problem(1, h, w, cin, sm90.COLUMNS), multiprocessors)
    assert (cut.whole > 0, cut.split) == (whole, split)
    affine = torch.ones(2, sm90.COLUMNS)
    sm90.conv3x3(x, weight, affine, True, not pool, pool, multiprocessors, observer=counters)
    counters.ctas = cut.items
    return counters


def times(counters: Counters, gpu: Gpu, split: int) -> tuple[float, float]:
    """Seconds of the SM that an item occupies, and bytes from the L2."""
    total, items, l2 = counters.total, counters.ctas, gpu.l2 / gpu.sms
    gathers = [row for row in counters.rows.values() if "f32" in row.op and row.op.startswith("ld.global.v4")]
    bytes_gathered = sum(row.sectors for row in gathers) * SECTOR
    bytes_read = total.sectors * SECTOR - bytes_gathered
    clocks = (total.flops / gpu.tensor, total.issues / gpu.schedulers, total.wavefronts, bytes_read / l2)
    after = bytes_gathered / l2 if split > 1 else 0.0
    return (max(clocks) / items + after) / gpu.clock, total.sectors * SECTOR / items


def predicted(
    batch: int, cin: int, cout: int, size: int, pool: bool, gpu: Gpu
) -> tuple[float, float, float, sm90.Plan]:
    """Seconds, the share of the roofline, bytes from the L2 against an implicit GEMM, and the plan."""
    cut = sm90.plan(sm90.problem(batch, size, size, cin, cout), gpu.sms)
    parts = [(cut.whole, sample(cin, size, pool, 1, True), 1)] if cut.whole else []
    if cut.items > cut.whole:
        parts.append((cut.items - cut.whole, sample(cin, size, pool, cut.split, False), cut.split))
    busy: Counter[int] = Counter()
    l2, first = 0.0, 0
    for items, counters, split in parts:
        seconds, moved = times(counters, gpu, split)
        l2 += items * moved
        for item in range(first, first + items):
            busy[item % gpu.sms] += seconds  # type: ignore[assignment]
        first += items
    pixels = batch * size * size
    hbm = (pixels * cin + 9 * cin * cout + pixels * cout // (4 if pool else 1)) * 2 / gpu.hbm
    products = 9 * pixels * cin * cout
    seconds = max(max(busy.values()), hbm)
    implicit = products * 2 * (1 / 256 + 1 / 128)
    return seconds, 2 * products / (gpu.tensor * gpu.sms * gpu.clock) / seconds, l2 / implicit, cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [(layer.cin, layer.cout, layer.pool, layer.size) for layer in layers()]
    problems = [p for p in every if p[0] % 64 == 0 and p[1] % 128 == 0]
    print("batch  layer                    whole + half / split   H100 us  H200 us  roofline  L2 / implicit GEMM")
    for batch in options.batch:
        sums = [0.0, 0.0, 0.0]
        for cin, cout, pool, size in problems:
            h100, share, l2, cut = predicted(batch, cin, cout, size, pool, GPUS["H100"])
            h200 = predicted(batch, cin, cout, size, pool, GPUS["H200"])[0]
            sums = [a + b for a, b in zip(sums, (h100, h200, h100 * share), strict=True)]
            name = f"{cin}->{cout} {size}x{size}{' pool' if pool else ''}"
            plan = f"{cut.whole} + {cut.items - cut.whole} / {cut.split}"
            print(
                f"{batch:5}  {name:24} {plan:20} {h100 * 1e6:9.1f}{h200 * 1e6:9.1f} {share:9.2f} {l2:9.2f}", flush=True
            )
        print(f"{batch:5}  {'blocks 2 to 5':45} {sums[0] * 1e6:9.1f}{sums[1] * 1e6:9.1f} {sums[2] / sums[0]:9.2f}")


if __name__ == "__main__":
    main()
