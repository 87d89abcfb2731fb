"""vgg-fast against PyTorch, torch.compile, ONNX Runtime and OpenVINO, in one process, in turns, answers checked first.

    python -m benchmarks.peers [--isa avx2|avx512|amx] [--dtype fp32,high,bf16] [--batch 1,8]
                               [--part features,model,scaling] [--layers] [--perceptual] [--train]
                               [--csv FILE] [--report FILE]

Needs ``pip install 'vgg-fast[peers]'``; whoever is not installed is left out, with the reason printed.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vgg_fast.bench.contest import Contest
    from vgg_fast.bench.scaling import Scaling

# PyTorch's setting of fp32 that belongs to each name; "high" allows three bf16 products in place of one in fp32.
PRECISIONS = {
    "fp32": ("float32", "highest"),
    "high": ("float32", "high"),
    "bf16": ("bfloat16", "highest"),
    "fp16": ("float16", "highest"),
}
CAPS = ("avx2", "avx512", "amx")  # the keys of benchmarks.engines.CAPS, which cannot be imported before they are set


def problems(
    names: list[str],
    batches: list[int],
    size: int,
    kinds: dict[str, bool],
    options: dict[str, Any],
    engines: Callable[[], dict[str, Any]],
) -> Iterator[tuple[str, Callable[[], Contest | Scaling]]]:
    """(what it is called, how to make it) of all that was asked for; PyTorch's precision is set as it is consumed."""
    import torch

    from benchmarks import steps
    from vgg_fast.bench import contest, peers, scaling

    for name in names:
        dtype, setting = getattr(torch, PRECISIONS[name][0]), PRECISIONS[name][1]
        torch.set_float32_matmul_precision(setting)
        if kinds["scaling"]:
            sizes = sorted(batches) if len(batches) > 1 else list(scaling.BATCHES)
            yield f"scaling {size}, {name}", partial(scaling.features, dtype, sizes, size)
        for batch in batches:
            where = f"{name}, batch {batch}"
            for part in ("features", "model"):
                if kinds[part]:
                    make = partial(getattr(contest, part), dtype, batch, size, engines=engines(), **options)
                    yield f"{part} {size}, {where}", make
            if kinds["perceptual"]:
                yield f"perceptual step {size}, {where}", partial(steps.perceptual, dtype, batch, size)
            if kinds["train"]:
                yield f"training step {size}, {where}", partial(steps.training, dtype, batch, size)
            for each in peers.LAYERS if kinds["layers"] else ():
                yield f"{each.name}, {where}", partial(contest.layer, each, dtype, batch)
    torch.set_float32_matmul_precision("highest")


def _choices(text: str, known: tuple[str, ...], option: str) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"there is no {name!r}; choose from {', '.join(known)}", param_hint=option)
    return chosen


def main(
    isa: Annotated[str, typer.Option(help="Cap every contestant alike: avx2, avx512 or amx.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, high (fp32 at PyTorch's 'high'), bf16, fp16.")] = "fp32,bf16",
    batch: Annotated[str, typer.Option(help="Batch size, or several with commas.")] = "1",
    part: Annotated[
        str, typer.Option(help="features, model (with the dense layers), scaling (threads, batches), none.")
    ] = "features",
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    layers: Annotated[bool, typer.Option(help="Each convolution by itself, at 224x224.")] = True,
    perceptual: Annotated[bool, typer.Option("--perceptual", help="Features twice and the gradient in x.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Forward and the gradients in all weights.")] = False,
    compile: Annotated[bool, typer.Option(help="With torch.compile; it compiles for long.")] = True,
    threads: Annotated[int, typer.Option(min=0, help="Of every contestant; 0: as many as PyTorch takes.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measuring.")] = 15,
    budget: Annotated[float, typer.Option(help="Seconds per problem after which no new round begins.")] = 60.0,
    csv: Annotated[Path, typer.Option(help="Where the rows go.")] = Path("build/peers.csv"),
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("build/peers.html"),
) -> None:
    """vgg-fast and its peers in one process, in turns; writes a CSV and an HTML report."""
    names = _choices(dtype, tuple(PRECISIONS), "--dtype")
    parts = _choices(part, ("features", "model", "none", "scaling"), "--part")
    if not all(b.strip().isdigit() and int(b) for b in batch.split(",")):
        raise typer.BadParameter(f"whole numbers from 1, separated by commas, not {batch!r}", param_hint="--batch")
    batches = [int(b) for b in batch.split(",")]
    _cap(_choices(isa, CAPS, "--isa")[0] if isa else None)
    kinds = {name: name in parts for name in ("features", "model", "scaling")}
    kinds |= {"perceptual": perceptual, "train": train, "layers": layers}
    _run(names, batches, size, kinds, compile, threads, rounds, budget, isa or None, csv, report)


