"""``make wheel-test``: one wheel, built here with nvcc, installed next to one PyTorch after another.

    python -m tests.wheel [--torch 2.14.1] [--no-suite]

Builds sdist and wheel, checks their size, tag, metadata and content, installs the wheel next to the PyTorch of this
environment and, with ``--torch``, next to that version in an environment of its own (a CUDA build takes 6 GB and is
deleted afterwards). In each: both libraries load and register their ops, and the CPU tests of the sdist pass.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES, MOST_SECONDS = 30e6, 600

# Tests of the sources and of the development environment, not of what is installed.
NOT_OF_THE_WHEEL = (
    *("test_house", "test_packaging", "test_docs", "test_sanitize", "test_cuda_build", "test_machine_code"),
    *("test_cuda_kernels", "test_report", "virtual_gpu"),
)

BOTH_LOAD = """
import sys, torch, vgg_fast
from vgg_fast import library
print("torch", torch.__version__, "at", vgg_fast.__file__)
assert vgg_fast.__file__.startswith(sys.argv[1]), "not the installed package"
assert library.missing("_C") is None, library.missing("_C")
cuda = next(library._PACKAGE.glob("_C_cuda.*so"), None)
if cuda is None:
    assert sys.argv[2] == "cpu", "the wheel has no _C_cuda"
else:
    expected = None if torch.version.cuda else "this PyTorch is a build without CUDA"
    assert library.missing("_C_cuda") == expected, library.missing("_C_cuda")
    if torch.version.cuda is None:
        torch.ops.load_library(cuda)  # it must load all the same: nothing in it is linked to CUDA
    for op in ("conv3x3", "maxpool2x2", "conv_stack"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vgg_fast_cuda::{op}", "CUDA"), op
y = torch.ops.vgg_fast.conv3x3(torch.ones(1, 3, 4, 4), torch.ones(8, 3, 3, 3))
assert y.sum() == 2400, y.sum()
print("both libraries load" if cuda else "the CPU library loads")
"""


def build(target: Path, **environment: str) -> tuple[Path, Path]:
    """sdist and wheel of the working tree, the wheel from the sdist; prints what they take.

    Raises:
        SystemExit: a build failed, or took more than it may.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
    print(f"built in {seconds:.0f} s on {os.cpu_count()} cores", flush=True)
    if seconds > MOST_SECONDS:
        raise SystemExit(f"the build took {seconds:.0f} s; it may take {MOST_SECONDS}")
    return sdist, wheel


def faults(wheel: Path, libraries: tuple[str, ...]) -> list[str]:
    """What is wrong with a wheel from outside: tag, size, content, and what its metadata would make pip install."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    required = [r for r in Parser().parsestr(metadata).get_all("Requires-Dist", []) if "extra ==" not in r]
    torches = [r for r in required if re.match(r"torch\b", r)]
    found = []
    if wheel.name.split("-")[2:4] != ["cp310", "abi3"]:
        found.append(f"{wheel.name} is not for every Python from 3.10 on")
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"{wheel.stat().st_size / 1e6:.1f} MB are more than {MOST_BYTES / 1e6:.0f}")
    if lacking := {f"vgg_fast/{name}.abi3.so" for name in libraries} - set(names):
        found.append(f"it lacks {sorted(lacking)}")
    if extra := [n for n in names if not n.startswith(("vgg_fast/", "vgg_fast-"))]:
        found.append(f"it has more than the package: {extra[:5]}")
    # A CPU build calls itself 2.13.0+cpu: "==", a local version or a package of NVIDIA's would replace or extend it.
    if torches != ["torch>=2.10"]:
        found.append(f"it asks for {torches}")
    if heavy := [r for r in required if re.match(r"nvidia|triton|cuda", r)]:
        found.append(f"it pulls {heavy}")
    return found


def linked_environment(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one behind its own; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "of_the_environment_around.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def own_environment(folder: Path, torch: str) -> Path:
    """A virtual environment with this version of PyTorch and what the tests need; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    # Compilers and linters are not of the suite; Triton comes with PyTorch, in the version that belongs to it.
    left_out = re.compile(r"(torch|triton|nvidia-|clang|ruff|mypy|selenium)")
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(line for line in lines if not left_out.match(line)))
    command = [python, "-m", "pip", "install", "--quiet", f"torch=={torch}", "-r", requirements]
    subprocess.run(command, check=True)
    return python


def install(wheel: Path, python: Path) -> None:
    """Installs the wheel alone, with the pip of this environment: the rest is there already."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, str(wheel)], check=True)


def check_libraries(python: Path, libraries: str, empty: Path) -> str:
    """Whether the installed libraries load and register their ops, asked in an empty folder; what was said.

    Args:
        python: of the environment.
        libraries: ``both``, or ``cpu`` for a wheel without ``_C_cuda``.
        empty: where to run: a checkout in the working folder would be imported in place of the package.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "-c", BOTH_LOAD, str(python.parents[1]), libraries]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"next to the PyTorch of {python}: {done.stdout}{done.stderr}")
    return done.stdout


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The sdist without the package itself, so that its tests import the one that is installed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    (source,) = folder.iterdir()
    shutil.rmtree(source / "vgg_fast")
    shutil.rmtree(source / "kernels")
    return source


def run_suite(python: Path, source: Path) -> None:
    """The CPU tests; pytest prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ignored = [f"--ignore=tests/{name}{'' if name == 'virtual_gpu' else '.py'}" for name in NOT_OF_THE_WHEEL]
    two_workers = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")  # as make test
    command = [python, "-m", "pytest", "-q", *two_workers, "-m", "not gpu", *ignored, "tests"]
    if code := subprocess.run(command, cwd=source, env=environment).returncode:
        raise SystemExit(f"the CPU tests fail next to the PyTorch of {python} (exit code {code})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", action="append", default=[], metavar="VERSION", help="also next to this PyTorch")
    parser.add_argument("--no-suite", action="store_true", help="only whether the libraries load")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    work = ROOT / "build/wheel-test"
    shutil.rmtree(work, ignore_errors=True)
    (work / "empty").mkdir(parents=True)
    sdist, wheel = build(work / "dist", VGG_FAST_CUDA="1")
    if found := faults(wheel, ("_C", "_C_cuda")):
        raise SystemExit("\n".join(found))
    source = unpack_tests(sdist, work / "source")
    for version in [None, *options.torch]:
        folder = work / f"torch-{version or 'here'}"
        try:
            python = own_environment(folder, version) if version else linked_environment(folder)
            install(wheel, python)
            print(check_libraries(python, "both", work / "empty"), flush=True)
            if not options.no_suite:
                run_suite(python, source)
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{wheel} is good")


if __name__ == "__main__":
    main()
