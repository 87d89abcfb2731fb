"""Predicted time of each layer of VGG16 at any batch size: a sample of each launch's CTAs is simulated, and scaled.

All tiles of a layer do the same work but for the pixels at the image's border, so the counters of some of them, spread
evenly, stand for all. What memory has to move is known without a simulation. The time is that of counters.predict, a
model; test_vgg16.py compares the scaling with complete runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.virtual_gpu import launch, triton_entry
from tests.virtual_gpu.cases import ARCHITECTURES, arguments_of, channels_last
from tests.virtual_gpu.counters import GPUS, Counters, Gpu, Prediction, predict
from tests.virtual_gpu.launch import compile_triton
from tests.virtual_gpu.machine_code import rows_of
from vgg_fast.kernels.configs import Config
from vgg_fast.kernels.conv3x3 import launch_of
from vgg_fast.models import cfgs

TARGET_OF = {"A100": 80, "H100": 90, "H200": 90}
SAMPLE = 8  # tiles


@dataclass(frozen=True)
class Layer:
    """A convolution of VGG16, and whether a pool follows; ``size`` pixels in a row and in a column."""

    cin: int
    cout: int
    size: int
    pool: bool

    def __str__(self) -> str:
        return f"{self.cin}->{self.cout} {self.size}x{self.size}{' pool' if self.pool else ''}"

    def flops(self, batch: int) -> int:
        return 2 * 9 * self.cin * self.cout * self.size**2 * batch

    def input_bytes(self, batch: int) -> int:
        return 2 * self.cin * self.size**2 * batch

    def output_bytes(self, batch: int) -> int:
        """Before the pool."""
        return 2 * self.cout * self.size**2 * batch

    @property
    def weight_bytes(self) -> int:
        return 2 * 9 * self.cin * self.cout


def layers(size: int = 224) -> Iterator[Layer]:
    """The thirteen convolutions, for images of ``size`` pixels squared."""
    cin = 3
    for here, following in itertools.pairwise(cfgs["D"]):
        if isinstance(here, int):
            yield Layer(cin, here, size, following == "M")
            cin = here
            size //= 2 if following == "M" else 1


@functools.cache
def simulate(layer: Layer, images: int, config: Config, target: int, tiles: int | None) -> tuple[Counters, int, int]:
    """Counters of some tiles of a launch (None: all), registers and shared memory. Values do not matter: all zeros."""
    size = (images, layer.size, layer.size, layer.cin, layer.cout)
    launched = launch_of(torch.float16, *size, True, layer.pool, ARCHITECTURES[target], config=config)
    x = channels_last(images, layer.cin, layer.size, layer.size, dtype=torch.float16).zero_()
    weight = torch.zeros(layer.cout, 3, 3, layer.cin, dtype=torch.float16)
    arguments = arguments_of(launched, x, weight, torch.zeros(2, layer.cout))
    compiled, _ = compile_triton(launched.kernel, arguments, target)
    (row,) = rows_of(compiled.asm["cubin"], "conv3x3", target)

    programs = config.split * math.ceil(layer.cout / config.bn)  # of the same pixels; one column stands for the others
    rows = launched.grid[0] // programs
    only: list[int] = []
    if tiles is not None and tiles < rows:
        chosen = [int((n + 0.5) * rows / tiles) for n in range(tiles)]
        only = [row * programs + part for row in chosen for part in range(config.split)]
    counters, scratch = Counters(), ["partials_ptr", "counters_ptr"] if launched.counters else []
    entry = triton_entry(launched.kernel, arguments, target)
    launch(entry, launched.grid, arguments, outputs=["out_ptr"], scratch=scratch, observer=counters, only=only)
    return counters, row["registers"], compiled.metadata.shared


def prediction(
    layer: Layer, batch: int, gpu: str, tiles: int | None = SAMPLE, config: Config | None = None
) -> tuple[Prediction, Config]:
    """Of a layer on a GPU, and the tile that it is cut into (or shall be)."""
    target = TARGET_OF[gpu]
    size = (batch, layer.size, layer.size, layer.cin, layer.cout)
    launched = launch_of(torch.float16, *size, True, layer.pool, ARCHITECTURES[target], config=config)
    options = launched.options
    names = ("BM", "BN", "BK", "num_warps", "num_stages", "SPLIT")
    config = Config(*(options[name] for name in names))
    # As many images as it takes until tiles begin where an image begins: after these, everything repeats.
    period = math.lcm(layer.size**2, config.bm) // layer.size**2
    counters, registers, shared = simulate(layer, min(batch, period), config, target, tiles)
    moved = layer.input_bytes(batch) + layer.output_bytes(batch) // (4 if layer.pool else 1) + layer.weight_bytes
    model = predict(counters, GPUS[gpu], registers, shared, launched.grid[0], moved + 8 * layer.cout)
    return model, config


def paper(batch: int, gpu: Gpu) -> dict[str, float]:
    """Seconds that VGG16 cannot beat: each launch takes the longer of its products and its traffic, at their peaks.

    A: convolution, batch norm, ReLU and pool are launches of their own. B: only the pool is. C: none is. D: nor is the
    first convolution, whose output stays on the multiprocessor (what it computes twice there is left out).
    """
    peak = gpu.sms * gpu.tensor * gpu.clock
    seconds = dict.fromkeys("ABCD", 0.0)
    first, *_ = layers()
    for layer in layers():
        products, read = layer.flops(batch), layer.input_bytes(batch) + layer.weight_bytes
        written = layer.output_bytes(batch)
        convolution = max(products / peak, (read + written) / gpu.hbm)
        pool = 1.25 * written / gpu.hbm if layer.pool else 0
        fused = max(products / peak, (read + written // (4 if layer.pool else 1)) / gpu.hbm)
        seconds["A"] += convolution + 4 * written / gpu.hbm + pool
        seconds["B"] += convolution + pool
        seconds["C"] += fused
        if layer.cin == first.cout and layer.pool:  # the second one, which does the first one's work as well
            read = first.input_bytes(batch) + layer.weight_bytes
            fused = max((products + first.flops(batch)) / peak, (read + written // 4) / gpu.hbm)
        seconds["D"] += fused if layer.cin != 3 else 0
    return seconds


def report(batches: list[int], names: list[str]) -> None:
    """Prints a table for each batch size: microseconds and share of the tensor peak of each layer, and their sums."""
    for batch in batches:
        print(f"\nVGG16 features, batch {batch}, 224x224, fp16: predicted us, share of the tensor cores' peak, bound\n")
        print("| layer | " + " | ".join(f"{name}: tile | us | share | bound" for name in names) + " |")
        print("|---|" + "---|---|---|---|" * len(names))
        sums = dict.fromkeys(names, 0.0)
        for layer in layers():
            cells = []
            for name in names:
                model, c = prediction(layer, batch, name)
                sums[name] += model.seconds
                split = f" / {c.split}" if c.split > 1 else ""
                cells += [f"{c.bm}x{c.bn}{split}", f"{model.seconds * 1e6:.1f}"]
                cells += [f"{layer.flops(batch) / peak(name) / model.seconds:.2f}", model.bound]
            print(f"| {layer} | " + " | ".join(cells) + " |", flush=True)
        flops = sum(layer.flops(batch) for layer in layers())
        totals = [f" | {sums[name] * 1e6:.0f} | {flops / peak(name) / sums[name]:.2f} | " for name in names]
        print("| all | " + " | ".join(totals) + " |")
        for name in names:
            limits = paper(batch, GPUS[name])
            print(f"{name}, paper: " + ", ".join(f"{form} {seconds * 1e6:.0f} us" for form, seconds in limits.items()))


def peak(name: str) -> float:
    """Operations per second of the tensor cores in 16 bits."""
    gpu = GPUS[name]
    return gpu.sms * gpu.tensor * gpu.clock
