"""What matters in a compiled kernel, counted: per kernel, per loop over near tiles, per loop over far tiles."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from offline.listing import Listing

__all__ = ["Counts", "Report", "count", "matrix_name", "zones"]

# The first pattern that matches the start of an opcode decides; NVIDIA's names first, AMD's after them.
_KINDS = (
    ("matrix", r"HGMMA|QGMMA|IGMMA|HMMA|UTC[A-Z]*MMA|v_mfma|v_smfma"),
    ("shuffles", r"SHFL|ds_bpermute|ds_permute|ds_swizzle|v_permlane|.*_dpp$"),
    ("local_loads", r"LDL|scratch_load"),
    ("local_stores", r"STL|scratch_store"),
    ("shared_loads", r"LDS(?!M)|LDSM|ds_read|ds_load"),
    ("shared_stores", r"STS|STSM|ds_write|ds_store"),
    ("special", r"MUFU|v_exp_|v_log_|v_rcp_"),
)
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _KINDS)
# Near tiles multiply with the tables as well: five products a tile and more, where far tiles have two.
_NEAR = 1.5


@dataclass(frozen=True)
class Counts:
    """Numbers of instructions, per warp, as they stand in the code.

    Attributes:
        instructions: all of them.
        matrix: matrix instructions; names differ by device: HGMMA, HMMA, UTCHMMA, v_mfma.
        shuffles: exchanges between the lanes of a warp.
        local_loads: loads from local memory, which is where registers spill to.
        local_stores: stores to local memory.
        shared_loads: loads from shared memory.
        shared_stores: stores to shared memory.
        wavefronts: what NVIDIA's loads and stores of those take without bank conflicts: one per 4 bytes of a lane.
        special: exponentials, logarithms, reciprocals.
    """

    instructions: int = 0
    matrix: int = 0
    shuffles: int = 0
    local_loads: int = 0
    local_stores: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    wavefronts: int = 0
    special: int = 0

    @property
    def local(self) -> int:
        """Return the accesses to local memory."""
        return self.local_loads + self.local_stores


@dataclass(frozen=True)
class Report:
    """What one kernel compiled to.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        matrix_name: which matrix instruction, such as "HGMMA"; "" when there is none.
        whole: counts of the kernel.
        near: counts of the loop over tiles near the diagonal, or of the only loop; None without a loop.
        far: counts of the loop over saturated tiles; None when no loop multiplies less than another.
        unfenced: matrix instructions that may read what an asynchronous copy wrote without a fence between them.
    """

    registers: int
    stack: int
    shared: int
    matrix_name: str
    whole: Counts
    near: Counts | None
    far: Counts | None
    unfenced: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the fields, counts as dictionaries."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Report:
        """Return the report that `as_json` gave."""
        parts = {name: None if value[name] is None else Counts(**value[name]) for name in ("whole", "near", "far")}
        return Report(**{**value, **parts})


def count(opcodes: list[str]) -> Counts:
    """Count opcodes by kind."""
    found = dict.fromkeys((field.name for field in fields(Counts)), 0)
    found["instructions"] = len(opcodes)
    for opcode in opcodes:
        for name, pattern in _PATTERNS:
            if pattern.match(opcode):
                found[name] += 1
                if name in ("shared_loads", "shared_stores"):
                    found["wavefronts"] += _wavefronts(opcode)
                break
    return Counts(**found)


def _wavefronts(opcode: str) -> int:
    width = re.search(r"\.(64|128)$", opcode)
    return int(width[1]) // 32 if width else 1


def matrix_name(opcodes: list[str]) -> str:
    """Return the first matrix instruction's name without suffixes, or ""."""
    pattern = _PATTERNS[0][1]
    found = next((match[0] for opcode in opcodes if (match := pattern.match(opcode))), "")
    return found.removeprefix("v_")


def zones(listing: Listing, *, shortest: bool = False) -> tuple[Counts | None, Counts | None]:
    """Return the counts of the near and of the far loop; with `shortest`, of the shortest pass of each.

    Loops over tiles are the innermost loops that multiply matrices. Those that multiply at least half as much again
    as the leanest one are near loops; of several, the largest of each count is taken. Of the others the shortest one is
    the far loop: the longer ones run over the few tiles at an end of a zone, or with a mask.
    """
    multiplying = [loop for loop in listing.loops if count(listing.opcodes(loop.indices)).matrix]
    inner = [loop for loop in multiplying if not any(loop.holds(other) for other in multiplying)]
    found = [count(listing.opcodes(listing.shortest_pass(loop) if shortest else loop.indices)) for loop in inner]
    if not found:
        return None, None
    leanest = min(counts.matrix for counts in found)
    near = [counts for counts in found if counts.matrix >= _NEAR * leanest]
    far = [counts for counts in found if counts.matrix < _NEAR * leanest]
    return (_largest(near), min(far, key=lambda counts: counts.instructions)) if near else (_largest(far), None)


def _largest(counts: list[Counts]) -> Counts:
    names = [field.name for field in fields(Counts)]
    return Counts(**{name: max(getattr(one, name) for one in counts) for name in names})
