"""PTX text -> typed instructions: registers in numbered slots, resolved labels, parameters, source lines.

Only what compilers put into kernels is read: no device functions, no textures. Anything else is an error that names the
line. The grammar is that of the "Parallel Thread Execution ISA" manual, chapters 4 and 5.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_BASE = 1024  # shared address of the first variable: address 0 stays invalid, swizzled tiles want 1024 bytes

# Bytes of the types of registers and parameters; a predicate takes a byte here.
SIZES = {f"{kind}{8 * size}": size for size in (1, 2, 4, 8) for kind in "busf"} | {"pred": 1, "b128": 16}


class PtxError(Exception):
    """A text that this simulator cannot run: syntax, or an instruction it does not know. Names the line."""


@dataclass(frozen=True)
class Register:
    name: str
    slot: int
    type: str


@dataclass(frozen=True)
class Negated:
    """``!%p`` as an operand."""

    register: Register


@dataclass(frozen=True)
class Special:
    """A read-only register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant; that of a float type is the bit pattern, with ``bits`` 32 or 64, else ``bits`` is 0."""

    value: int
    bits: int = 0


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Memory:
    """``[base + offset]``, or ``[base, {coordinates}]`` in a tensor map."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass
class Instruction:
    """One instruction. ``line`` counts in the PTX from 1; ``source`` is the kernel's (file, line), where known."""

    index: int
    op: str
    operands: tuple[Any, ...]
    line: int
    text: str
    source: tuple[str, int] | None
    predicate: Register | None = None
    negated: bool = False
    target: int = -1  # of a branch

    def __post_init__(self) -> None:
        self.parts = tuple(self.op.split("."))

    def __str__(self) -> str:
        where = f"PTX line {self.line}: {self.text}"
        if self.source:
            name, number = self.source
            here = Path(name)
            where += f"\n  {here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here}:{number}"
            if line := _source_line(name, number):
                where += f": {line}"
        return where


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # b8 for a structure
    offset: int
    size: int


@dataclass
class Kernel:
    """One entry point."""

    name: str
    target: str
    parameters: list[Parameter] = field(default_factory=list)
    threads: int = 0  # of a CTA, from .reqntid or .maxntid; 0 where the text does not say
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[str] = field(default_factory=list)  # the type of each slot
    shared: dict[str, int] = field(default_factory=dict)  # the address of each shared variable
    shared_bytes: int = 0  # of static variables
    local: dict[str, int] = field(default_factory=dict)  # the address of each variable in a thread's own memory
    local_bytes: int = 0
    constants: dict[str, bytes] = field(default_factory=dict)  # tables in constant or global memory


def _source_line(name: str, number: int) -> str:
    try:
        return Path(name).read_text().splitlines()[number - 1].strip()
    except (OSError, IndexError):
        return ""


def parse(text: str) -> dict[str, Kernel]:
    """All entry points of a PTX text by name.

    Raises:
        PtxError: for anything that is not understood, with its line.
    """
    return _Parser(text).kernels


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"^([\w$%]+)\s*:(?!:)")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak)\s+)?\.(local|const|global)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?"
    r"(?:\s*=\s*(.*))?$",
    re.S,
)
_PARAM = re.compile(r"\.param\s+(.*?)\.([busf]\d+)\s+(?:\.ptr\S*\s+.*?)?([\w$]+)(?:\[(\d+)\])?\s*$")
_OPCODE = re.compile(r"([a-z][\w.:]*)\s*")
_NUMBER = re.compile(r"(-?)(?:0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})|(0[xX][0-9a-fA-F]+|\d+)U?)$")


