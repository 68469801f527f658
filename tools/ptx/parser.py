"""Read PTX: one kernel of a module, as statements with the line they stand in.

Follows "Syntax" and "State Spaces, Types, and Variables" of the PTX ISA, as far as compilers use them: no functions, no
variables but arrays in shared and in local memory.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

from ptx.errors import PtxSyntaxError

__all__ = ["NEWEST", "Kernel", "Parameter", "Statement", "entries", "parse"]

# The PTX ISA that the machine was checked against.
NEWEST = (9, 4)
# What may stand between the parameters of a kernel and its body; all but the first is for the assembler.
_ABOUT_KERNELS = frozenset((".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".maxnctapersm", ".pragma"))
_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
          "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 0}  # fmt: skip
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)[^[]*?([\w$]+)(?:\[(\d+)\])?$", re.S)
_ARRAY = re.compile(r"\.(?:shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_ITEM = re.compile(
    r"""\s*(?: (?P<open>\{) | (?P<close>\}) | (?P<label>[\w$]+)\s*:(?!:) | (?P<location>\.(?:loc|file)\b[^\n]*)
    | (?P<directive>\.[a-z][^;]*);
    | (?:@(?P<not>!?)(?P<guard>[%\w$.]+)\s+)? (?P<opcode>[a-z][\w.:]*)\s*(?P<rest>[^;]*); )""",
    re.X,
)
_ADD_DIRECTIVE = "add what it means to tools/ptx/parser.py"
_REGISTERS = re.compile(r"(%?[\w$]+)(?:<(\d+)>)?")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel, at an offset in the parameter space."""

    name: str
    offset: int
    size: int


@dataclass
class Statement:
    """One instruction.

    Attributes:
        opcode: with all modifiers.
        operands: their texts.
        guard: the predicate in front, or None; `negated` when it must be false.
        line: of the PTX, from 1.
        scope: the block of braces it stands in, for names.
        target: for a branch, the index of the statement it goes to.
    """

    opcode: str
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    scope: int
    target: int = -1


@dataclass
class Kernel:
    """One kernel, read.

    Attributes:
        parameters: in order.
        parameter_bytes: of all of them.
        threads: of a block, where the PTX fixes them (.reqntid), else 0.
        statements: the instructions.
        types: type by register; those of inner scopes are called `name@scope`.
        ranges: type and number by prefix, of registers declared as `%r<40>`.
        shared: offset by name, of arrays in shared memory.
        shared_bytes: where dynamic memory begins.
        local, local_bytes: the same of arrays in local memory.
    """

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    parameter_bytes: int = 0
    threads: int = 0
    statements: list[Statement] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[str, int]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    parents: list[int] = field(default_factory=lambda: [-1])

    def register(self, name: str, scope: int) -> tuple[str, str] | None:
        """Return the full name and type of a register as seen from a scope, or None if there is none."""
        while scope > 0:
            if (inner := f"{name}@{scope}") in self.types:
                return inner, self.types[inner]
            scope = self.parents[scope]
        if name in self.types:
            return name, self.types[name]
        number = name.lstrip("%abcdefghijklmnopqrstuvwxyz_")
        kind, count = self.ranges.get(name[: len(name) - len(number)], ("", 0))
        return (name, kind) if number.isdigit() and int(number) < count else None


def entries(text: str) -> list[str]:
    """Return the names of the kernels of a module."""
    return [found[1] for found in _ENTRY.finditer(text)]


def parse(text: str, name: str | None = None) -> Kernel:
    """Read a kernel.

    Args:
        text: a PTX module.
        name: of the kernel; None: its only one.

    Raises:
        PtxSyntaxError: something that this machine does not know.
        ValueError: there is no such kernel.
    """
    text = _without_comments(text)
    _check_version(text)
    found = [m for m in _ENTRY.finditer(text) if name in (None, m[1])]
    if len(found) != 1:
        raise ValueError(f"expected one kernel named {name or '(any)'}, the module has {', '.join(entries(text))}")
    entry = found[0]
    kernel = Kernel(entry[1])
    _read_parameters(kernel, entry[2])
    _read_about_kernel(kernel, entry[3], text.count("\n", 0, entry.start(3)) + 1)
    before = text[: entry.start()]
    outside = before[: before.find(".entry")] if ".entry" in before else before
    declarations = [m for m in _ARRAY.finditer(outside) if m[0].startswith(".shared")]
    for declaration in declarations:
        if declaration[4] != "":
            _declare_shared(kernel, declaration)
    _read_body(kernel, text, entry.end())
    # Dynamic memory, declared without a size, comes behind all that has one.
    for declaration in declarations:
        if declaration[4] == "":
            _declare_shared(kernel, declaration)
    return kernel


