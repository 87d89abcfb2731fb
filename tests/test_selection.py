"""Which kernel a machine would choose: a pure function, so also for machines nobody here has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vgg_fast
from vgg_fast import library, selection
from vgg_fast.selection import Problem, select

AVX2 = "avx2 fma f16c"
AVX512 = AVX2 + " avx512f avx512bw avx512vl avx512dq"
COOPER_LAKE = AVX512 + " avx512_bf16"
SAPPHIRE_RAPIDS = COOPER_LAKE + " amx_tile amx_bf16"


# What CPUs of these flags choose for fp32 at the three precisions, for fp16 and for bf16.
PORTABLE = ("portable_f32",) * 5
ON_AVX2 = ("avx2_winograd_f32",) * 3 + ("avx2_f32",) * 2
CPUS = [
    ("", *PORTABLE),
    ("avx2", *PORTABLE),  # AVX2 without FMA
    (AVX2, *ON_AVX2),
    (AVX2 + " avx512f", *ON_AVX2),  # Knights Landing: no BW and VL
    (AVX512, *("avx512_winograd_f32",) * 3, "avx512_f32", "avx512_f32"),
    # vdpbf16ps does the work of two multiply-adds at half their rate: Winograd is faster, and exacter.
    (COOPER_LAKE, *("avx512_winograd_f32",) * 3, "avx512_f32", "avx512_bf16"),
    (SAPPHIRE_RAPIDS, "avx512_winograd_f32", "amx_bf16x3", "amx_bf16", "amx_bf16x3", "amx_bf16"),
]
BY_NAME_ONLY = {"amx_bf16x6"}  # as exact as fp32 by AMX alone; Winograd is faster, and exacter


@pytest.mark.parametrize(("flags", "highest", "high", "medium", "fp16", "bf16"), CPUS)
def test_cpu_kernel_by_flags(flags, highest, high, medium, fp16, bf16):
    assert select(Problem(torch.float32, "cpu", flags)) == highest
    assert select(Problem(torch.float32, "cpu", flags, "high")) == high
    assert select(Problem(torch.float32, "cpu", flags, "medium")) == medium
    for precision in ("highest", "high", "medium"):  # a setting for fp32 does not touch the other types
        assert select(Problem(torch.float16, "cpu", flags, precision)) == fp16
        assert select(Problem(torch.bfloat16, "cpu", flags, precision)) == bf16


@pytest.fixture
def _precision():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "none"


@pytest.mark.usefixtures("_precision")
def test_fp32_follows_pytorchs_settings():
    assert selection.float32_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    assert selection.float32_precision() == "high"
    torch.backends.mkldnn.conv.fp32_precision = "ieee"  # the convolution's own setting wins
    assert selection.float32_precision() == "highest"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    assert selection.float32_precision() == "medium"
    cpu = torch.device("cpu")
    if "amx_bf16" in selection.problem_on(torch.float32, cpu).architecture.split():
        assert selection.choose(torch.float32, cpu) == "amx_bf16"
        torch.backends.mkldnn.conv.fp32_precision = "tf32"
        assert selection.choose(torch.float32, cpu) == "amx_bf16x3"
        torch.backends.mkldnn.conv.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        assert selection.choose(torch.float32, cpu) == "avx512_winograd_f32"


def table() -> dict[str, list[str]]:
    """The flags that each row of the table of micro-kernels asks for, as the source has it."""
    source = (Path(__file__).parents[1] / "csrc/cpu/microkernels.inc").read_text()
    rows = re.findall(r'^MICROKERNEL(?:_WINOGRAD)?\((\w+),\s*"([^"]*)"', source, re.M)
    return {name: flags.split() for name, flags in rows}


def test_the_table_is_the_librarys():
    assert set(selection.cpu_kernels()) <= set(table())  # those of another architecture are not compiled
    assert "portable_f32" in table()


@pytest.mark.parametrize("kernel", selection.cpu_kernels())
def test_every_row_of_the_table_is_chosen_somewhere(kernel):
    """Fails for a new row until :data:`CPUS` says which CPU would choose it, whether or not this machine can run it."""
    chosen = any(kernel in kernels for _, *kernels in CPUS)
    assert chosen != (kernel in BY_NAME_ONLY), f"no CPU of CPUS chooses {kernel}"


@pytest.mark.parametrize("kernel", selection.cpu_kernels())
def test_every_flag_of_a_row_is_needed(kernel):
    flags = table()[kernel]
    dtype = torch.float32  # which every kernel takes
    assert select(Problem(dtype, "cpu", " ".join(flags)), kernel) == kernel
    for flag in flags:
        others = " ".join(f for f in flags if f != flag)
        with pytest.raises(RuntimeError, match=f"kernel '{kernel}' needs the CPU flags '{flag}'"):
            select(Problem(dtype, "cpu", others), kernel)
        assert select(Problem(dtype, "cpu", others, "medium")) != kernel


@pytest.mark.parametrize(
    ("cap", "fp32", "bf16"),
    [
        ("portable", "portable_f32", ("portable_f32",)),
        ("avx2", "avx2_winograd_f32", ("avx2_f32",)),
        ("avx512", "avx512_winograd_f32", ("avx512_bf16", "avx512_f32")),
    ],
)
def test_vgg_fast_isa_caps_the_choice(monkeypatch, cap, fp32, bf16):
    cpu = torch.device("cpu")
    if cap != "portable" and cap + "_f32" not in runnable_kernels():
        pytest.skip(f"this CPU has no {cap}")
    uncapped = selection.choose(torch.float32, cpu)
    monkeypatch.setenv("VGG_FAST_ISA", cap)
    assert selection.choose(torch.float32, cpu) == fp32
    assert selection.choose(torch.bfloat16, cpu) in bf16
    monkeypatch.delenv("VGG_FAST_ISA")
    assert selection.choose(torch.float32, cpu) == uncapped


def runnable_kernels(dtype: torch.dtype = torch.bfloat16) -> list[str]:
    problem = selection.problem_on(dtype, torch.device("cpu"))
    names = []
    for kernel in selection.cpu_kernels():
        try:
            names.append(select(problem, kernel))
        except RuntimeError:
            continue
    return names


def test_a_wrong_cap_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("VGG_FAST_ISA", "avx3")
    with pytest.raises(RuntimeError, match="VGG_FAST_ISA is 'avx3'; it must be one of portable, avx2, avx512, amx"):
        torch.ops.vgg_fast.conv3x3(torch.ones(1, 3, 4, 4), torch.ones(4, 3, 3, 3))


def test_an_explicit_kernel_never_falls_back(monkeypatch):
    with pytest.raises(RuntimeError, match="'amx_bf16' needs the CPU flags 'amx_tile amx_bf16'"):
        select(Problem(torch.bfloat16, "cpu", COOPER_LAKE), "amx_bf16")
    with pytest.raises(RuntimeError, match="'triton' cannot run this: it runs on cuda, not cpu"):
        select(Problem(torch.float32, "cpu", ""), "triton")
    with pytest.raises(RuntimeError, match="needs sm_80 or newer, this GPU is sm_75"):
        select(Problem(torch.float16, "cuda", "sm_75"), "triton")
    with pytest.raises(RuntimeError, match=r"takes float32, bfloat16, float16, not torch.float64"):
        select(Problem(torch.float64, "cpu", AVX2), "cpu")
    with pytest.raises(RuntimeError, match="there is no backend 'tpu'; choose one of auto, cpu, triton"):
        select(Problem(torch.float32, "cpu", ""), "tpu")
    monkeypatch.setenv("VGG_FAST_ISA", "portable")
    with pytest.raises(RuntimeError, match="lacks or VGG_FAST_ISA forbids"):
        torch.ops.vgg_fast.conv3x3(torch.ones(1, 3, 4, 4), torch.ones(4, 3, 3, 3), None, False, False, "avx2_f32")


def test_auto_falls_back_to_the_reference_and_says_why():
    assert select(Problem(torch.float64, "cpu", AVX2)) == "reference"
    assert "cpu: it takes float32, bfloat16, float16, not torch.float64" in selection.why_reference(
        torch.float64, torch.device("cpu")
    )
    assert select(Problem(torch.float16, "cuda", "sm_90")) == "reference"


GPUS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("capability", GPUS)
def test_gpu_kernels_by_name_on_gpus_nobody_here_has(capability):
    """A backend's name follows PyTorch's setting for fp32, a kernel's name does not."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for dtype in (torch.float16, torch.bfloat16):
        for precision in ("highest", "high"):
            assert select(Problem(dtype, "cuda", capability, precision), "triton") == "triton"
        with pytest.raises(RuntimeError, match=f"kernel 'triton_tf32' takes float32, not {dtype}: take 'triton'"):
            select(Problem(dtype, "cuda", capability), "triton_tf32")
    ieee, tf32 = (Problem(torch.float32, "cuda", capability, precision) for precision in ("highest", "high"))
    assert select(ieee, "triton") == "triton"
    assert select(tf32, "triton") == "triton_tf32"
    for problem in (ieee, tf32):
        assert select(problem, "triton_tf32") == "triton_tf32"
        assert select(problem, "triton_bf16x3") == "triton_bf16x3"


