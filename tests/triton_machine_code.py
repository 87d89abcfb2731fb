"""Compile every Triton kernel ahead of time, as a launch would, and print what the machine code looks like as JSON.

    python tests/triton_machine_code.py 80 90

A script, not a test: it runs in a process of its own, because Triton's interpreter leaves ``triton.language`` patched
in the process that used it. No GPU is needed; ptxas and the disassembler come with Triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vgg_fast.kernels import conv3x3, maxpool2x2

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}

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


def sources() -> Iterator[tuple[dict[str, Any], ASTSource, dict[str, int]]]:
    for dtype, cin, cout, pool in CONV3X3:
        constants = conv3x3.constants(dtype, cin, cout, relu=True, pool=pool)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), POINTERS[dtype])
        what = {"kernel": "conv3x3", "dtype": str(dtype), "cin": cin, "cout": cout, "pool": pool}
        yield what, source(conv3x3._conv3x3_kernel, pointers | {"affine_ptr": "*fp32"}, constants), options
    for dtype, channels in MAXPOOL2X2:
        pointers = dict.fromkeys(("x_ptr", "out_ptr"), POINTERS[dtype])
        what = {"kernel": "maxpool2x2", "dtype": str(dtype), "cin": channels}
        constants = maxpool2x2.constants(channels)
        yield what, source(maxpool2x2._maxpool2x2_kernel, pointers, constants), {"num_warps": 4}


def source(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """The kernel with 16-byte aligned pointers, as PyTorch's allocator hands them out, and 32-bit sizes."""
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    return ASTSource(kernel, signature, constants, aligned)


def report(cubin: bytes) -> dict[str, int]:
    """Registers, stack and counts of the instructions that matter, from ``cuobjdump`` and ``nvdisasm``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
        sass = run("nvdisasm", "-c", file.name)
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    if not opcodes:
        raise RuntimeError(f"no instruction found in the disassembly; it begins with: {sass[:200]!r}")
    patterns = {
        "mma": r"HMMA|HGMMA|UTC\w*MMA",
        "ffma": r"FFMA",
        "local": r"LDL|STL",
        "shuffle": r"SHFL",
        "barrier": r"BAR",
        "async_copy_128": r"LDGSTS.*\.128",
        "async_copy": r"LDGSTS",
    }
    counts = {name: sum(bool(re.match(p, op)) for op in opcodes) for name, p in patterns.items()}
    resources = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return counts | resources | {"sass": len(opcodes)}


def run(tool: str, *args: str) -> str:
    done = subprocess.run([str(BIN / tool), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr  # cuobjdump reports resources on either, depending on its version


def main() -> None:
    rows = []
    for capability in map(int, sys.argv[1:]):
        for what, src, options in sources():
            compiled = triton.compile(src, target=GPUTarget("cuda", capability, 32), options=options)
            shared = {"shared": compiled.metadata.shared}
            rows.append({"sm": capability} | what | shared | report(compiled.asm["cubin"]))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