def _without_comments(text: str) -> str:
    """Return the text with blanks for comments, so that places in it stay where they are."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)


def _check_version(text: str) -> None:
    found = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", text, re.M)
    if found and (int(found[1]), int(found[2])) > NEWEST:
        known = ".".join(map(str, NEWEST))
        why = (
            f"PTX of ISA {found[1]}.{found[2]}, and this machine knows {known}; read what changed since in the chapter "
            "Release Notes of the PTX ISA, add it to tools/ptx/instructions.py and opcodes.py, and raise NEWEST in "
            "tools/ptx/parser.py"
        )
        raise PtxSyntaxError(why, text.count("\n", 0, found.start(1)) + 1, found[0])


def _read_about_kernel(kernel: Kernel, text: str, line: int) -> None:
    for word in re.findall(r"\.[a-z]\w*", text):
        if word not in _ABOUT_KERNELS:
            raise PtxSyntaxError(f"the directive {word} of a kernel is unknown; {_ADD_DIRECTIVE}", line, text)
    if threads := re.search(r"\.reqntid\s+(\d+)((?:\s*,\s*\d+)*)", text):
        if any(int(n) != 1 for n in re.findall(r"\d+", threads[2])):
            raise PtxSyntaxError("blocks have one dimension here", line, text)
        kernel.threads = int(threads[1])


def _read_parameters(kernel: Kernel, text: str) -> None:
    at = 0
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = _PARAMETER.match(part)
        if not found:
            raise PtxSyntaxError("a parameter of an unknown form", 0, part)
        size = _SIZES[found[2]]
        align = int(found[1] or size)
        at = -(-at // align) * align
        size *= int(found[4] or 1)
        kernel.parameters.append(Parameter(found[3], at, size))
        at += size
    kernel.parameter_bytes = at


def _declare_shared(kernel: Kernel, found: re.Match[str]) -> None:
    kernel.shared[found[3]], kernel.shared_bytes = _placed(found, kernel.shared_bytes)


def _placed(found: re.Match[str], used: int) -> tuple[int, int]:
    """Return where an array begins behind what is used, and how much is used then; without a size it has none."""
    size = _SIZES[found[2]]
    align = int(found[1] or size)
    at = -(-used // align) * align
    return at, at + (size * int(found[4] or 1) if found[4] != "" else 0)


def _read_body(kernel: Kernel, text: str, at: int) -> None:
    newlines = [m.start() for m in re.finditer("\n", text)]
    labels: dict[tuple[str, int], int] = {}
    scopes = [0]
    while True:
        item = _ITEM.match(text, at)
        if item is None:
            line = bisect.bisect(newlines, at) + 1
            raise PtxSyntaxError("neither an instruction nor a declaration", line, text[at : at + 160])
        at, kind = item.end(), item.lastgroup
        if item["opcode"]:
            line = bisect.bisect(newlines, item.start("opcode")) + 1
            operands = split_operands(item["rest"])
            kernel.statements.append(
                Statement(item["opcode"], operands, item["guard"], item["not"] == "!", line, scopes[-1])
            )
        elif kind == "open":
            kernel.parents.append(scopes[-1])
            scopes.append(len(kernel.parents) - 1)
        elif kind == "close":
            scopes.pop()
            if not scopes:
                break
        elif kind == "label":
            labels[item["label"], scopes[-1]] = len(kernel.statements)
        elif kind == "directive":
            _read_directive(kernel, item["directive"], scopes[-1], bisect.bisect(newlines, at) + 1)
    _resolve(kernel, labels)


def _read_directive(kernel: Kernel, text: str, scope: int, line: int) -> None:
    word = text.split(None, 1)[0]
    if word == ".shared" and (found := _ARRAY.match(text)):
        _declare_shared(kernel, found)
        return
    if word == ".local" and (found := _ARRAY.match(text)):
        kernel.local[found[3]], kernel.local_bytes = _placed(found, kernel.local_bytes)
        return
    if word == ".pragma":
        return
    if word != ".reg":
        raise PtxSyntaxError(f"the directive {word} is unknown; {_ADD_DIRECTIVE}", line, text)
    _, kind, names = text.split(None, 2)
    for name, count in _REGISTERS.findall(names):
        if count:
            kernel.ranges[name] = (kind.lstrip("."), int(count))
        else:
            kernel.types[f"{name}@{scope}" if scope else name] = kind.lstrip(".")


def _resolve(kernel: Kernel, labels: dict[tuple[str, int], int]) -> None:
    for statement in kernel.statements:
        if not statement.opcode.startswith("bra"):
            continue
        scope = statement.scope
        while scope >= 0 and (statement.operands[0], scope) not in labels:
            scope = kernel.parents[scope]
        if scope < 0:
            raise PtxSyntaxError(f"there is no label {statement.operands[0]}", statement.line, "")
        statement.target = labels[statement.operands[0], scope]


def split_operands(text: str) -> list[str]:
    """Return what stands between commas, those in brackets and braces aside."""
    if not text.strip():
        return []
    if not re.search(r"[\[{]", text):
        return [part.strip() for part in text.split(",")]
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        if c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]