@pytest.mark.parametrize("capability", GPUS)
def test_hopper_has_a_cuda_kernel_of_its_own_and_another_to_stand_in(capability):
    """16 bits and tf32 on sm_90 alone; of the rules themselves, as this machine may lack the library."""
    for dtype in (torch.float16, torch.bfloat16):
        problem = Problem(dtype, "cuda", capability)
        assert selection.kernels_of("triton", problem) == ["triton"]
        assert selection.kernels_of("cuda", problem) == (["cuda_wgmma", "cuda"] if capability == "sm_90" else ["cuda"])
        reason = f"kernel 'cuda_wgmma' is for sm_90 alone, this GPU is {capability}: take 'cuda'"
        assert selection.objections("cuda_wgmma", problem) == ([] if capability == "sm_90" else [reason])
        assert selection.objections("cuda", problem) == []
    for precision, kernels in (("highest", ["cuda"]), ("high", ["cuda_wgmma_tf32", "cuda_tf32"])):
        problem = Problem(torch.float32, "cuda", capability, precision)
        assert selection.kernels_of("cuda", problem) == (kernels if capability == "sm_90" else kernels[-1:])
        assert "takes bfloat16 and float16, not torch.float32" in selection.objections("cuda_wgmma", problem)[0]


def test_cuda_wgmma_by_name_never_falls_back():
    with pytest.raises(RuntimeError, match="'cuda_wgmma' is for sm_90 alone, this GPU is sm_100: take 'cuda'"):
        select(Problem(torch.float16, "cuda", "sm_100"), "cuda_wgmma")
    with pytest.raises(RuntimeError, match="'cuda_wgmma_tf32' is for sm_90 alone, this GPU is sm_80: take 'cuda_tf32'"):
        select(Problem(torch.float32, "cuda", "sm_80"), "cuda_wgmma_tf32")
    with pytest.raises(RuntimeError, match=r"'cuda_wgmma' takes bfloat16 and float16, not torch.float32"):
        select(Problem(torch.float32, "cuda", "sm_90"), "=cuda_wgmma")


