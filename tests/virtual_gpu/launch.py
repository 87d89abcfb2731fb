"""Launching: a Triton kernel compiled ahead of time, or an entry of PTX that nvcc made, on CPU tensors."""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.virtual_gpu import async_ops, bulk, memory_ops, warp_ops, wgmma  # noqa: F401  (register their instructions)
from tests.virtual_gpu.async_agents import SCHEDULES
from tests.virtual_gpu.compile import Code
from tests.virtual_gpu.global_race import GlobalRaces
from tests.virtual_gpu.machine import KernelError, Machine
from tests.virtual_gpu.memory import Fault, GlobalMemory
from tests.virtual_gpu.parse import PtxError, parse
from tests.virtual_gpu.tma import TensorMap

# Registers of the threads of a chunk stay in the CPU's caches, and the overhead of a NumPy call is spread over many.
_CHUNK_THREADS = 4096

_MEETING_WARPS = 4096  # what they know of each other takes 12 bytes times the square

CACHE = Path(__file__).resolve().parents[2] / "build" / "triton"  # of compiled Triton kernels

TARGETS = (80, 86, 89, 90)  # compute capabilities that Triton may compile for


@dataclass(frozen=True)
class Entry:
    """An entry point ready to run, and what a launch must know of it.

    Attributes:
        ptx: the text it comes from.
        shared_bytes: dynamic shared memory, unless the launch names another number.
        layout: the name of each argument in order, where it is known (Triton).
        descriptors: what Triton decided on each of its tensor descriptors, in order.
    """

    code: Code
    ptx: str
    shared_bytes: int = 0
    layout: tuple[str, ...] = ()
    descriptors: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Mapped:
    """An argument of type CUtensorMap: a tensor, and how TMA sees it.

    Attributes:
        tensor: dense, on the CPU; channels_last is seen as NHWC.
        box: elements of a copy in each dimension, innermost first.
        options: further fields of :class:`~tests.virtual_gpu.tma.TensorMap`, swizzle for one.
    """

    tensor: Tensor
    box: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, address: int) -> TensorMap:
        t, size = _in_memory_order(self.tensor), self.tensor.element_size()
        strides = tuple(stride * size for stride in t.stride()[-2::-1])
        return TensorMap(address, size, tuple(t.shape[::-1]), strides[: t.dim() - 1], self.box, **self.options)


