"""The gates on machine code, for every GPU kernel that is shipped; virtual_gpu/machine_code.py makes the table.

What a kernel does not reach yet stands in EXPECTED_MISSES with the figure that was measured. A kernel that gets worse
fails, and so does one that gets better: then its line is to be changed or removed. The figures are those of the
compilers pinned in requirements-dev.txt.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from gpu_kernels import CUDA, ROOT

pytest.importorskip("triton", reason="Triton is not installed, whose package holds ptxas and the disassembler")
from tests.virtual_gpu import machine_code
from tests.virtual_gpu.cuda_cases import TILES
from tests.virtual_gpu.machine_code import CUDA_SMS, TRITON_SMS, Row, misses
from tests.virtual_gpu.sm90 import HEIGHTS
from vgg_fast.kernels import configs

SIXTEEN_BITS = "fp16 256->256 in {}".format

# Rows that are not 16-byte aligned are loaded one by one; csrc/cuda/conv3x3 has neither tensor cores nor shared memory.
EXPECTED_MISSES: dict[tuple[str, str], dict[int, dict[str, Any]]] = {
    # 18 copies and 16 rows of addresses instead of 16 and 8: that is what it saves bytes from the L2 with.
    ("triton conv3x3", SIXTEEN_BITS("512x64x64, 8 warps")): {90: {"k_step": 203.0}},
    ("triton conv3x3", SIXTEEN_BITS("512x64x64, 8 warps, pooled")): {90: {"k_step": 203.0}},
    # Unpooled 6 (sm_90) or 21 (sm_100), where the accumulators come from tensor memory in another layout.
    ("triton conv3x3", SIXTEEN_BITS("256x128x64, 8 warps, pooled")): {100: {"barriers": 29}},
    ("triton conv3x3", SIXTEEN_BITS("128x128x64, 8 warps, pooled")): {90: {"barriers": 12}, 100: {"barriers": 29}},
    ("triton conv3x3", SIXTEEN_BITS("256x64x64, 8 warps, pooled")): {100: {"barriers": 29}},
    ("triton conv3x3", SIXTEEN_BITS("128x64x64, 4 warps, pooled")): {100: {"barriers": 29}},
    ("triton conv3x3", SIXTEEN_BITS("64x64x64, 4 warps, pooled")): {90: {"barriers": 12}, 100: {"barriers": 29}},
    ("triton conv3x3", "bf16 3->64 in 128x64x32, 4 warps"): {
        80: {"loads": {"LDG.16": 43, "LDG.64": 8}},
        89: {"loads": {"LDG.16": 43, "LDG.64": 8}},
        90: {"loads": {"LDG.16": 43, "LDG.64": 16}},
        100: {"loads": {"LDG.16": 43, "LDG.128": 32}},
        120: {"loads": {"LDG.16": 43, "LDG.64": 8}},
    },
    ("triton conv3x3", "tf32 3->64 in 128x64x32, 4 warps"): {
        80: {"loads": {"LDG.32": 43, "LDG.64": 8}},
        89: {"loads": {"LDG.32": 43, "LDG.64": 8}},
        90: {"loads": {"LDG.32": 43, "LDG.64": 16}},
        100: {"loads": {"LDG.32": 43, "LDG.128": 32}},
        120: {"loads": {"LDG.32": 43, "LDG.64": 8}},
    },
    ("triton conv3x3", "ieee 3->64 in 64x64x16, 4 warps"): {sm: {"loads": {"LDGSTS.32": 16}} for sm in TRITON_SMS},
    ("triton conv3x3", "fp16 37->53 in 128x64x32, 4 warps"): {
        80: {"loads": {"LDG.16": 46}, "overhead": 718},
        89: {"loads": {"LDG.16": 46}},
        90: {"loads": {"LDG.16": 46}, "overhead": 475},
        100: {"loads": {"LDG.16": 46}},
        120: {"loads": {"LDG.16": 46}},
    },
    ("cuda conv3x3", "bf16 x1"): {sm: {"tensor": "none", "loads": {"LDG.16": 52}} for sm in CUDA_SMS},
    ("cuda conv3x3", "bf16 x4"): {sm: {"tensor": "none", "loads": {"LDG.64": 52}} for sm in CUDA_SMS},
    ("cuda conv3x3", "fp16 x1"): {sm: {"tensor": "none", "loads": {"LDG.16": 52}} for sm in CUDA_SMS},
    ("cuda conv3x3", "fp16 x4"): {sm: {"tensor": "none", "loads": {"LDG.64": 52}} for sm in CUDA_SMS},
    ("cuda conv3x3", "fp32 x1"): {sm: {"loads": {"LDG.32": 52}} for sm in CUDA_SMS},
    ("cuda conv3x3", "fp32 x4"): {sm: {"loads": {"LDG.128": 52}} for sm in CUDA_SMS},
}


@functools.cache
def rows() -> list[Row]:
    """The whole table, made in processes that have not seen Triton's interpreter, half of the architectures in each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.virtual_gpu.machine_code", "--json"]
    halves = ([str(sm) for sm in TRITON_SMS[start::2]] for start in (0, 1))
    processes = [
        subprocess.Popen([*command, *sms], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for sms in halves
    ]
    tables = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [Row(**row) for table in tables for row in json.loads(table)]


def missed(sm: int, family: str) -> dict[tuple[str, str], dict[str, Any]]:
    of_sm = [row for row in rows() if row.sm == sm and row.kernel.startswith(family)]
    found = {(row.kernel, row.configuration + ", pooled" * row.pool): misses(row, of_sm) for row in of_sm}
    assert len(found) == len(of_sm)
    return {key: gates for key, gates in found.items() if gates}


def expected(sm: int, family: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {key: by_sm[sm] for key, by_sm in EXPECTED_MISSES.items() if key[0].startswith(family) and sm in by_sm}


@pytest.mark.parametrize("sm", TRITON_SMS)
def test_triton(sm: int) -> None:
    kernels = [row.kernel for row in rows() if row.sm == sm and row.kernel.startswith("triton")]
    assert kernels.count("triton maxpool2x2") == len(machine_code.MAXPOOL2X2)
    assert kernels.count("triton conv3x3") >= 3 * len(configs.TILES[configs.family(sm)]["16 bits"])
    assert missed(sm, "triton") == expected(sm, "triton")


@pytest.mark.parametrize("sm", CUDA_SMS)
def test_cuda(sm: int) -> None:
    names = {(row.kernel, row.configuration) for row in rows() if row.sm == sm and row.kernel.startswith("cuda")}
    if not names:
        pytest.skip("no nvcc in $CUDA_HOME, on the PATH, in /usr/local/cuda or among the Python packages")
    forms = ("maxpool2x2 x1", "maxpool2x2 x{}", "maxpool2x2_columns x{}", "maxpool2x2_backward x1")
    forms += ("maxpool2x2_backward x{}", "maxpool2x2_backward_columns x{}")
    wanted = {("cuda block1", dtype) for dtype in ("fp16", "bf16")}
    hopper = {("cuda conv3x3_sm90", f"{dtype} {rows}") for dtype in ("fp16", "bf16", "tf32") for rows in HEIGHTS}
    wanted |= hopper if sm == 90 else set()
    for dtype, packet in (("fp32", 4), ("fp16", 8), ("bf16", 8)):
        wanted |= {("cuda conv3x3", f"{dtype} x{elements}") for elements in (1, 4)}
        wanted |= {*(("cuda maxpool2x2", f"{dtype} {form.format(packet)}") for form in forms)}
        wanted |= {("cuda conv3x3_mma", f"{dtype.replace('fp32', 'tf32')} {tile}") for tile in TILES}
    assert names == wanted
    dynamic = {row.kernel for row in rows() if row.kernel.startswith("cuda") and row.shared}
    with_shared = {f.stem for f in CUDA.glob("*.cu*") if "extern __shared__" in f.read_text()}
    assert dynamic == {f"cuda {stem}" for stem in with_shared}, "the table must add dynamic shared memory"
    of_tensor_cores = [row for row in rows() if row.kernel in ("cuda conv3x3_mma", "cuda block1")]
    assert {row.loads.keys() <= {"LDGSTS.128"} and row.tensor > 0 for row in of_tensor_cores} == {True}
    assert missed(sm, "cuda") == expected(sm, "cuda")


def row(**columns: Any) -> Row:
    """A row that passes every gate, but for what is said."""
    good = Row(
        kernel="triton conv3x3", sm=80, configuration="fp16", pool=False, threads=128, registers=200, stack=0, local=0,
        shared=98_304, tensor=128, barriers=9, shuffles=0, sass=1352, loop=306, loads={"LDGSTS.128": 16}, k_step=306.0,
        overhead=130,
    )  # fmt: skip
    return replace(good, **columns)


@pytest.mark.parametrize(
    ("columns", "gates"),
    [
        ({}, {}),
        ({"stack": 16}, {"spills": 16}),
        ({"local": 2}, {"spills": 2}),
        ({"shared": 163 * 1024 + 1}, {"shared": 163 * 1024 + 1}),
        ({"sm": 120, "shared": 98_304 + 4096}, {"shared": 98_304 + 4096}),
        ({"threads": 384}, {"registers": 200}),
        ({"kernel": "cuda conv3x3", "registers": 172}, {"registers": 172}),
        ({"kernel": "cuda block1", "registers": 255}, {}),
        ({"kernel": "cuda block1", "registers": 257}, {"registers": 257}),
        ({"kernel": "cuda conv3x3_mma", "configuration": "fp16 256x128", "registers": 255, "threads": 256}, {}),
        ({"kernel": "cuda conv3x3_mma", "configuration": "fp16 128x64", "registers": 172}, {"registers": 172}),
        ({"kernel": "cuda conv3x3_mma", "configuration": "fp16 256x128", "k_step": 321.0}, {"k_step": 321.0}),
        (
            {"kernel": "cuda conv3x3_mma", "configuration": "tf32 128x64", "registers": 160, "tensor": 0},
            {"tensor": "none"},
        ),
        ({"kernel": "cuda conv3x3_sm90", "registers": 168, "threads": 384, "loop": 80}, {}),
        (
            {"kernel": "cuda conv3x3_sm90", "registers": 176, "threads": 384, "loop": 81},
            {"registers": 176, "loop": 81},
        ),
        ({"loads": {"LDGSTS.128": 15, "LDGSTS.64": 2}}, {"loads": {"LDGSTS.64": 2}}),
        ({"loads": {"LDG.128": 16}}, {"loads": {"LDG.128": 16}}),
        ({"loads": {"UTMALDG": 2}}, {}),
        ({"loads": {}}, {"loads": "none"}),
        ({"tensor": 0}, {"tensor": "none"}),
        ({"configuration": "ieee"}, {"tensor": 128}),
        ({"configuration": "tf32", "tensor": 0}, {"tensor": "none"}),
        ({"shuffles": 256}, {"shuffles": 256}),
        ({"shuffles": 1}, {"shuffles": 1}),
        ({"shuffles": 1, "configuration": "fp16, sum of parts"}, {}),
        ({"k_step": 310.5}, {"k_step": 310.5}),
        ({"sm": 90, "k_step": 181.0}, {"k_step": 181.0}),
        ({"sm": 100, "k_step": None}, {}),
        ({"k_step": None, "overhead": 135}, {"overhead": 135}),
        ({"k_step": 306.0, "overhead": 135}, {}),
        ({"kernel": "triton maxpool2x2", "loads": {"LDG.16": 4}, "tensor": 0}, {}),
    ],
    ids=str,
)
def test_each_gate_can_fail(columns: dict[str, Any], gates: dict[str, Any]) -> None:
    assert misses(row(**columns), [row(**columns)]) == gates


def test_the_pooled_form_is_compared_with_its_own_unpooled_one() -> None:
    plain, pooled, other = row(barriers=9), row(barriers=11, pool=True), row(barriers=3, configuration="bf16")
    assert misses(pooled, [plain, pooled, other]) == {"barriers": 11}
    assert misses(replace(pooled, barriers=9), [plain, pooled, other]) == {}
    assert misses(plain, [plain, replace(pooled, barriers=2)]) == {}


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!P0 LDG.E.64 R2, [R4.64] ;
        /*0020*/                   FFMA R2, R2, R2, R2 ;
        /*0030*/                   FFMA R2, R2, R2, R2 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R1], [R2.64], P0 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   HMMA.16816.F32 R4, R68.reuse, R72, R4 ;
        /*0080*/              @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
"""


def test_the_main_loop_is_the_innermost_that_multiplies_the_most() -> None:
    opcodes, loop = machine_code.disassembled(LISTING)
    assert len(opcodes) == 13
    assert [op.split(".")[0] for op in loop] == ["LDGSTS", "LDGDEPBAR", "HMMA", "UIADD3", "BAR", "BRA"]
    opcodes, loop = machine_code.disassembled(LISTING.replace("HMMA.16816.F32", "IMAD"))
    assert [op.split(".")[0] for op in loop] == ["LDG", "FFMA", "FFMA", "BRA"]
    opcodes, loop = machine_code.disassembled(LISTING.replace("HMMA.16816.F32", "IMAD").replace("FFMA", "IMAD"))
    assert loop == opcodes
    beside = LISTING.replace("FFMA R2", "HMMA.16816.F32 R4")  # two loops in a third: the second has fewer products
    assert [op.split(".")[0] for op in machine_code.disassembled(beside)[1]] == ["LDG", "HMMA", "HMMA", "BRA"]
    with pytest.raises(RuntimeError, match="no instruction found"):
        machine_code.disassembled("nothing")


@pytest.mark.parametrize(
    ("opcode", "load", "products"),
    [
        ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDGSTS.128", 0),
        ("LDGSTS.E.LTC128B", "LDGSTS.32", 0),
        ("LDG.E.U16.CONSTANT", "LDG.16", 0),
        ("LDG.E.64", "LDG.64", 0),
        ("LDGDEPBAR", None, 0),
        ("UTMALDG.2D", "UTMALDG", 0),
        ("HMMA.16816.F32.BF16", None, 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", None, 16 * 8 * 8),
        ("IMMA.16832.S8.S8", None, 16 * 8 * 32),
        ("HGMMA.64x128x16.F32", None, 64 * 128 * 16 // 4),
        ("HADD2.F32", None, 0),
    ],
)
def test_what_an_opcode_says(opcode: str, load: str | None, products: int) -> None:
    assert machine_code.global_load(opcode) == load
    assert machine_code.multiply_adds(opcode) == products


def test_the_table_for_people_names_the_misses() -> None:
    text = machine_code.table([row(), row(sm=90, k_step=334.0)])
    header, first, second = text.splitlines()
    assert (header.split()[-1], first.split()[-1]) == ("misses", "-")
    assert second.endswith(" k_step: 334.0")
