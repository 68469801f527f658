"""Disassembly, read: instructions, basic blocks, and the loops among them.

A loop is a natural loop of the flow graph, not a backward jump on the page: compilers put the slow half of a wait
behind the end of the kernel and jump back from there, which is no loop of the program.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Instruction", "Listing", "Loop", "read_amdgcn", "read_sass"]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its suffixes, such as "LDS.U.32" or "v_mfma_f32_32x32x8_bf16".
        target: label it may jump to, or "".
        falls_through: whether the next instruction can follow it.
    """

    opcode: str
    target: str = ""
    falls_through: bool = True


@dataclass(frozen=True)
class Loop:
    """One natural loop.

    Attributes:
        first: index of its first instruction in the listing; loops sort by it.
        indices: every instruction of the body, those of inner loops included, in the order of the listing.
    """

    first: int
    indices: tuple[int, ...]

    def holds(self, other: Loop) -> bool:
        """Return whether another loop lies inside this one."""
        return other is not self and set(other.indices) < set(self.indices)


@dataclass(frozen=True)
class Listing:
    """The instructions of one kernel, and where its labels point.

    Attributes:
        instructions: in the order of the listing.
        labels: label -> index of the instruction it stands before.
    """

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def opcodes(self, indices: Iterable[int] | None = None) -> list[str]:
        """Return the opcodes of some instructions, or of all."""
        chosen = range(len(self.instructions)) if indices is None else indices
        return [self.instructions[i].opcode for i in chosen]

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Return the natural loops, outer ones before those inside them."""
        blocks = self._blocks
        successors = self._successors(blocks)
        dominators = _dominators(successors)
        predecessors: list[list[int]] = [[] for _ in blocks]
        for block, following in enumerate(successors):
            for other in following:
                predecessors[other].append(block)
        bodies: dict[int, set[int]] = {}
        for block, following in enumerate(successors):
            for header in following:
                if header in dominators[block]:
                    body = bodies.setdefault(header, {header})
                    waiting = [block]
                    while waiting:
                        member = waiting.pop()
                        if member not in body:
                            body.add(member)
                            waiting += [p for p in predecessors[member] if dominators[p]]
        loops = []
        for header, body in bodies.items():
            indices = tuple(i for block in sorted(body) for i in range(*blocks[block]))
            loops.append(Loop(blocks[header][0], indices))
        return tuple(sorted(loops, key=lambda loop: (loop.first, -len(loop.indices))))

    def shortest_pass(self, loop: Loop) -> tuple[int, ...]:
        """Return the instructions of the shortest way once around a loop, which leaves out its rarer branches."""
        blocks, members = self._blocks, set(loop.indices)
        successors = self._successors(blocks)
        header = next(n for n, (start, _) in enumerate(blocks) if start == loop.first)
        best: dict[int, tuple[int, ...]] = {}
        waiting = [(blocks[header][1] - blocks[header][0], (header,))]
        while waiting:
            length, way = heapq.heappop(waiting)
            if header in successors[way[-1]]:
                return tuple(i for block in way for i in range(*blocks[block]))
            if way[-1] in best:
                continue
            best[way[-1]] = way
            for block in successors[way[-1]]:
                if blocks[block][0] in members and block not in best:
                    heapq.heappush(waiting, (length + blocks[block][1] - blocks[block][0], (*way, block)))
        raise ValueError("the loop does not lead back to its first instruction.")

    @cached_property
    def _blocks(self) -> list[tuple[int, int]]:
        count = len(self.instructions)
        starts = {0, *(i for i in self.labels.values() if i < count)}
        for i, instruction in enumerate(self.instructions):
            if (instruction.target or not instruction.falls_through) and i + 1 < count:
                starts.add(i + 1)
        ordered = sorted(starts)
        return list(zip(ordered, [*ordered[1:], count], strict=True))

    def _successors(self, blocks: list[tuple[int, int]]) -> list[list[int]]:
        block_at = {start: number for number, (start, _) in enumerate(blocks)}
        found = []
        for number, (_, stop) in enumerate(blocks):
            last = self.instructions[stop - 1]
            following = []
            if last.target in self.labels and self.labels[last.target] in block_at:
                following.append(block_at[self.labels[last.target]])
            if last.falls_through and number + 1 < len(blocks):
                following.append(number + 1)
            found.append(following)
        return found


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """Return for each block the blocks every way from block 0 to it passes; an unreachable block has none."""
    order: list[int] = []
    seen, waiting = {0}, [(0, iter(successors[0]))]
    while waiting:  # depth first, without recursion: a kernel has hundreds of blocks in a row
        block, following = waiting[-1]
        step = next((b for b in following if b not in seen), None)
        if step is None:
            order.append(block)
            waiting.pop()
        else:
            seen.add(step)
            waiting.append((step, iter(successors[step])))
    order.reverse()
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for other in successors[block]:
            predecessors[other].append(block)
    found: list[set[int]] = [set() for _ in successors]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [found[p] for p in predecessors[block] if found[p]]
            new = set.intersection(*known) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


_SASS_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_SASS = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s+(?:\{\s*)?(?:(@!?U?P[T\d]+)\s+)?([A-Z][A-Za-z0-9_.]+)\s*(.*?);")
_SASS_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def read_sass(text: str) -> Listing:
    """Read what `nvdisasm -c` prints."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
            continue
        match = _SASS.match(line)
        if match is None:
            continue
        predicate, opcode, operands = match.groups()
        name = opcode.split(".")[0]
        # A loop is also left by a call that never returns: CALL.REL.NOINC `(...)
        target = _SASS_TARGET.search(operands) if name in ("BRA", "CALL") else None
        # Branches also carry their condition as an operand: BRA.U UP0, `(...)
        always = not predicate and (target is None or operands.startswith("`"))
        ends = name in ("EXIT", "RET", "BRX", "JMX", "BRA") and always
        instructions.append(Instruction(opcode, target[1] if target else "", not ends))
    return Listing(tuple(instructions), labels)


_AMD_LABEL = re.compile(r"(\.LBB\d+_\d+):")
_AMD = re.compile(r"\t([a-z][a-z0-9_]+)(?:\s+(.*))?$")
_AMD_MNEMONIC = re.compile(r"(s|v|ds|buffer|global|flat|scratch)_")


def read_amdgcn(text: str) -> Listing:
    """Read the assembly that Triton keeps for AMD devices."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(instructions)
            continue
        match = _AMD.match(line.split(";")[0].rstrip())
        if match is None or not _AMD_MNEMONIC.match(match[1]):
            continue
        opcode, operands = match[1], match[2] or ""
        jumps = opcode.startswith(("s_branch", "s_cbranch"))
        ends = opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))
        # A cross-lane move is a modifier of an ordinary instruction here.
        name = f"{opcode}_dpp" if " row_" in operands or "quad_perm" in operands else opcode
        instructions.append(Instruction(name, operands.strip() if jumps else "", not ends))
    return Listing(tuple(instructions), labels)