@dataclass
class Launch:
    """What all chunks of a launch share."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    schedule: str
    random: np.random.Generator
    observer: Any
    races: GlobalRaces | None = None  # where CTAs may meet in scratch tensors
    tensor_maps: dict[int, Any] = field(default_factory=dict)  # by offset into the parameters


def ptx_entry(source: str | Path, name: str = "") -> Entry:
    """An entry of a PTX text, of a .ptx file, or of a fatbin (.fatbin, .cubin, .o, .so).

    Args:
        name: a part of the (mangled) name that only this entry has; may be left out where there is one entry.

    Raises:
        PtxError: for PTX that cannot be simulated, or a name that fits no entry or several.
    """
    text = str(source)
    if "\n" not in text:
        path = Path(text)
        text = path.read_text() if path.suffix == ".ptx" else _from_fatbin(path)
    return Entry(_code(text, name), text)


@functools.lru_cache(maxsize=64)
def _code(text: str, name: str) -> Code:
    kernels = parse(text)
    found = [kernel for full, kernel in kernels.items() if name in full]
    if len(found) != 1:
        raise PtxError(f"{len(found)} entries fit {name!r}; there are: {', '.join(kernels)}")
    return Code(found[0])


def _from_fatbin(path: Path) -> str:
    tool = shutil.which("cuobjdump") or _triton_tool("cuobjdump")
    done = subprocess.run([tool, "-ptx", str(path)], capture_output=True, text=True, check=True)
    # cuobjdump prints the PTX of each architecture under a header of its own; the last one is the newest.
    texts = re.split(r"^Fatbin ptx code:$", done.stdout, flags=re.M)
    if len(texts) < 2:
        raise PtxError(f"{path} holds no PTX; compile with -gencode arch=compute_XX,code=compute_XX")
    return re.sub(r"^(?:=+|\w+ = .*|ptxasOptions.*|compressed)$", "", texts[-1], flags=re.M)


def _triton_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_triton(kernel: Any, arguments: Mapping[str, Any], target: int) -> tuple[Any, tuple[str, ...]]:
    """Compiles a ``@triton.jit`` function as a launch with these arguments would, for compute capability ``target``.

    Returns:
        Triton's compiled kernel, and the names of the arguments that it still takes.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    options = {name: value for name, value in arguments.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for n, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _triton_type(value)
        specialize = not parameter.do_not_specialize
        if isinstance(value, int) and specialize and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
            continue
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if specialize and isinstance(number, int) and number % 16 == 0:
            attributes[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    with knobs.cache.scope():
        # Of this checkout alone: another one's cached code has the other one's files in its line numbers.
        knobs.cache.dir = str(CACHE)
        compiled = compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return compiled, tuple(name for name in names if signature[name] != "constexpr")


def triton_entry(kernel: Any, arguments: Mapping[str, Any], target: int) -> Entry:
    """The entry of a ``@triton.jit`` function; arguments as for :func:`launch`."""
    compiled, layout = compile_triton(kernel, arguments, target)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    return Entry(_code(ptx, metadata.name), ptx, metadata.shared, layout, tuple(metadata.tensordesc_meta or ()))


_TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
_TRITON_TYPES |= {torch.int64: "i64", torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16"}


def _triton_type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TRITON_TYPES[value.dtype]
    if hasattr(value, "block_shape"):  # triton.tools.tensor_descriptor.TensorDescriptor
        return f"tensordesc<{_TRITON_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Any,
    *,
    outputs: Sequence[str | int] = (),
    scratch: Sequence[str | int] = (),
    target: int = 80,
    block: Sequence[int] = (),
    shared_bytes: int | None = None,
    schedule: str = "latest",
    seed: int = 0,
    observer: Any = None,
    only: Sequence[int] = (),
) -> None:
    """Runs a kernel over a grid and writes its results into the tensors.

    Args:
        kernel: a ``@triton.jit`` function, or an :class:`Entry`.
        grid: CTAs along x, y, z.
        args: for Triton a mapping of all arguments and options by name, constexprs and num_warps among them. Otherwise
            a sequence in the order of the parameters: CPU tensors, numbers, tensor maps; for a structure passed by
            value a pair of its ``ctypes.Structure`` class and a mapping of its fields, tensors where pointers are.
        outputs: tensors that are only written, every element exactly once: by name, or by position among all tensors.
        scratch: tensors that are read and written as the kernel likes. All others may be read only.
        target: compute capability for Triton, 80 or 90.
        block: threads of a CTA, where the PTX does not say.
        shared_bytes: dynamic shared memory.
        schedule: when asynchronous work takes place: latest, earliest or random (with ``seed``).
        observer: see counters.py.
        only: the CTAs to run, by their numbers, x first, where that is not all of them: what the others would write is
            left undefined, and ``observer`` is told of a grid of this many.

    Raises:
        PtxError: before anything runs, for what cannot be simulated.
        KernelError: for the first thing the kernel does wrong.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if not isinstance(kernel, Entry) and target not in TARGETS:
        raise ValueError(f"target {target} is not simulated; expected one of {', '.join(map(str, TARGETS))}")
    entry = kernel if isinstance(kernel, Entry) else triton_entry(kernel, args, target)
    code = entry.code
    memory, tensors = GlobalMemory(), []

    def place(name: str, tensor: Tensor) -> int:
        position = len(tensors)
        roles = [role for role, names in (("output", outputs), ("scratch", scratch)) if {name, position} & {*names}]
        tensors.append(tensor)
        role, skew = roles[0] if roles else "input", tensor.data_ptr() % 16
        return memory.allocate(name, role, _storage(tensor), tensor.element_size(), skew)

    for name, data in code.kernel.constants.items():
        memory.allocate(name, "input", np.frombuffer(data, np.uint8), 1)
    values = [(name, args[name]) for name in entry.layout] if entry.layout else list(_named(args))
    parameters, maps = _pack(code, list(_placed(values, list(entry.descriptors), place)), hidden=bool(entry.layout))
    names = [a.name for a in memory.allocations]
    if unknown := {*outputs, *scratch} - {*names, *range(len(names))}:
        raise ValueError(f"no tensor is called {min(map(repr, unknown))}; there are {', '.join(names)}")
    memory.seal()
    shape = (*grid, 1, 1)[:3]
    threads = int(np.prod(block)) if block else code.kernel.threads
    if threads % 32 or not threads:
        raise ValueError(f"{threads} threads in a CTA: give block=(x, y, z), a multiple of 32 in all")
    dynamic = entry.shared_bytes if shared_bytes is None else shared_bytes
    shared = code.kernel.shared_bytes + dynamic
    random = np.random.default_rng(seed)
    ctas, meeting = int(np.prod(shape)), [a for a in memory.allocations if a.role == "scratch"]
    races = None
    if meeting and ctas * threads // 32 <= _MEETING_WARPS:
        races = GlobalRaces(ctas, threads // 32, meeting, lambda pc: str(code.instructions[pc]))
    run = Launch(shape, (*(block or (threads,)), 1, 1)[:3], parameters, schedule, random, observer, races, maps)
    numbers = np.asarray(only) if only else np.arange(ctas)
    if observer is not None:
        observer.begin(code.kernel, (len(numbers),), threads)
    positions = np.stack(np.unravel_index(numbers, shape[::-1])[::-1], axis=1)
    chunk = max(1, _CHUNK_THREADS // threads)
    for first in range(0, len(positions), chunk):
        Machine(code, positions[first : first + chunk], threads, shared, memory, run, first).run()
    try:
        if not only:
            memory.check_complete()
    except Fault as fault:
        raise KernelError(fault.kind, f"{fault}\nin {code.name}") from None
    if observer is not None:
        observer.end()
    for n, tensor in enumerate(tensors, len(code.kernel.constants)):
        if memory.allocations[n].role != "input":
            _storage(tensor)[:] = memory.contents(n)


def _storage(tensor: Tensor) -> np.ndarray:
    """The bytes of a dense tensor in the order of its memory, writable."""
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if tensor.is_cuda or not dense:
        what = f"a {tuple(tensor.shape)} tensor on {tensor.device} with strides {tensor.stride()}"
        raise ValueError(f"{what}; expected a dense one on the CPU")
    return _in_memory_order(tensor).detach().reshape(-1).view(torch.uint8).numpy()


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)


def _named(args: Sequence[Any]) -> Any:
    for n, value in enumerate(args):
        yield (value[0].__name__ if isinstance(value, tuple) else f"argument {n}"), value


def _placed(values: list[tuple[str, Any]], decided: list[dict[str, Any]], place: Any) -> Any:
    """Arguments with tensors replaced by their addresses: numbers, bytes of structures, and tensor maps.

    A Triton tensor descriptor becomes a tensor map, its shape and its strides, as Triton's launcher passes them.
    """
    for name, value in values:
        if isinstance(value, Tensor):
            yield name, place(name, value)
        elif isinstance(value, tuple):
            structure, fields = value
            yield name, bytes(structure(**{k: place(k, v) if isinstance(v, Tensor) else v for k, v in fields.items()}))
        elif isinstance(value, Mapped):
            yield name, value.at(place(name, value.tensor))
        elif hasattr(value, "block_shape"):
            meta, size = decided.pop(0), value.base.element_size()
            strides = tuple(stride * size for stride in value.strides[-2::-1])
            box, swizzle = tuple(meta["block_size"][::-1]), (0, 32, 64, 128)[meta["swizzle"]]
            sizes, address = tuple(value.shape[::-1]), place(name, value.base)
            yield name, TensorMap(address, size, sizes, strides, box, swizzle=swizzle)
            yield from ((f"{name}.shape", size) for size in value.shape)
            yield from ((f"{name}.strides", stride) for stride in value.strides)
        else:
            yield name, value


def _pack(code: Code, values: list[tuple[str, Any]], hidden: bool) -> tuple[bytes, dict[int, Any]]:
    """The parameter block; tensor maps are left out of it and returned by their offset.

    ``hidden``: the kernel has further parameters, which its own launcher fills with null pointers.
    """
    declared = code.kernel.parameters
    if len(values) > len(declared) or (len(values) < len(declared) and not hidden):
        raise ValueError(f"{code.name} has {len(declared)} parameters, {len(values)} were given")
    data, maps = bytearray(max((p.offset + p.size for p in declared), default=0)), {}
    for (name, value), parameter in zip(values, declared, strict=False):
        if isinstance(value, TensorMap):
            maps[parameter.offset] = value
            continue
        raw = value if isinstance(value, bytes) else _number(value, parameter.size)
        if len(raw) != parameter.size:
            raise ValueError(f"{name}: {len(raw)} bytes for {parameter.name}, which has {parameter.size}")
        data[parameter.offset : parameter.offset + parameter.size] = raw
    return bytes(data), maps


def _number(value: float, size: int) -> bytes:
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
