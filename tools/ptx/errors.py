"""What can go wrong with a kernel, or with running it."""

from __future__ import annotations

__all__ = ["PtxError", "PtxSyntaxError", "UnknownOpcode"]


class PtxError(RuntimeError):
    """What the machine found wrong with a kernel while it ran.

    Attributes:
        what: the finding, such as "race: load of shared memory at byte 64, which warp 2 lane 3 wrote, ...".
        kernel: its name.
        line: of the PTX, from 1; 0 when no instruction is to blame.
        text: that line.
        block: number of the block, x first.
        warp: of the block; -1 when none is to blame.
        lane: of the warp; -1: all.
        seed: what the order of the warps was drawn from.
    """

    def __init__(
        self, what: str, kernel: str, line: int, text: str, block: int, warp: int, lane: int, seed: int
    ) -> None:  # fmt: skip
        self.what, self.kernel, self.line, self.text = what, kernel, line, text
        self.block, self.warp, self.lane, self.seed = block, warp, lane, seed
        place = f"block {block}" + (f", warp {warp}" if warp >= 0 else "") + (f", lane {lane}" if lane >= 0 else "")
        where = f", PTX line {line}: {text[:120]}" if line else ""
        super().__init__(f"{kernel}: {what} ({place}, seed {seed}{where})")


class PtxSyntaxError(ValueError):
    """PTX that this machine cannot read."""

    def __init__(self, why: str, line: int, text: str) -> None:
        self.line = line
        super().__init__(f"PTX line {line}: {why}: {text.strip()[:160]}")


class UnknownOpcode(PtxSyntaxError):
    """An instruction that is in neither table.

    Args:
        opcode: with all modifiers.
        forms: that the tables have of it, with other modifiers.
        table: file that has it with others; None: neither.
        line, text: where it stands.
    """

    def __init__(self, opcode: str, forms: list[str], table: str | None, line: int, text: str) -> None:
        self.opcode = opcode
        where = f"tools/ptx/{table}" if table else (
            "tools/ptx/opcodes.py, or to tools/ptx/instructions.py when it is more than an expression of one lane"
        )  # fmt: skip
        known = f" with these modifiers, only as {', '.join(forms)}" if forms else " in this form" if table else ""
        super().__init__(f"opcode {opcode} is unknown{known}; add it to {where}", line, text)
