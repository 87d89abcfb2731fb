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

from tests.virtual_gpu import cuda_cases
from tests.virtual_gpu.cases import CUDA, find_nvcc, nvcc_cubin
from tests.virtual_gpu.launch import compile_triton
from tests.virtual_gpu.sm90 import shared_bytes
from vgg_fast.kernels import configs, conv3x3, maxpool2x2

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON_SMS, CUDA_SMS = (80, 89, 90, 100, 120), (80, 90)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MANGLED = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}

# Besides every tile of configs.TILES: channels that are no multiple of 16, as a launch would cut them.
RAGGED = (
    ("bf16", 3, 64),  # the first layer
    ("tf32", 3, 64),
    ("ieee", 3, 64),
    ("fp16", 40, 64),  # rows of 16 bytes
    ("fp16", 37, 53),  # every mask, and no row aligned
)
MAXPOOL2X2 = ((torch.float16, 64), (torch.bfloat16, 64), (torch.float32, 1))

# A k-step of 128 x 128 x 64 in 16 bits, the tile that the limits were set for: multiply-adds of one warp of four, and
# the instructions that it may have. Smaller tiles have fewer products over as many addresses; of them the overhead is
# limited, to what those limits leave beside 128 products and 32 loads of their operands (sm_80), or 8 (sm_90), and 16
# copies from global memory.
K_STEP = 128 * 128 * 64 // 4
K_STEP_LIMIT = {80: 310, 90: 180}  # what a kernel of this project once measured, with addresses hoisted: 306 and 174
OVERHEAD_LIMIT = {80: 310 - 176, 90: 180 - 24}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # per CTA; CUDA guide, compute capabilities
SHARED_LIMIT |= {89: 99 << 10, 120: 99 << 10}
REGISTERS = 65536  # of a multiprocessor
RESIDENT = {"triton": 8, "cuda": 12}  # warps that should fit one
RESIDENT |= {"256x128": 8, "128x64": 12, "256x64": 8, "block1": 8}  # those of csrc/cuda on tensor cores, by their tile
RESIDENT |= {"conv3x3_sm90": 12}
MMA_K_STEP = 320  # conv3x3_mma in 256x128; measured: 307 (sm_80) and 313 (sm_90)
HOPPER_LOOP = 80  # conv3x3_sm90: addresses are in its descriptors, a tap is 8 wgmma and little else; measured: 75


