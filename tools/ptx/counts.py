"""What a kernel has executed: by class of instruction, and by line of its PTX."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from ptx.machine import Machine

__all__ = ["LineCount", "by_class", "by_line", "class_of", "conflicts"]

# Opcodes that begin so, in this order.
_CLASSES = (
    ("matrix", r"wgmma\.mma|mma\."),
    ("load matrix", r"ldmatrix"),
    ("store matrix", r"stmatrix"),
    ("asynchronous copy", r"cp\."),
    ("barrier", r"bar|barrier|mbarrier|membar|fence|wgmma|setmaxnreg"),
    ("load shared", r"ld\.(\w+\.)*?shared"),
    ("store shared", r"st\.(\w+\.)*?shared"),
    ("load global", r"ld\.(\w+\.)*?global|ld\.[usbfv]"),
    ("store global", r"st\.(\w+\.)*?global|st\.[usbfv]"),
    ("load parameter", r"ld\.param"),
    ("atomic", r"atom|red\."),
    ("exchange", r"shfl|vote|redux|elect"),
    ("special function", r"ex2|lg2|rcp|sqrt|rsqrt|div\.\w+\.?\w*\.f|sin|cos"),
    ("branch", r"bra|ret|exit|trap"),
    ("convert", r"cvt|cvta"),
    ("move", r"mov|selp|prmt"),
    ("predicate", r"setp|(and|or|xor|not)\.pred"),
    ("float", r"\w+\.(\w+\.)*(f32|f64|f16|bf16|f16x2|bf16x2)$"),
)
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _CLASSES)


class LineCount(NamedTuple):
    """What one instruction of the PTX came to.

    Attributes:
        line: of the PTX, from 1.
        opcode: of the instruction.
        executed: by warps.
        wavefronts: of shared memory.
        needed: wavefronts, had there been no bank conflicts.
        sectors: of 32 bytes of global memory.
        bytes: of global memory, as asked for by each lane.
    """

    line: int
    opcode: str
    executed: int
    wavefronts: int
    needed: int
    sectors: int
    bytes: int


def class_of(opcode: str) -> str:
    """Return the class of an opcode; what is in no other is "integer"."""
    return next((name for name, pattern in _PATTERNS if pattern.match(opcode)), "integer")


def by_line(machine: Machine) -> list[LineCount]:
    """Return the counts of every instruction that was executed, in the order of the PTX."""
    program = machine.program
    rows = zip(program.lines, program.opcodes, machine.counts.tolist(), strict=True)
    return [LineCount(line, opcode, *counts) for line, opcode, counts in rows if counts[0]]


def by_class(machine: Machine) -> Counter[str]:
    """Return how many instructions of each class warps have executed."""
    found: Counter[str] = Counter()
    for count in by_line(machine):
        found[class_of(count.opcode)] += count.executed
    return found


def conflicts(machine: Machine) -> list[LineCount]:
    """Return the instructions that met bank conflicts, those with the most extra wavefronts first."""
    found = [count for count in by_line(machine) if count.wavefronts > count.needed]
    return sorted(found, key=lambda count: count.needed - count.wavefronts)
