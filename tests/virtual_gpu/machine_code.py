"""One table of what the compilers make of every GPU kernel, and the gates it should pass.

    python -m tests.virtual_gpu.machine_code            # both families, every architecture, for people
    python -m tests.virtual_gpu.machine_code --json 80  # sm_80, for test_machine_code.py

Triton's kernels are compiled ahead of time as a launch would compile them, those of csrc/cuda by nvcc. No GPU is
needed: ptxas and the disassembler come with Triton. A process of its own for each table, because Triton's interpreter
leaves ``triton.language`` patched in the process that used it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from tests.virtual_gpu.cases import CUDA, find_nvcc
from tests.virtual_gpu.launch import compile_triton
from tests.virtual_gpu.sm90 import shared_bytes
from vgg_fast.kernels import conv3x3, maxpool2x2

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON_SMS, CUDA_SMS = (80, 90, 100, 120), (80, 90)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MANGLED = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}

# One row per form of the kernel that a VGG launches: dtype, cin, cout, pool.
CONV3X3 = (
    (torch.float16, 256, 256, False),
    (torch.float16, 256, 256, True),
    (torch.bfloat16, 64, 64, True),
    (torch.bfloat16, 3, 64, False),
    (torch.float16, 37, 53, False),  # every mask, and no row aligned
    (torch.float32, 37, 53, False),
    (torch.float32, 256, 256, False),
    (torch.float32, 256, 256, True),
)
MAXPOOL2X2 = ((torch.float16, 64), (torch.bfloat16, 64), (torch.float32, 1))

# Multiply-adds of one warp of four in a k-step of 128 x 128 x 64, the tile that the limits below were set for. A
# smaller tile multiplies less with as many address computations, so its count is scaled to the same work.
K_STEP = 128 * 128 * 64 // 4
K_STEP_LIMIT = {80: 310, 90: 180}  # what a kernel of this project once measured, with addresses hoisted: 306 and 174
SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}  # per CTA; CUDA guide, compute capabilities
REGISTERS = 65536  # of a multiprocessor
RESIDENT = {"triton": 2, "cuda": 3, "cuda conv3x3_sm90": 1}  # CTAs that should fit one
HOPPER_K_STEP = 80  # conv3x3_sm90: addresses are in its descriptors, a k-step is 8 wgmma and little else; measured: 77


@dataclass(frozen=True)
class Row:
    """One kernel, compiled.

    Attributes:
        kernel, sm, configuration: which; ``pool`` marks the pooled form of a configuration.
        threads: of a CTA.
        registers, stack, shared: of a thread, of a thread, of a CTA; bytes. Dynamic shared memory is not in a cubin:
            that of Triton's kernels and of conv3x3_sm90 is added, the others of csrc/cuda have none.
        local: instructions that access local memory: spills.
        tensor, barriers, shuffles, sass, loop: instructions; ``loop`` those of the main loop, the one that multiplies.
        loads: global loads of the main loop, by opcode and width; where other warps do them, their TMA copies.
        k_step: instructions of the main loop, scaled to the multiply-adds of one k-step of 128 x 128 x 64 with four
            warps; None without tensor instructions, or where they do not say their shape (tcgen05).
    """

    kernel: str
    sm: int
    configuration: str
    pool: bool
    threads: int
    registers: int
    stack: int
    shared: int
    local: int
    tensor: int
    barriers: int
    shuffles: int
    sass: int
    loop: int
    loads: dict[str, int]
    k_step: float | None


def triton_launches() -> Iterator[tuple[str, str, bool, Any, dict[str, Any]]]:
    """Name, configuration, pool, function and arguments of every Triton row. 7: a size of which nothing is known."""

    def tensors(dtype: torch.dtype, *names: str) -> dict[str, Any]:
        return dict.fromkeys(names, torch.empty(0, dtype=dtype))

    for dtype, cin, cout, pool in CONV3X3:
        constants = conv3x3.constants(dtype, cin, cout, relu=True, pool=pool)
        tile = "x".join(str(constants[name]) for name in ("BM", "BN", "BK"))
        arguments = tensors(dtype, "x_ptr", "weight_ptr", "out_ptr") | tensors(torch.float32, "affine_ptr")
        arguments |= {"N": 7, "H": 7, "W": 7} | constants
        yield "triton conv3x3", f"{DTYPES[dtype]} {cin}->{cout} in {tile}", pool, conv3x3._conv3x3_kernel, arguments
    for dtype, channels in MAXPOOL2X2:
        arguments = tensors(dtype, "x_ptr", "out_ptr") | {"ROWS": 7, "H": 7, "W": 7} | maxpool2x2.constants(channels)
        arguments |= {"num_warps": 4}
        yield "triton maxpool2x2", f"{DTYPES[dtype]} {channels}", True, maxpool2x2._maxpool2x2_kernel, arguments


def triton_row(sm: int, name: str, configuration: str, pool: bool, compiled: Any) -> Row:
    (row,) = rows_of(compiled.asm["cubin"], name, sm)
    shared = compiled.metadata.shared  # dynamic: the cubin does not know
    return Row(**row | {"configuration": configuration, "pool": pool, "shared": shared})


def cuda_rows(sm: int) -> Iterator[Row]:
    """One row for each dtype of each kernel of csrc/cuda; none without nvcc."""
    if (nvcc := find_nvcc()) is None:
        print("no nvcc, see csrc/cuda/build.py for where it is looked for: no CUDA rows", file=sys.stderr)
        return
    for source in sorted(CUDA.glob("*.cu")):
        hopper = source.stem.endswith("_sm90")
        if hopper and sm != 90:
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{sm}{'a' * hopper}", source, "-o", file.name]
            subprocess.run(command, check=True)
            cubin = Path(file.name).read_bytes()
        for row in rows_of(cubin, f"cuda {source.stem}", sm):
            yield Row(**row | {"shared": row["shared"] + shared_bytes()} if hopper else row)


def rows_of(cubin: bytes, kernel: str, sm: int) -> Iterator[dict[str, Any]]:
    """The columns of every function of a cubin, from ``cuobjdump`` and ``nvdisasm``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "-elf", "-res-usage", file.name)
        listing = run("nvdisasm", "-c", file.name)
    for text in listing.split("\n.text.")[1:]:
        name, body = text.split(":", 1)
        resources = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        # Of __launch_bounds__ or .reqntid: x, y and z, in the section of the function's own attributes.
        attributes = usage.partition(f"\n.nv.info.{name}\n")[2]
        size = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s+(\w+) (\w+) (\w+)", attributes)
        if resources is None or size is None:
            raise RuntimeError(f"cuobjdump does not give the registers and threads of {name}; it says {usage[:200]!r}")
        registers, stack, shared = map(int, resources.groups())
        threads = math.prod(int(n, 16) for n in size.groups())
        opcodes, loop = disassembled(body)
        count = {name: sum(bool(re.match(p, op)) for op in opcodes) for name, p in COUNTED.items()}
        macs = sum(map(multiply_adds, loop))
        loads = Counter(load for op in loop if (load := global_load(op)))
        if loop is opcodes:  # unrolled: the asynchronous ones are the tiles', the others the epilogue's
            loads = Counter({load: n for load, n in loads.items() if not load.startswith("LDG.")}) or loads
        loads = loads or Counter(load for op in opcodes if (load := global_load(op)) == "UTMALDG")
        dtype = next((d for mangled, d in MANGLED.items() if re.search(rf"I{mangled}[ELS]", name)), "")
        yield count | {
            "kernel": kernel, "sm": sm, "configuration": dtype, "pool": "Lb1E" in name, "threads": threads,
            "registers": registers, "stack": stack, "shared": shared, "sass": len(opcodes), "loop": len(loop),
            "loads": dict(loads),
            "k_step": round(len(loop) * K_STEP / macs, 1) if macs else None,
        }  # fmt: skip


