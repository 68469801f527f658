"""Figures of a zone from the counts of its instructions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from ptx.counts import class_of
from ptx.parser import Statement

from counted.execution import Executed
from counted.places import Sources
from counted.zones import PAIRS, PROGRAM

__all__ = ["Conflict", "Figures", "conflicts", "figures_of"]

_SCHEDULERS = 4  # of a multiprocessor; a tile of 64 x 64 has as many warps
_MATRIX = re.compile(r"(wgmma\.mma_async|mma\.)\S*?\.m(\d+)n(\d+)k(\d+)")
_BARRIER = re.compile(r"bar(?:rier)?\.(?!warp)")
_WAIT = re.compile(r"cp\.async\.(bulk\.)?wait|wgmma\.wait|mbarrier\.try_wait")
_COPY_ENGINE = re.compile(r"cp\.(reduce\.)?async\.bulk\.(?!commit|wait)")
_WAVEFRONT = 128  # bytes
_NAMES = (
    "instructions", "barriers", "waits", "matrix", "special", "exchange", "wavefronts", "conflicts", "operands",
    "engine", "bytes", "sectors",
)  # fmt: skip
# One product of the matrix units on sm_90 at this tile.
_PRODUCT = 64 * 64 * 16


class Figures(NamedTuple):
    """What 64 x 64 pairs, or one program, take.

    Attributes:
        instructions: of the PTX, per warp where four warps share a tile: those of all warps, divided by four.
        classes: the same by class, see `ptx.counts`.
        values: all figures by name: instructions; barriers and waits, counted likewise; matrix, products of 64 x 64 x
            16; special, exchange: instructions of these classes; wavefronts of shared memory, of all warps, by loads,
            stores and cp.async; conflicts: how many of them are bank conflicts; operands: wavefronts that wgmma reads;
            engine: bytes that the copy engine moves; bytes of global memory as asked for, and sectors of 32 bytes.
    """

    classes: dict[str, float]
    values: dict[str, float]


class Conflict(NamedTuple):
    """Instructions of one source line that meet bank conflicts.

    Attributes:
        place: the source line, and from where it was called.
        opcode: of the PTX.
        executed: by warps, per tile.
        wavefronts: per tile.
        extra: how many of these are conflicts.
    """

    place: str
    opcode: str
    executed: float
    wavefronts: float
    extra: float


def figures_of(kernel: Executed, zone: str) -> Figures:
    """Return the figures of one zone of a kernel."""
    classes: Counter[str] = Counter()
    values = dict.fromkeys(_NAMES, 0.0)
    for statement, counts in _executed(kernel, zone):
        executed, wavefronts, needed, sectors, size = counts
        opcode, warps = statement.opcode, executed / _SCHEDULERS
        classes[class_of(opcode)] += warps
        values["instructions"] += warps
        values["barriers"] += warps * bool(_BARRIER.match(opcode))
        values["waits"] += warps * bool(_WAIT.match(opcode))
        values["wavefronts"] += wavefronts
        values["conflicts"] += wavefronts - needed
        values["bytes"] += size
        values["sectors"] += sectors
        values["engine"] += size * bool(_COPY_ENGINE.match(opcode))
        if shape := _MATRIX.match(opcode):
            m, n, k = map(int, shape.groups()[1:])
            together = 4 if opcode.startswith("wgmma") else 1  # warps
            values["matrix"] += executed / together * m * n * k / _PRODUCT
            if together > 1:
                # Elements of two bytes; the first operand may be in registers.
                elements = n * k + (0 if statement.operands[1].startswith("{") else m * k)
                values["operands"] += executed / together * 2 * elements / _WAVEFRONT
    values["special"], values["exchange"] = classes["special function"], classes["exchange"]
    return Figures(dict(classes), {name: round(value, 2) for name, value in values.items()})


def conflicts(kernel: Executed, zone: str) -> list[Conflict]:
    """Return the source lines whose instructions meet bank conflicts, those with the most first."""
    sources = Sources(kernel.machine.program.source)
    found: dict[tuple[str, str], np.ndarray] = {}
    for statement, (executed, wavefronts, needed, *_) in _executed(kernel, zone):
        if wavefronts != needed:
            key = sources.of(statement.line), statement.opcode
            found[key] = found.get(key, 0.0) + np.array((executed, wavefronts, wavefronts - needed))
    rows = [Conflict(place, opcode, *sums.tolist()) for (place, opcode), sums in found.items()]
    return sorted(rows, key=lambda row: -row.extra)


def _executed(kernel: Executed, zone: str) -> Iterator[tuple[Statement, list[float]]]:
    """Yield every instruction that was executed in a zone, with its counts for 64 x 64 pairs or for one program."""
    statements = kernel.machine.program.kernel.statements
    counts = kernel.zones[zone] / (kernel.blocks if zone == PROGRAM else PAIRS)
    for statement, before, row in zip(statements, [None, *statements], counts.tolist()):
        # What the driver adds behind an instruction is no part of the kernel.
        added = before is not None and before.line == statement.line and statement.opcode.startswith("fence.")
        if any(row) and not added:
            yield statement, row