def test_names_of_kernels_and_of_backends():
    """A backend's name passes over what is switched off, a kernel's does not; `=` tells which of them is meant."""
    pytest.importorskip("triton", reason="Triton is not installed")
    problem = Problem(torch.float32, "cuda", "sm_90", "high")
    assert select(problem, "triton") == "triton_tf32"
    assert select(problem, selection.exactly("triton")) == "triton"
    assert select(problem, "triton", {"triton_tf32"}) == "triton_tf32"  # nothing stands in: whoever asked will refuse
    with pytest.raises(RuntimeError, match="there is no backend '=cpu'"):
        select(problem, "=cpu")
    if library.missing("_C_cuda") is None:
        hopper = Problem(torch.float16, "cuda", "sm_90")
        assert (select(hopper, "cuda"), select(hopper, "=cuda")) == ("cuda_wgmma", "cuda")
        assert select(hopper, "cuda", {"cuda_wgmma"}) == "cuda"
        assert select(hopper, "cuda_wgmma", {"cuda_wgmma"}) == "cuda_wgmma"


def test_what_is_timed_on_a_gpu():
    """`auto` itself takes nothing that was not timed; bf16x3, less exact than what was asked for, is by name only."""
    pytest.importorskip("triton", reason="Triton is not installed")
    lacking = library.missing("_C_cuda") is not None
    for precision, suffix in (("highest", ""), ("high", "_tf32")):
        problem = Problem(torch.float32, "cuda", "sm_90", precision)
        of_cuda = [*(["cuda_wgmma_tf32"] if suffix else []), f"cuda{suffix}"]
        assert selection.candidates(problem) == [f"triton{suffix}", *([] if lacking else of_cuda)]
        assert select(problem) == "reference"
    on_hopper = selection.candidates(Problem(torch.float16, "cuda", "sm_90"))
    assert on_hopper == ["triton", "cuda_wgmma", "cuda"][: 1 if lacking else 3]
    assert selection.candidates(Problem(torch.float16, "cuda", "sm_75")) == []
    assert selection.candidates(Problem(torch.float64, "cuda", "sm_90")) == []
    assert selection.candidates(Problem(torch.float32, "cpu", AVX512)) == []
    assert selection.layout("triton_tf32") == selection.layout("cuda") != selection.layout("avx2_f32")


