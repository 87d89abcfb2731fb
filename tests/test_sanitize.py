"""The gates of ``make sanitize`` close: what they are there to catch is caught.

Nothing is planted in the library. The wrong access comes from the caller: a tensor that claims more memory, or another
alignment, than was allocated for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vgg_fast
from vgg_fast import selection

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "thread_sanitizer"

# --- AddressSanitizer and UndefinedBehaviorSanitizer ------------------------------------------------------------------

sanitized = pytest.mark.skipif(
    not os.environ.get("VGG_FAST_SANITIZE"), reason="the library is not a sanitizer's build: run make sanitize"
)

TENSOR_OVER = """
import ctypes, sys, torch, vgg_fast
ops, kernel = torch.ops.vgg_fast, sys.argv[1]
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
def tensor_over(values, short=0, shift=0):
    "The values in memory that is `short` bytes too small, `shift` bytes away from where malloc has it."
    size = values.numel() * values.element_size()
    address = malloc(size - short + shift) + shift
    ctypes.memmove(address, values.data_ptr(), size - short)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=values.dtype).view(values.shape)
dtype = torch.bfloat16 if kernel.endswith("bf16") else torch.float32
x, weight = torch.ones(2, 64, 9, 8, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
packed, affine = ops.pack(weight, None, None, None, None, None, 0.0, kernel)
def run(x, packed, affine):
    print(ops.conv_stack(x, [packed], [affine], [1], kernel, False).sum().item(), flush=True)
run(tensor_over(x), tensor_over(packed), tensor_over(affine))
"""


def runnable(dtype: torch.dtype) -> list[str]:
    """The CPU kernels that this machine runs in this dtype."""
    problem, names = selection.problem_on(dtype, torch.device("cpu")), []
    for kernel in selection.cpu_kernels():
        try:
            names.append(selection.select(problem, kernel))
        except RuntimeError:
            continue
    return names


def outcome(kernel: str, line: str) -> str:
    """What a process writes to stderr that does `line` after the same with honest tensors; it must not survive."""
    code = TENSOR_OVER + line + "\nprint('survived')"
    command = [sys.executable, "-c", code, kernel]
    # Not where a folder vgg_fast would come before the sanitized one on the path.
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=HERE)
    assert len(done.stdout.splitlines()) == 1, "honest tensors pass, the others do not: " + done.stdout + done.stderr
    assert done.returncode != 0
    return done.stderr


@sanitized
def test_it_is_the_sanitized_library_that_is_tested():
    assert Path(vgg_fast.__file__).is_relative_to(ROOT / "build/sanitize")


@sanitized
@pytest.mark.parametrize(
    "line", ["run(tensor_over(x, short=2), packed, affine)", "run(x, packed, tensor_over(affine, short=4))"]
)
def test_an_over_read_is_caught(line):
    assert "heap-buffer-overflow" in outcome("portable_f32", line)


# AMX tile loads are not instrumented: test_guard_pages.py watches them.
@sanitized
@pytest.mark.parametrize("kernel", [name for name in runnable(torch.bfloat16) if not name.startswith("amx")])
def test_an_over_read_by_intrinsics_is_caught(kernel):
    # Not "heap-buffer-overflow": that word is for accesses that lie outside as a whole, and this vector is half inside.
    assert "ERROR: AddressSanitizer" in outcome(kernel, "run(x, tensor_over(packed, short=4), affine)")


@sanitized
def test_undefined_behaviour_is_caught():
    assert "misaligned address" in outcome("portable_f32", "run(tensor_over(x, shift=1), packed, affine)")


# --- ThreadSanitizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """csrc/cpu and a main function, without Python and libgomp, built for ThreadSanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    target = tmp_path_factory.mktemp("thread_sanitizer") / "main"
    sources = [HERE / "main.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    target_version = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-pthread", "-w", target_version]
    headers = [f"-I{HERE}", "-isystem", str(Path(torch.__file__).parent / "include")]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [compiler, *flags, *headers, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if "cannot find -ltsan" in done.stderr or "libtsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr

    def run(*arguments: str) -> subprocess.CompletedProcess:
        # Some kernels scatter memory more widely than gcc 12's ThreadSanitizer can follow.
        fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
        command = [*fixed, str(target), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        if fixed and "personality" in done.stderr:  # not permitted in some containers, and not needed in most
            done = subprocess.run(command[2:], capture_output=True, text=True, env=environment, timeout=300)
        return done

    return run


def test_kernels_and_chains_have_no_data_race(program):
    done = program()
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ThreadSanitizer" not in done.stderr
    for kernel in runnable(torch.bfloat16):
        lines = [line for line in done.stdout.splitlines() if line.startswith(kernel + " ")]
        assert len(lines) == 4  # kChains
        assert all("same bits" in line for line in lines)
    assert "linear portable_f32   same bits" in done.stdout


def test_a_data_race_is_caught(program):
    done = program("race")
    assert done.returncode != 0
    assert "data race" in done.stderr