COUNTED = {
    "local": "LDL|STL",
    "tensor": r"HMMA|IMMA|HGMMA|IGMMA|UTC\w*MMA",
    "barriers": r"BAR\.",
    "shuffles": "SHFL",
}


def disassembled(body: str) -> tuple[list[str], list[str]]:
    """The opcodes of a function, and those of its main loop: of the innermost that multiply, the one that does so most.

    Where no loop multiplies it was unrolled, and its instructions cannot be told from the rest: then it is everything.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append(found[1])
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    if not opcodes:
        raise RuntimeError(f"no instruction found in the disassembly; it begins with {body[:200]!r}")

    on_tensor_cores = any(re.match(COUNTED["tensor"], op) for op in opcodes)

    def products(loop: tuple[int, int]) -> int:
        pattern = COUNTED["tensor"] if on_tensor_cores else "FFMA"
        return sum(bool(re.match(pattern, op)) for op in opcodes[slice(*loop)])

    multiplying = [loop for loop in loops if products(loop)]
    innermost = [
        (a, b) for a, b in multiplying if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in multiplying)
    ]
    main = min(innermost, key=lambda loop: (-products(loop), loop[1] - loop[0]), default=None)
    return opcodes, opcodes[slice(*main)] if main else opcodes


def multiply_adds(opcode: str) -> int:
    """Of one warp: HMMA.16816 is m16n8k16, HGMMA.64x128x16 is four warps' m64n128k16."""
    if found := re.match(r"(?:HGMMA|IGMMA)\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, found.groups())
        return m * n * k // 4
    found = re.match(r"(?:HMMA|IMMA)\.16(8)(\d+)", opcode)
    return 16 * int(found[1]) * int(found[2]) if found else 0


def global_load(opcode: str) -> str | None:
    """``LDGSTS.128`` of ``LDGSTS.E.BYPASS.LTC128B.128.ZFILL``; None for what loads nothing from global memory."""
    kind = opcode.split(".")[0]
    if kind not in ("LDGSTS", "LDG"):
        return kind if kind == "UTMALDG" else None
    width = re.search(r"\.[US]?(8|16|64|128)(?:\.|$)", opcode)
    return f"{kind}.{width[1] if width else 32}"


def run(tool: str, *args: str) -> str:
    done = subprocess.run([str(TOOLS / tool), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr  # cuobjdump reports resources on either, depending on its version


def misses(row: Row, rows: list[Row]) -> dict[str, Any]:
    """The gates that a row does not pass, and what was measured.

    No spills, and shared memory and registers within bounds: for every kernel. A convolution loads its tiles 16 bytes
    at a time, past the registers, and multiplies on tensor cores in 16-bit types only (fp32 is true fp32). Triton's
    has a limit for the instructions of a k-step, no shuffles, and no more barriers when pooled than when not.
    """
    resident = RESIDENT.get(row.kernel, RESIDENT[row.kernel.split()[0]])
    missed: dict[str, Any] = {
        "spills": row.stack + row.local,
        "shared": row.shared if row.shared > SHARED_LIMIT[row.sm] else 0,
        "registers": row.registers if row.registers * row.threads * resident > REGISTERS else 0,
    }
    if "conv3x3" in row.kernel:
        narrow = {load: n for load, n in row.loads.items() if load not in ("LDGSTS.128", "UTMALDG")}
        missed["loads"] = narrow if row.loads else "none"
        missed["tensor"] = row.tensor if "fp32" in row.configuration else 0 if row.tensor else "none"
    if row.kernel == "triton conv3x3":
        twins = [r for r in rows if (r.kernel, r.sm, r.configuration) == (row.kernel, row.sm, row.configuration)]
        missed["barriers"] = row.barriers if row.pool and any(r.barriers < row.barriers for r in twins) else 0
        missed["shuffles"] = row.shuffles
        missed["k_step"] = row.k_step if (row.k_step or 0) > K_STEP_LIMIT.get(row.sm, math.inf) else 0
    if row.kernel == "cuda conv3x3_sm90":
        missed["k_step"] = row.k_step if (row.k_step or math.inf) > HOPPER_K_STEP else 0
    return {gate: measured for gate, measured in missed.items() if measured}


def table(rows: list[Row]) -> str:
    """The rows for people."""
    header = [*Row.__dataclass_fields__, "misses"]
    lines = [[*map(cell, asdict(row).values()), cell(misses(row, rows))] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    widths[-1] = 0
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in (header, *lines))


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {cell(count)}" for name, count in sorted(value.items())) or "-"
    return "-" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="The machine code of every GPU kernel.")
    parser.add_argument("sms", nargs="*", type=int, default=TRITON_SMS, help="architectures; default: %(default)s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:  # nvcc and the disassembler beside Triton, which compiles in this thread
        cuda = pool.submit(lambda: [row for sm in options.sms if sm in CUDA_SMS for row in cuda_rows(sm)])
        jobs = [
            pool.submit(triton_row, sm, name, configuration, pooled, compile_triton(function, arguments, sm)[0])
            for sm in options.sms
            for name, configuration, pooled, function, arguments in triton_launches()
        ]
        rows = [job.result() for job in jobs] + cuda.result()
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))


if __name__ == "__main__":
    main()