def test_a_kernel_that_failed_its_self_test_is_refused_and_not_timed(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(selection, "_switched_off", {})
    assert selection.choose(torch.float32, device, "portable_f32") == "portable_f32"
    selection.switch_off("portable_f32", device, "2 of 3 values differ")
    with pytest.raises(RuntimeError, match="kernel 'portable_f32' is switched off on cpu: 2 of 3 values differ"):
        selection.choose(torch.float32, device, "portable_f32")


# In a process of its own: some of these settings cannot be put back. Warnings are errors there.
SETTINGS = """
import itertools
import torch
from vgg_fast.selection import float32_precision

def gpu():
    return float32_precision(device_type="cuda")

backends = torch.backends
assert gpu() == "high"  # PyTorch's default, of convolutions alone
backends.cudnn.allow_tf32 = False
assert gpu() == "highest"
backends.cudnn.allow_tf32 = True
assert gpu() == "high"
assert float32_precision() == "highest"  # a setting of the GPU's does not concern the CPU
backends.cudnn.conv.fp32_precision = "ieee"  # the new name for the same, after the old one
assert gpu() == "highest"
backends.cudnn.conv.fp32_precision = "none"
backends.fp32_precision = "tf32"  # which it inherits from
assert (gpu(), float32_precision()) == ("high", "high")
backends.cudnn.fp32_precision = "ieee"
assert gpu() == "highest"
for values in itertools.product(("none", "ieee", "tf32"), repeat=3):  # "none" inherits; none of them is ieee
    backends.cudnn.conv.fp32_precision, backends.cudnn.fp32_precision, backends.fp32_precision = values
    assert gpu() == ("high" if [*filter("none".__ne__, values), "none"][0] == "tf32" else "highest"), values
backends.cudnn.fp32_precision = backends.fp32_precision = "none"
for allowed in (False, True, False, True):
    backends.cudnn.allow_tf32 = allowed
    assert (gpu() == "high") == torch.backends.cudnn.allow_tf32 == allowed
backends.cuda.matmul.fp32_precision = "tf32"  # after which torch.get_float32_matmul_precision() raises
assert float32_precision() == "highest"
"""


def test_fp32_on_a_gpu_follows_cudnns_setting_by_either_name():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SETTINGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_backends_gives_a_reason_for_all_that_is_missing():
    status = {b.name: b for b in vgg_fast.backends()}
    assert list(status) == ["cpu", "triton", "cuda", "reference"]
    assert status["reference"].available
    assert status["cpu"].available
    assert all(b.available != bool(b.reason) for b in status.values())
    if not torch.cuda.is_available():
        assert status["triton"].reason.startswith("there is no CUDA device")
