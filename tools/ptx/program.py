"""A kernel ready to run: its instructions as arrays, laid out as cpp/program.h says."""

from __future__ import annotations

import re

import numpy as np

from ptx.assembler import PREDICATE, Assembler
from ptx.build import numbers
from ptx.instructions import encode
from ptx.parser import Kernel, parse

__all__ = ["ROW_SIZES", "Program"]

# struct Instruction and struct Initial of cpp/program.h.
_INSTRUCTION = np.dtype([("words", np.int32, 8), ("offset", np.int64)])
_INITIAL = np.dtype([("words", np.int32, 4), ("value", np.uint64)])
ROW_SIZES = (_INSTRUCTION.itemsize, _INITIAL.itemsize)


class Program:
    """The arrays of one kernel.

    Attributes:
        kernel: what was read.
        lines: of the PTX, by instruction, from 1.
        instructions: one row of nine numbers each, with the offset in the last.
        operands, settings: what the rows point into.
        initial: what registers hold at the start.
        words: of the registers of a warp.
        products: whether wgmma is used.
        smallest_access: bytes of the smallest access to shared memory, 1, 2 or 4.
    """

    def __init__(self, text: str, name: str | None = None) -> None:
        self.source = text.split("\n")
        self.kernel: Kernel = parse(text, name)
        assembler = Assembler(self.kernel)
        rows, operands, settings = [], [], []
        handlers = numbers()
        for statement in self.kernel.statements:
            guard = -1
            encoded = encode(assembler, statement)
            if statement.guard:
                guard = assembler.register(statement.guard, "pred")
            rows.append(
                (handlers[encoded.handler], guard, int(statement.negated), encoded.target, len(operands),
                 encoded.results, len(encoded.operands), len(settings), encoded.offset)
            )  # fmt: skip
            operands += encoded.operands
            settings += encoded.settings
        self.lines = [statement.line for statement in self.kernel.statements]
        self.opcodes = [statement.opcode for statement in self.kernel.statements]
        self.instructions = np.array([(row[:8], row[8]) for row in rows], _INSTRUCTION)
        # Behind the operands, two for `set_true`.
        self.operands = np.array([*operands, 0, assembler.constant(1, PREDICATE)], np.int32)
        self.settings = np.array([*settings, 0], np.int32)
        self.initial = np.array([((i.offset, i.width, i.kind, 0), i.value) for i in assembler.initial], _INITIAL)
        self.words = -(-assembler.words // 64) * 64
        self.products = any(opcode.startswith("wgmma.mma") for opcode in self.opcodes)
        self.smallest_access = min((_shared_bytes(opcode) for opcode in self.opcodes), default=4)

    def set_true(self, index: int) -> int:
        """Return where operands of mov.pred stand that make a predicate true.

        Args:
            index: of the operand that is the predicate. Good until the next call.
        """
        self.operands[-2] = self.operands[index]
        return len(self.operands) - 2


def _shared_bytes(opcode: str) -> int:
    """Return the bytes that an instruction moves to or from shared memory at once, 4 if it is more or none."""
    found = re.fullmatch(r"(?:ld|st)(?!\.(?:global|param))[\w.:]*?(?:\.v([24]))?\.[busf](8|16|32|64)", opcode)
    return min(4, int(found[1] or 1) * int(found[2]) // 8) if found else 4
