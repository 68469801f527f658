"""Take one barrier, wait, fence or arrival out of a kernel at a time: does the machine notice?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ptx.build import numbers
from ptx.errors import PtxError
from ptx.machine import Machine

__all__ = ["Mutant", "is_ordering", "mutants", "try_mutant", "without"]

# What orders something.
_ORDERING = re.compile(
    r"bar(rier)?\.|fence\.|membar|cp\.async\.(bulk\.)?(wait|commit)|wgmma\.(fence|commit|wait)|mbarrier\.(arrive|try_wait|expect)"
)


@dataclass(frozen=True)
class Mutant:
    """A kernel without one of its instructions.

    Attributes:
        index: of the instruction.
        line: of the PTX.
        opcode: of it.
    """

    index: int
    line: int
    opcode: str


def is_ordering(opcode: str) -> bool:
    """Tell whether an instruction orders something."""
    return _ORDERING.match(opcode) is not None


def mutants(machine: Machine) -> list[Mutant]:
    """Return one for each ordering instruction that has been executed."""
    program = machine.program
    return [
        Mutant(i, program.lines[i], opcode)
        for i, opcode in enumerate(program.opcodes)
        if is_ordering(opcode) and machine.counts[i, 0]
    ]


@contextmanager
def without(machine: Machine, mutant: Mutant) -> Iterator[None]:
    """Let the machine pass over an instruction; a wait is over at once."""
    words = machine.program.instructions["words"]
    kept = words[mutant.index].copy()
    if mutant.opcode.startswith("mbarrier.try_wait"):
        # op, guard, negated, target, operands, results, count: the first operand, set to what the second holds.
        words[mutant.index, 0] = numbers()["mov.pred"]
        words[mutant.index, 4:7] = machine.program.set_true(kept[4]), 1, 2
    else:
        words[mutant.index, 0] = numbers()["do_nothing"]
    try:
        yield
    finally:
        words[mutant.index] = kept


def try_mutant(machine: Machine, mutant: Mutant, runs: list[Callable[[], str]]) -> str:
    """Return what the first run finds that finds anything, or "": nobody noticed.

    Args:
        machine: of the kernel.
        mutant: one of its own.
        runs: each runs the kernel, in one order of warps or on one problem, and says what is wrong with the results.
    """
    with without(machine, mutant):
        for run in runs:
            try:
                if found := run():
                    return found
            except PtxError as error:
                return error.what
    return ""