class _Parser:
    def __init__(self, text: str) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.files = {int(m[1]): self._path(m) for m in map(_FILE.match, text.splitlines()) if m}
        self.target = (re.search(r"^\s*\.target\s+(\w+)", text, re.M) or ["", ""])[1]
        self.constants: dict[str, bytes] = {}
        self.module_shared: list[tuple[str, int, int]] = []  # name, size, alignment
        self.kernel: Kernel | None = None
        self.scopes: list[dict[str, Register]] = []
        self.scope_ids: list[int] = []
        self.labels: dict[tuple[int, str], int] = {}
        self.branches: list[tuple[Instruction, str, list[int]]] = []
        self.loc: tuple[str, int] | None = None
        for line, mark, statement in self._statements(text):
            try:
                self._statement(line, mark, statement)
            except PtxError as error:
                raise PtxError(f"PTX line {line}: {error}") from None

    @staticmethod
    def _path(match: re.Match[str]) -> str:
        return f"{match[2]}/{match[3]}" if match[3] else match[2]  # Triton writes folder and name, with DWARF 5

    def _statements(self, text: str) -> Iterator[tuple[int, str, str]]:
        """(line, mark, text): mark is one of ``;`` statement, ``{`` and ``}`` scope, ``:`` label, ``l`` .loc."""
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        pending, start, depth, skipping, inline = "", 0, 0, False, 0
        for number, line in enumerate(text.splitlines(), 1):
            if "inline asm" in line:
                inline = "begin" in line
            if match := _LOC.match(line):
                # LLVM gives the second line of an inline assembly the next source line, and so on: believe the first.
                inline += bool(inline)
                if int(match[2]) and inline <= 2:
                    yield number, "l", f"{match[1]} {match[2]}"
                continue
            line = line.partition("//")[0]
            if re.match(r"\s*\.(version|target|address_size|file)\b", line):
                continue
            while line:
                if skipping:  # the body of a .section
                    _, closed, line = line.partition("}")
                    skipping = not closed
                    continue
                if not pending:
                    line = line.lstrip()
                    start = number
                    if match := _LABEL.match(line):
                        yield number, ":", match[1]
                        line = line[match.end() :]
                        continue
                    if line[:1] in ("{", "}"):
                        yield number, line[0], ""
                        line = line[1:]
                        continue
                match = re.search(r"[;{}]", line)
                if match is None:
                    pending += line + " "
                    break
                pending, stop, line = pending + line[: match.start()], match[0], line[match.end() :]
                if stop == ";" and not depth:
                    yield start, ";", pending.strip()
                    pending = ""
                elif stop == "{" and re.match(r"\.section\b", pending):
                    pending, skipping = "", True
                elif stop == "{" and re.search(r"\.(entry|func)\b", pending):
                    yield start, "{", pending
                    pending = ""
                else:
                    depth += {"{": 1, "}": -1, ";": 0}[stop]
                    pending += stop
            pending = pending if pending.strip() else ""

    def _statement(self, line: int, mark: str, text: str) -> None:
        if mark == "l":
            number, source = map(int, text.split())
            self.loc = (self.files[number], source) if number in self.files else None
        elif mark == "{":
            if text:
                self._entry(text)
            self.scopes.append({})
            self.scope_ids.append(line << 8 | len(self.scopes))
        elif mark == "}":
            self.scopes.pop()
            self.scope_ids.pop()
            if not self.scopes:
                self._finish()
        elif mark == ":":
            assert self.kernel is not None
            self.labels[self.scope_ids[-1], text] = len(self.kernel.instructions)
        elif text.startswith("."):
            self._directive(text)
        elif text:
            self._instruction(line, text)

    def _entry(self, text: str) -> None:
        match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*)$", text, re.S)
        if match is None:
            raise PtxError(f"only kernels are simulated, this is a device function: {text.strip()!r}")
        self.kernel = Kernel(match[1], self.target)
        self.labels, self.branches = {}, []
        offset = 0
        for item in filter(None, (p.strip() for p in (match[2] or "").split(","))):
            param = _PARAM.match(item)
            if param is None:
                raise PtxError(f"parameter {item!r} is not understood")
            align = re.search(r"\.align\s+(\d+)", param[1])
            size = SIZES[param[2]] * int(param[4] or 1)
            step = int(align[1]) if align else SIZES[param[2]]
            offset = -(-offset // step) * step
            self.kernel.parameters.append(Parameter(param[3], param[2], offset, size))
            offset += size
        if threads := re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", match[3]):
            self.kernel.threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
        for variable in self.module_shared:
            if variable[1]:
                self._place(*variable)

    def _place(self, name: str, size: int, align: int) -> None:
        """Variables one after the other; the dynamic one (of size 0) comes after all static ones."""
        assert self.kernel is not None
        start = -(-(SHARED_BASE + self.kernel.shared_bytes) // align) * align
        self.kernel.shared[name] = start
        self.kernel.shared_bytes = start - SHARED_BASE + size

    def _finish(self) -> None:
        assert self.kernel is not None
        for instruction, label, scopes in self.branches:
            found = [self.labels[scope, label] for scope in reversed(scopes) if (scope, label) in self.labels]
            if not found:
                raise PtxError(f"no label {label!r}")
            instruction.target = found[0]
        for variable in self.module_shared:
            if not variable[1]:
                self._place(*variable)
        self.kernel.constants = dict(self.constants)
        self.kernels[self.kernel.name] = self.kernel
        self.kernel = None

    def _directive(self, text: str) -> None:
        if shared := _SHARED.search(text):
            size = SIZES[shared[2]] * int(shared[4] or 0 if shared[4] is not None else 1)
            variable = (shared[3], size, max(int(shared[1] or 1), SIZES[shared[2]], 16))
            if self.kernel is None:
                self.module_shared.append(variable)
            else:
                self._place(*variable)
        elif (local := _VARIABLE.match(text)) and local[1] == "local":
            assert self.kernel is not None
            start = -(-self.kernel.local_bytes // 16) * 16
            self.kernel.local[local[3]] = start
            self.kernel.local_bytes = start + SIZES[local[2]] * int(local[4] or 1)
        elif table := _VARIABLE.match(text):
            self._constant(table)
        elif match := re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)$", text, re.S):
            for name in match[2].split(","):
                self._declare(name.strip(), match[1])
        elif not re.match(r"\.(pragma|extern|visible|global|const|weak|maxnreg|minnctapersm|noreturn)\b", text):
            raise PtxError(f"directive {text.split()[0]!r} is not supported")

    def _constant(self, table: re.Match[str]) -> None:
        """Only numbers: a table of addresses is not kept, and an error where it is used."""
        size, count = SIZES[table[2]], int(table[4] or 1)
        items = [_NUMBER.match(item) for item in _split((table[5] or "").strip("{} "))]
        if all(items):
            values = [int(n[2] or n[3], 16) if n[2] or n[3] else int(n[1] + n[4], 0) for n in items if n]
            data = b"".join((value & ((1 << 8 * size) - 1)).to_bytes(size, "little") for value in values)
            self.constants[table[3]] = data.ljust(size * count, b"\0")

    def _declare(self, name: str, kind: str) -> None:
        assert self.kernel is not None
        stem, _, count = name.partition("<")
        for full in [f"{stem}{i}" for i in range(int(count.rstrip(">")))] if count else [name]:
            self.scopes[-1][full] = Register(full, len(self.kernel.registers), kind)
            self.kernel.registers.append(kind)

    def _instruction(self, line: int, text: str) -> None:
        assert self.kernel is not None
        text = " ".join(text.split())
        rest, predicate, negated = text, None, False
        if match := re.match(r"@(!?)([%\w$]+)\s+", text):
            negated, rest = bool(match[1]), text[match.end() :]
            predicate = self._register(match[2])
        opcode = _OPCODE.match(rest)
        if opcode is None:
            raise PtxError(f"{text!r} is not an instruction")
        arguments = _split(rest[opcode.end() :])
        index = len(self.kernel.instructions)
        is_branch = opcode[1].split(".")[0] == "bra"
        operands = () if is_branch else tuple(self._operand(a) for a in arguments)
        instruction = Instruction(index, opcode[1], operands, line, text, self.loc, predicate, negated)
        if is_branch:
            self.branches.append((instruction, arguments[0], list(self.scope_ids)))
        self.kernel.instructions.append(instruction)

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise PtxError(f"register {name!r} is not declared")

    def _operand(self, text: str) -> Any:
        if text.startswith("{"):
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            address, *coordinates = _split(text[1:-1])
            base, _, offset = address.replace(" ", "").partition("+")
            items = tuple(c for v in coordinates for c in self._operand(v).items)
            return Memory(self._operand(base), int(offset, 0) if offset else 0, items)
        if number := _NUMBER.match(text):
            if number[2] or number[3]:
                return Immediate(int(number[2] or number[3], 16), 32 if number[2] else 64)
            return Immediate(int(number[1] + number[4], 0))
        if text in ("_", ""):
            return None
        if text.startswith("!"):
            return Negated(self._register(text[1:]))
        if "|" in text:
            return Vector(tuple(self._operand(item) for item in text.split("|")))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("%"):
            return Special(text)
        return Symbol(text)


@functools.lru_cache(maxsize=1 << 16)  # kernels that are parsed again are nearly the same
def _split(text: str) -> tuple[str, ...]:
    """At the commas outside of brackets and braces."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "," and not depth:
            items.append(text[start:i].strip())
            start = i + 1
    items.append(text[start:].strip())
    return tuple(items) if items != [""] else ()