@dataclass(frozen=True)
class Row:
    """One kernel, compiled.

    Attributes:
        kernel, sm, configuration: which; ``pool`` marks the pooled form of a configuration.
        threads: of a CTA.
        registers, stack, shared: of a thread, of a thread, of a CTA; bytes. Dynamic shared memory is not in a cubin:
            that of Triton's kernels is added, and of csrc/cuda that of a VGG16's largest layer.
        local: instructions that access local memory: spills.
        tensor, barriers, shuffles, sass, loop: instructions; ``loop`` those of the main loop, the one that multiplies.
        loads: global loads of the main loop, by opcode and width; where other warps do them, their TMA copies.
        k_step: instructions of the main loop, scaled to the multiply-adds of one k-step of 128 x 128 x 64 with four
            warps; None where there are fewer of them, or instructions do not say their shape (tcgen05).
        overhead: instructions of the main loop but products, loads of their operands and copies from global memory;
            None where nothing was found to loop.
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
    overhead: int | None


def triton_launches(sm: int) -> Iterator[tuple[str, str, bool, Any, dict[str, Any]]]:
    """Name, configuration, pool, function and arguments of every Triton row."""
    for kind, tiles in configs.TILES[configs.family(sm)].items():
        if sm == 89 and kind != "16 bits":
            continue  # the tiles of sm_120, whose rows are made
        precision = "fp16" if kind == "16 bits" else kind
        for tile in tiles:
            if precision == "fp16":
                yield conv3x3_launch(sm, precision, 256, 256, tile, pool=False)
            yield conv3x3_launch(sm, precision, 256, 256, tile, pool=True)
            if configs.is_lean(tile):
                yield conv3x3_launch(sm, precision, 256, 256, tile._replace(split=2), pool=True, tap=True)
    for precision, cin, cout in RAGGED:
        yield conv3x3_launch(sm, precision, cin, cout, None, pool=False)
    for dtype, channels in MAXPOOL2X2:
        arguments: dict[str, Any] = dict.fromkeys(("x_ptr", "out_ptr"), torch.empty(0, dtype=dtype))
        arguments |= {"ROWS": 7, "H": 7, "W": 7, "num_warps": 4} | maxpool2x2.constants(channels)
        yield "triton maxpool2x2", f"{DTYPES[dtype]} {channels}", True, maxpool2x2._maxpool2x2_kernel, arguments


def conv3x3_launch(
    sm: int, precision: str, cin: int, cout: int, tile: configs.Config | None, *, pool: bool, tap: bool = False
) -> tuple[str, str, bool, Any, dict[str, Any]]:
    """A row of the convolution, in a tile or in what a launch on a large map would take."""
    dtype = next((dtype for dtype, name in DTYPES.items() if name == precision), torch.float32)
    fp32 = precision if dtype == torch.float32 else "ieee"
    architecture = configs.Architecture(sm, 108)
    launch = conv3x3.launch_of(dtype, 1, 700, 700, cin, cout, True, pool, architecture, tap, fp32, tile)
    x, fp = torch.empty(0, dtype=dtype), torch.empty(0)
    scratch = (fp, torch.empty(0, dtype=torch.int32)) if launch.counters else (None, None)
    arguments = launch.arguments(x, fp.to(dtype), fp, x, x if tap else None, *scratch)
    cut = "x".join(str(launch.options[name]) for name in ("BM", "BN", "BK"))
    epilogue = ", tap, sum of parts" if tap else ""
    configuration = f"{precision} {cin}->{cout} in {cut}, {launch.options['num_warps']} warps{epilogue}"
    return "triton conv3x3", configuration, pool, launch.kernel, arguments


def triton_row(sm: int, name: str, configuration: str, pool: bool, compiled: Any) -> Row:
    (row,) = rows_of(compiled.asm["cubin"], name, sm)
    shared = compiled.metadata.shared  # dynamic: the cubin does not know
    return Row(**row | {"configuration": configuration, "pool": pool, "shared": shared})


def cuda_rows(sm: int) -> Iterator[Row]:
    """One row for each dtype of each kernel of csrc/cuda; none without nvcc."""
    if find_nvcc() is None:
        print("no nvcc, see csrc/cuda/build.py for where it is looked for: no CUDA rows", file=sys.stderr)
        return
    for source in sorted(CUDA.glob("*.cu")):
        hopper = source.stem.endswith("_sm90")
        if hopper and sm != 90:
            continue
        cubin = nvcc_cubin(source, f"{sm}{'a' * hopper}")
        for row in rows_of(cubin, f"cuda {source.stem}", sm):
            yield Row(**row | {"shared": row["shared"] + dynamic_shared(source.stem, row["configuration"])})


def rows_of(cubin: bytes, kernel: str, sm: int) -> Iterator[dict[str, Any]]:
    """The columns of every function of a cubin, from ``cuobjdump`` and ``nvdisasm``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "-elf", "-res-usage", file.name)
        listing = run("nvdisasm", "-ndf", "-c", file.name)  # its dataflow analysis, a third of the time, adds nothing
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
        if kernel.startswith("cuda"):
            dtype = cuda_configuration(kernel.split()[1], name, dtype)
        yield count | {
            "kernel": kernel, "sm": sm, "configuration": dtype, "pool": "Lb1E" in name, "threads": threads,
            "registers": registers, "stack": stack, "shared": shared, "sass": len(opcodes), "loop": len(loop),
            "loads": dict(loads),
            "k_step": round(len(loop) * K_STEP / macs, 1) if macs >= K_STEP and loop is not opcodes else None,
            "overhead": None if loop is opcodes else sum(not re.match(NEEDED, op) for op in loop),
        }  # fmt: skip


