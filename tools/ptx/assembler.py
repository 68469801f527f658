"""Give registers, constants and symbols of a kernel their places, for the machine's register file.

A register of 32 bits takes 32 words, one a lane; one of 64 bits 64; a predicate one word, one bit a lane. Constants are
registers that are filled when a block starts.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from ptx.errors import PtxSyntaxError
from ptx.opcodes import WIDE
from ptx.parser import Kernel, Statement

__all__ = ["PREDICATE", "Assembler", "Encoded", "Initial"]

LANES = 32
# InitialKind of cpp/program.h.
_CONSTANT = 0
_SPECIAL = {"%tid.x": 1, "%laneid": 2, "%warpid": 3, "%ctaid.x": 4, "%ctaid.y": 5, "%ctaid.z": 6, "%nctaid.x": 7,
            "%nctaid.y": 8, "%nctaid.z": 9, "%ntid.x": 10}  # fmt: skip
# Blocks are one-dimensional here.
_FIXED = {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
_WIDE_TYPES = frozenset(("b64", "u64", "s64", "f64"))
_ADDRESS = re.compile(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
# Widths of registers, in groups of 32 words; a predicate is less than one.
PREDICATE, _NARROW, _DOUBLE = 0, 1, 2


@dataclass(frozen=True)
class Initial:
    """What a register holds when a block starts; see cpp/program.h."""

    offset: int
    width: int
    kind: int
    value: int


@dataclass
class Encoded:
    """One instruction as the machine wants it; see cpp/program.h."""

    handler: str
    operands: list[int] = field(default_factory=list)
    results: int = 0
    settings: list[int] = field(default_factory=list)
    offset: int = 0
    target: int = -1


class Assembler:
    """Places of one kernel's registers, handed out as they are asked for."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.statement: Statement | None = None
        self._places: dict[object, tuple[int, int]] = {}
        self.initial: list[Initial] = []
        self._parameters = {p.name: p.offset for p in kernel.parameters}
        predicates = sum(t == "pred" for t in kernel.types.values()) + kernel.ranges.get("%p", ("", 0))[1]
        # Predicates come first, then whole registers, on boundaries of 64 words; 64 more for constants and unused ones.
        self._next_predicate = 0
        self._first = -(-(predicates + 64) // 64) * 64
        self.words = self._first

    def fail(self, why: str) -> PtxSyntaxError:
        """Return an error about the statement at hand."""
        at = self.statement
        assert at is not None
        return PtxSyntaxError(why, at.line, f"{at.opcode} {', '.join(at.operands)}")

    def _place(self, key: object, width: int) -> int:
        if key not in self._places:
            if width == PREDICATE:
                self._places[key] = self._next_predicate, width
                self._next_predicate += 1
                if self._next_predicate > self._first:
                    raise self.fail("more predicates than were declared")
            else:
                self._places[key] = self.words, width
                self.words += LANES * width
        place, was = self._places[key]
        if was != width:
            raise self.fail(f"{key} is used as if it had another size")
        return place

    def constant(self, value: int, width: int = _NARROW) -> int:
        """Return the place of a constant."""
        key = ("constant", value, width)
        known = key in self._places
        place = self._place(key, width)
        if not known:
            self.initial.append(Initial(place, width, _CONSTANT, value))
        return place

    def register(self, text: str, kind: str) -> int:
        """Return the place of a register, a number or a symbol.

        Args:
            text: of the operand.
            kind: type by which the instruction reads it, such as "s32" or "pred".
        """
        width = PREDICATE if kind == "pred" else _DOUBLE if kind in WIDE or kind in _WIDE_TYPES else _NARROW
        assert self.statement is not None
        if found := self.kernel.register(text, self.statement.scope):
            name, declared = found
            actual = PREDICATE if declared == "pred" else _DOUBLE if declared in _WIDE_TYPES else _NARROW
            if actual != width:
                raise self.fail(f"{text} is declared as .{declared} and used as .{kind}")
            return self._place(name, width)
        if text in _SPECIAL:
            known = text in self._places
            place = self._place((text, width), width)
            if not known:
                self.initial.append(Initial(place, width, _SPECIAL[text], 0))
            return place
        if text in _FIXED:
            return self.constant(_FIXED[text], width)
        if text == "_":
            return self._place(("unused", width), width)
        return self.constant(self._number(text, kind), width)

    def is_wide(self, text: str) -> bool:
        """Return whether an operand is a register of 64 bits."""
        assert self.statement is not None
        found = self.kernel.register(text, self.statement.scope)
        return found is not None and found[1] in _WIDE_TYPES

    def _number(self, text: str, kind: str) -> int:
        if text in self.kernel.shared:
            return self.kernel.shared[text]
        if text in self.kernel.local:
            return self.kernel.local[text]
        if text in self._parameters:
            return self._parameters[text]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            bits = int(text[2:], 16)
            single = struct.unpack("<f", struct.pack("<I", bits))[0]
            return struct.unpack("<Q", struct.pack("<d", single))[0] if kind == "f64" else bits
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return int(text[2:], 16)
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise self.fail(f"{text} is no register, number, parameter or shared array of this kernel") from None
        if kind == "pred":
            return int(value != 0)
        return value & ((1 << 64) - 1 if kind in WIDE or kind in _WIDE_TYPES else (1 << 32) - 1)

    def address(self, text: str, wide: bool) -> tuple[int, int]:
        """Return place and offset of an address in brackets."""
        found = _ADDRESS.match(text)
        if not found:
            raise self.fail(f"{text} is no address")
        return self.register(found[1], "u64" if wide else "u32"), int(found[2] or "0", 0)

    def address_is_wide(self, text: str) -> bool:
        """Return whether an address in brackets is a register of 64 bits."""
        found = _ADDRESS.match(text)
        return found is not None and self.is_wide(found[1])

    def vector(self, text: str, kind: str) -> list[int]:
        """Return the places of registers in braces, or of one without."""
        if not text.startswith("{"):
            return [self.register(text, kind)]
        return [self.register(part.strip(), kind) for part in text[1:-1].split(",")]
