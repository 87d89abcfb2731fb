"""Peak extra memory of inference: VGG16-BN's features through vgg-fast and through PyTorch eager in channels_last.

    python -m benchmarks.memory [--dtype fp32,bf16] [--batch 1,8] [--size 224] [--csv FILE]

Every figure comes from a process of its own: the most memory that it ever had during two forwards (VmHWM of /proc, set
back before them) less what it had before. By then it has run images of 32x32, so that libraries are loaded, threads are
started and weights are packed; what stays from one forward to the next, such as scratch memory of the threads, counts.
Needs Linux and glibc, whose allocator is told to give freed memory back at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

# Without these glibc keeps freed blocks of up to 32 MB, and a peak may hide in what was kept.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CONTESTANTS = ("channels_last", "vgg_fast")


def kilobytes(field: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Sets VmHWM back to what there is now.

    Raises:
        OSError: this system has no such switch.
    """
    Path("/proc/self/clear_refs").write_text("5")


def child(contestant: str, dtype: str, batch: int, size: int) -> None:
    """Prints the peak extra memory in megabytes; for a process of its own."""
    import torch

    from vgg_fast.bench import peers

    network = peers.plain_features()
    peers.calibrate(network, torch.randn(1, 3, 32, 32))
    network = network.to(getattr(torch, dtype))
    module = peers.contestants(network)[contestant]
    small, x = (torch.randn(batch, 3, side, side).to(getattr(torch, dtype)) for side in (32, size))
    x = x.contiguous(memory_format=module.memory_format)
    del network
    for _ in range(2):
        module.on(small)()
    call = module.on(x)
    before = kilobytes("VmRSS")
    reset_peak()
    for _ in range(2):
        call()
    print((kilobytes("VmHWM") - before) * 1024 / 1e6)


def peak(contestant: str, dtype: str, batch: int, size: int = 224) -> float:
    """Megabytes that a forward needs beyond the model and its input.

    Args:
        contestant: one of :data:`CONTESTANTS`.
        dtype: a key of :data:`DTYPES`.
        batch: of images.
        size: of the images.

    Raises:
        RuntimeError: with what the process said.
    """
    arguments = [contestant, DTYPES[dtype], str(batch), str(size)]
    code = "import sys; from benchmarks import memory; memory.child(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), *sys.path]))
    environment = {**os.environ, **GLIBC, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {' '.join(arguments)}: {done.stderr[-2000:]}")
    return float(done.stdout)


def main(
    dtype: Annotated[str, typer.Option(help="fp32, bf16, or both with a comma.")] = "fp32,bf16",
    batch: Annotated[str, typer.Option(help="Batch size, or several with commas.")] = "1,8",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    csv: Annotated[Path, typer.Option(help="Where the rows go.")] = Path("build/memory.csv"),
) -> None:
    """Peak extra memory of inference, and the ratio to eager's; writes a CSV."""
    from vgg_fast.bench import host

    for name in dtype.split(","):
        if name not in DTYPES:
            raise typer.BadParameter(f"there is no {name!r}; choose from {', '.join(DTYPES)}", param_hint="--dtype")
    if not all(b.isdigit() and int(b) for b in batch.split(",")):
        raise typer.BadParameter(f"whole numbers from 1, separated by commas, not {batch!r}", param_hint="--batch")
    csv.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in dtype.split(","):
        for images in map(int, batch.split(",")):
            peaks = {contestant: peak(contestant, name, images, size) for contestant in CONTESTANTS}
            ratio = peaks["vgg_fast"] / peaks["channels_last"]
            text = ", ".join(f"{who} {megabytes:.1f} MB" for who, megabytes in peaks.items())
            print(f"features {size}, {name}, batch {images}: {text}, ratio {ratio:.2f}", flush=True)
            for who, megabytes in peaks.items():
                place = {"problem": f"features {size}", "precision": name, "batch": images, "contestant": who}
                rows.append({**place, "peak_extra_megabytes": round(megabytes, 2), "ratio_of_ours": round(ratio, 4)})
    host.write_csv(csv, rows)
    print(f"wrote {csv}")


if __name__ == "__main__":
    typer.run(main)