def cuda_configuration(stem: str, name: str, dtype: str) -> str:
    """The dtype, and what tells the kernels of one file from each other.

    That is the tile, the rows of a block, or function and elements of a packet.
    """
    numbers = re.findall(r"Li(\d+)E", name)
    if stem == "conv3x3_mma":
        return f"{dtype.replace('fp32', 'tf32')} {cuda_cases.TILES[int(numbers[0])]}"
    if stem == "conv3x3_sm90":
        return f"{dtype.replace('fp32', 'tf32')} {numbers[0]}"
    if stem == "conv3x3":
        return f"{dtype} x{numbers[0]}"
    function = re.search(r"4cuda\d+(\w+?)_kernel", name)
    return f"{dtype} {function[1]} x{numbers[0]}" if stem == "maxpool2x2" and function else dtype


def dynamic_shared(stem: str, configuration: str) -> int:
    """Bytes of a launch for the most demanding layer of a VGG16 of 224x224 images."""
    if stem == "block1":
        return cuda_cases.plan_block1(1, 224, 224).shared_bytes
    if stem == "conv3x3_sm90":
        return shared_bytes(int(configuration.split()[1]))
    if stem != "conv3x3_mma":
        return 0
    tile = cuda_cases.TILES.index(configuration.split()[1])
    sizes = ((224, 64), (112, 128), (56, 256), (28, 512), (14, 512))
    problems = [cuda_cases.problem(32, size, size, c, c, torch.float16) for size, c in sizes]
    return max(cuda_cases.plan(problem, tile=tile).shared_bytes for problem in problems)


COUNTED = {
    "local": "LDL|STL",
    "tensor": r"HMMA|IMMA|HGMMA|IGMMA|UTC\w*MMA",
    "barriers": r"BAR\.",
    "shuffles": "SHFL",
}
NEEDED = rf"{COUNTED['tensor']}|FFMA|LDSM|LDS\.|LDGSTS|UTMALDG|LDG\."


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
    at a time, past the registers, and multiplies on tensor cores unless it is to be true fp32. Triton's has a limit for
    the instructions of a k-step, no shuffles (one where programs share a sum: all threads learn who is the last), and
    no more barriers when pooled than when not.
    """
    words = [*row.configuration.split(), *reversed(row.kernel.split())]
    warps = next(RESIDENT[word] for word in words if word in RESIDENT)
    missed: dict[str, Any] = {
        "spills": row.stack + row.local,
        "shared": row.shared if row.shared > SHARED_LIMIT[row.sm] else 0,
        "registers": row.registers if row.registers * max(row.threads, warps * 32) > REGISTERS else 0,
    }
    if "conv3x3" in row.kernel or row.kernel == "cuda block1":
        narrow = {load: n for load, n in row.loads.items() if load not in ("LDGSTS.128", "UTMALDG")}
        missed["loads"] = narrow if row.loads else "none"
        fma = row.configuration.startswith(("fp32", "ieee"))
        missed["tensor"] = row.tensor if fma else 0 if row.tensor else "none"
    if row.kernel == "triton conv3x3":
        twins = [r for r in rows if (r.kernel, r.sm, r.configuration) == (row.kernel, row.sm, row.configuration)]
        missed["barriers"] = row.barriers if row.pool and any(r.barriers < row.barriers for r in twins) else 0
        missed["shuffles"] = row.shuffles if row.shuffles > ("parts" in row.configuration) else 0
        if row.configuration.startswith(("fp16", "bf16 ")):
            missed["k_step"] = row.k_step if (row.k_step or 0) > K_STEP_LIMIT.get(row.sm, math.inf) else 0
            if row.k_step is None and (row.overhead or 0) > OVERHEAD_LIMIT.get(row.sm, math.inf):
                missed["overhead"] = row.overhead
    if row.kernel == "cuda conv3x3_mma" and row.configuration in ("fp16 256x128", "bf16 256x128"):
        missed["k_step"] = row.k_step if (row.k_step or math.inf) > MMA_K_STEP else 0
    if row.kernel == "cuda conv3x3_sm90":
        missed["loop"] = row.loop if row.loop > HOPPER_LOOP else 0
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
            for name, configuration, pooled, function, arguments in triton_launches(sm)
        ]
        rows = [job.result() for job in jobs] + cuda.result()
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))


if __name__ == "__main__":
    main()
