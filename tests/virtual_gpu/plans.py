"""How every layer is cut on a GPU: what `configs.config` (Triton) and the planners of csrc/cuda choose, as a table.

    python -m tests.virtual_gpu.plans                              # VGG16 at 224x224, batch 1 and 32, A100 and H100
    python -m tests.virtual_gpu.plans --gpu B200,sm_89:128 --batch 8 --dtype tf32
    python -m tests.virtual_gpu.plans --gpu H100 --kernel cuda     # mma.sync in place of wgmma
    python -m tests.virtual_gpu.plans --chain 64,128,128,pool,256 --size 56x40

The functions that a GPU asks before it launches are asked here, so nothing is simulated and no GPU is needed. A tile is
pixels x output channels (x the step of the inner product). Stages are those of the load pipeline, in csrc/cuda of
pixels + weights. conv3x3_sm90 has blocks of pixels, four in a whole tile and two in half a one, all of 64 channels, and
its stages in its source.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tests.virtual_gpu import cuda_cases, sm90
from vgg_fast.kernels.configs import Architecture
from vgg_fast.models import cfgs
from vgg_fast.reference import Step
from vgg_fast.selection import Problem, kernels_of, objections

GPUS = {
    "A100": Architecture(80, 108),
    "RTX4090": Architecture(89, 128),
    "H100": Architecture(90, 132),
    "H100PCIe": Architecture(90, 114),
    "H200": Architecture(90, 132),
    "B200": Architecture(100, 148),
    "RTX5090": Architecture(120, 170),
}
PRECISIONS = {
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
}
VGG16 = [3, *("pool" if entry == "M" else entry for entry in cfgs["D"])]


class Chain(NamedTuple):
    """Convolutions with ReLU; per convolution its input ``(cin, h, w)``, its output channels, what follows it."""

    inputs: list[tuple[int, int, int]]
    couts: list[int]
    program: list[int]


class Row(NamedTuple):
    """How a convolution runs; ``workspace`` is bytes for partial sums and their counters."""

    kernel: str
    tile: str
    stages: str
    split: int
    grid: int
    workspace: int


def chain_of(entries: Sequence[int | str], h: int, w: int) -> Chain:
    """Of channels of the input and of every convolution, ``pool`` where one follows.

    Raises:
        ValueError: an entry is neither, two pools follow each other, or a map becomes smaller than a window.
    """
    cin, chain = entries[0], Chain([], [], [])
    if not isinstance(cin, int) or len(entries) < 2:
        raise ValueError(f"a chain is the channels of its input and of a convolution at least, not {entries}")
    for entry in entries[1:]:
        if entry == "pool":
            if not chain.program or chain.program[-1] & Step.POOL or min(h, w) < 2:
                raise ValueError(f"a pool needs a convolution before it and a map of 2x2 at least, here {h}x{w}")
            chain.program[-1] |= Step.POOL
            h, w = h // 2, w // 2
        elif isinstance(entry, int) and entry > 0:
            chain.inputs.append((cin, h, w))
            chain.couts.append(entry)
            chain.program.append(int(Step.RELU))
            cin = entry
        else:
            raise ValueError(f"{entry!r} in a chain; it has numbers of channels and `pool`")
    return chain


def triton_rows(chain: Chain, batch: int, dtype: torch.dtype, kernel: str, gpu: Architecture) -> list[Row]:
    """By kernels/configs.py, one for each convolution."""
    from vgg_fast.kernels.conv3x3 import launch_of

    rows = []
    for (cin, h, w), cout, step in zip(chain.inputs, chain.couts, chain.program, strict=True):
        precision = kernel.partition("_")[2] or "ieee"
        launch = launch_of(dtype, batch, h, w, cin, cout, True, bool(step & Step.POOL), gpu, precision=precision)
        o = launch.options
        tile = f"{o['BM']}x{o['BN']}x{o['BK']}, {o['num_warps']} warps"
        scratch = 4 * (launch.partials + launch.counters)
        rows.append(Row(kernel, tile, str(o["num_stages"]), o["SPLIT"], launch.grid[0], scratch))
    return rows


def cuda_rows(chain: Chain, batch: int, dtype: torch.dtype, kernel: str, gpu: Architecture) -> list[Row]:
    """By the planners of csrc/cuda, one for each convolution; the first two may be one launch."""
    cin, h, w = chain.inputs[0]
    layers = cuda_cases.plan_chain((batch, cin, h, w), chain.couts, chain.program, dtype, kernel, gpu)
    return [_cuda_row(layer, gpu) for layer in layers]


def _cuda_row(layer: cuda_cases.LayerPlan, gpu: Architecture) -> Row:
    cut, hopper = layer.plan, layer.hopper
    if layer.in_next:
        return Row("block1", "in the next launch", "", 1, 0, 0)
    if layer.kernel == cuda_cases.HOPPER:
        halves = (hopper.items - hopper.whole) // hopper.split
        tile = f"{hopper.rows}x{sm90.WIDTH}: {hopper.whole} whole, {halves} half"
        workspace = hopper.partial_bytes + hopper.counter_bytes
        return Row("conv3x3_sm90", tile, "", hopper.split, min(hopper.items, gpu.multiprocessors), workspace)
    if layer.kernel == cuda_cases.TENSOR_CORES:
        weights, halos = cuda_cases.stages()
        name = "conv3x3_mma"
        if layer.with_previous:
            name, halos = "block1", 1  # the map between the two convolutions
        tile = f"{cuda_cases.TILES[cut.tile]}, strips of {cut.strip}"
        return Row(name, tile, f"{halos} + {weights}", cut.split, cut.ctas, cut.partial_bytes + cut.counter_bytes)
    layer.args.pool = bool(layer.step & Step.POOL)
    blocks = cuda_cases.planner().plain_blocks_for(ctypes.byref(layer.args))
    return Row("conv3x3", "2x2 pixels x 4 a thread", "", 1, blocks, 0)


def table(chain: Chain, batch: int, precision: str, gpu: Architecture, kernel: str = "") -> str:
    """One line for each convolution: Triton's cut beside that of csrc/cuda.

    Args:
        chain: what is to run, as one call.
        batch: images.
        precision: of :data:`PRECISIONS`.
        gpu: that it is cut for.
        kernel: of csrc/cuda (``cuda_cases.FAMILIES``); by default the one that the backend ``cuda`` stands for.

    Raises:
        ValueError: the kernel does not run this.
    """
    dtype, setting = PRECISIONS[precision]
    problem = Problem(dtype, "cuda", f"sm_{gpu.sm}", setting)
    kernel = kernel or kernels_of("cuda", problem)[0]
    if reasons := objections(kernel, problem):
        raise ValueError("; ".join(reasons))
    (of_triton,) = kernels_of("triton", problem)
    columns = ("tile", "stages", "split", "grid", "workspace")
    header = ["layer", *(f"{of_triton}: tile", *columns[1:]), f"{kernel}: runs", *columns]
    lines = [header, ["---"] * len(header)]
    rows = zip(
        chain.inputs,
        chain.couts,
        chain.program,
        triton_rows(chain, batch, dtype, of_triton, gpu),
        cuda_rows(chain, batch, dtype, kernel, gpu),
        strict=True,
    )
    for (cin, h, w), cout, step, triton, cuda in rows:
        name = f"{cin}->{cout} {h}x{w}{' pool' if step & Step.POOL else ''}"
        lines.append([name, *map(str, triton[1:]), *map(str, cuda)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)) + " |" for line in lines
    )


def gpu_named(name: str) -> Architecture:
    """Of :data:`GPUS`, or ``sm_89:128``: compute capability and number of multiprocessors.

    Raises:
        ValueError: it is neither.
    """
    if name in GPUS:
        return GPUS[name]
    sm, _, multiprocessors = name.removeprefix("sm_").partition(":")
    if not (name.startswith("sm_") and sm.isdigit() and multiprocessors.isdigit() and int(multiprocessors)):
        known = ", ".join(GPUS)
        raise ValueError(f"there is no GPU {name!r} here; take one of {known}, or sm_89:128 (with its multiprocessors)")
    return Architecture(int(sm), int(multiprocessors))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="A100,H100", help=f"of {', '.join(GPUS)}, or sm_89:128; several with commas")
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--dtype", default="fp16", choices=PRECISIONS)
    parser.add_argument("--kernel", default="", choices=cuda_cases.FAMILIES, help="of csrc/cuda")
    parser.add_argument("--chain", default=",".join(map(str, VGG16)), help="channels of the input and of every layer")
    parser.add_argument("--size", default="224x224", help="of the images")
    options = parser.parse_args(arguments)
    try:
        entries = [entry if entry == "pool" else int(entry) for entry in options.chain.split(",")]
        h, w = map(int, options.size.split("x"))
        chain = chain_of(entries, h, w)
        for name in options.gpu.split(","):
            gpu = gpu_named(name)
            for batch in map(int, options.batch.split(",")):
                where = f"{name} (sm_{gpu.sm}, {gpu.multiprocessors} multiprocessors)"
                print(f"\n{where}, batch {batch}, {options.dtype}\n")
                print(table(chain, batch, options.dtype, gpu, options.kernel))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