def _cap(isa: str | None) -> None:
    """Starts over with the cap in the environment: the libraries read it while they are loaded."""
    from benchmarks.engines import CAPS as environments

    known = {key for environment in environments.values() for key in environment}
    present = {key: os.environ[key] for key in known if key in os.environ}
    wanted = environments[isa] if isa else {}
    if not isa and present:
        raise typer.BadParameter(
            f"{', '.join(sorted(present))} in the environment would cap some of the contestants: unset, or use --isa"
        )
    if present != wanted:
        for key in present:
            del os.environ[key]
        os.environ.update(wanted)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:]])


def _run(
    names: list[str],
    batches: list[int],
    size: int,
    kinds: dict[str, bool],
    compile: bool,
    threads: int,
    rounds: int,
    budget: float,
    isa: str | None,
    csv: Path,
    path: Path,
) -> None:
    import torch

    from benchmarks import engines
    from vgg_fast.bench import contest, host, peers, plots, report, roofline, scaling

    if threads:
        torch.set_num_threads(threads)
    try:
        plots.require()
    except plots.PlotsUnavailable as error:
        raise SystemExit(f"error: {error}") from None
    for file in (csv, path):  # now, and not after minutes of measuring
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}): contestants suffer from that unequally", flush=True)
    ceilings = roofline.measure_ceilings()
    print(f"ceilings: {ceilings.gflops} GFLOP/s, {ceilings.gbytes:.1f} GB/s, {ceilings.how}", flush=True)
    rows: list[dict[str, Any]] = []
    left_out: list[tuple[str, str, str]] = []
    failures: list[str] = []
    others = partial(engines.engines, torch.get_num_threads(), isa)
    for what, make in problems(names, batches, size, kinds, {"compiled": compile}, others):
        print(f"{what}: checking", flush=True)
        try:
            each = make()
        except contest.Disagreement as error:
            failures.append(f"wrong answer: {error}")
            print(f"  NOT TIMED, because our answer is wrong: {error}", flush=True)
            continue
        for who, why in each.left_out.items():
            left_out.append((who, what, why))
            print(f"  left out: {who}: {why}", flush=True)
        rows += (new := each.rows(each.time(rounds, budget)))
        for summary in scaling.summaries(new):
            print(f"  {summary}", flush=True)
        for row in new:
            ratio = "" if row["contestant"] == peers.OURS else f"  ratio {row['ratio_of_ours']:.2f}"
            times = f"{row['median_ms_per_image']:9.2f} ({row['min_ms_per_image']:.2f}) ms"
            print(f"  {row['contestant']:14}{times}  error {row['relative_error']:.1e}{ratio}", flush=True)
        del each  # before the next network, whose dense layers take half a gigabyte per contestant
    facts = {**host.describe(), **{f"{k}_version": v for k, v in engines.versions().items()}, "load_before": load}
    facts |= {f"{name}_gflops": round(value, 1) for name, value in ceilings.gflops.items()}
    facts["copy_gbytes_per_s"] = round(ceilings.gbytes, 2)
    host.write_csv(csv, [{**row, **{k: v for k, v in facts.items() if k not in row}} for row in rows])
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    report.write(path, report.Results(rows, facts, ceilings, left_out, failures, command))
    print(f"wrote {csv} and {path}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
