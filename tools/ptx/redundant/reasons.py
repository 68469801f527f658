"""Why a kernel does not need one of its barriers, waits and fences: what its program says, on every path.

What the machine finds nothing wrong with was right on the paths that were executed. These are the reasons why: each is
told from the program alone, or is the machine's own finding on paths that the program bounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx.program import Program

__all__ = ["CLASSES", "reason"]

# By name: what the program says, and for which instructions.
CLASSES = {
    "no access between": "no memory that is written is accessed between it and the barriers before, or those behind",
    "loads alone": "on both sides up to the next barriers, memory is only read",
    "other bytes": "what is written on one side of it is not touched on the other, except by the same lane",
    "next group": "another commit comes before any wait, so that what was started is waited for as well",
    "later group": "another commit comes behind it, and a wait, before what was started is touched",
    "nothing in flight": "on every path another wait, no weaker, comes before it, and nothing was started since",
    "nothing started": "what it would wait for is started only where no call comes",
    "later wait": "on every path another wait, no weaker, comes behind it, before what it waits for is touched",
    "nothing written": "on every path another proxy fence comes before it, and no store to shared memory since",
    "fence behind": "on every path another proxy fence comes behind it, before any product of tensor cores",
    "another fence": "what was written since the fence before is not read by tensor cores before the fence behind",
    "registers untouched": "the registers of the products behind it have not been accessed since the fence before",
}

_SHARED = re.compile(r"(ld|st)\.(volatile\.)?shared|(ld|st)matrix|cp\.async\.c|wgmma\.(mma|wait)|cp\.async\.wait")
_SHARED_WRITE = re.compile(r"st\.(volatile\.)?shared|stmatrix|cp\.async\.c|cp\.async\.wait")
_GLOBAL = re.compile(r"(ld|st)\.(volatile\.)?global|(ld|st)\.(relaxed|acquire|release)|cp\.async\.c|atom|red\.")
_GLOBAL_WRITE = re.compile(r"st\.(volatile\.)?global|st\.(relaxed|release)|atom|red\.")
_BARRIER = re.compile(r"bar(rier)?\.(cta\.)?sync")
_PROXY_FENCE = re.compile(r"fence\.proxy\.async")


@dataclass(frozen=True)
class _Reach:
    """What is met on the way from an instruction to those that stop it.

    Attributes:
        passed: instructions on the way.
        stops: those that stopped it.
        ends: whether some path reaches the start or the end of the kernel.
    """

    passed: set[int]
    stops: set[int]
    ends: bool


class _Flow:
    """The ways through a program."""

    def __init__(self, program: Program) -> None:
        self.opcodes = program.opcodes
        words = program.instructions["words"]
        self.behind: list[list[int]] = []
        for i, opcode in enumerate(self.opcodes):
            guarded = words[i, 1] >= 0
            ways = [i + 1] if guarded or not re.match(r"bra\b|ret\b|exit\b|trap\b", opcode) else []
            if re.match(r"bra\b", opcode):
                ways.append(int(words[i, 3]))
            self.behind.append(ways)
        self.before: list[list[int]] = [[] for _ in self.opcodes]
        for i, ways in enumerate(self.behind):
            for way in ways:
                self.before[way].append(i)

    def reach(self, start: int, ways: list[list[int]], stop: Callable[[str], bool]) -> _Reach:
        """Follow every path, in one direction."""
        passed: set[int] = set()
        stops: set[int] = set()
        ends, pending = False, [start]
        while pending:
            at = pending.pop()
            following = ways[at]
            ends |= not following or (ways is self.before and at == 0)
            for i in following:
                if stop(self.opcodes[i]):
                    stops.add(i)
                elif i not in passed:
                    passed.add(i)
                    pending.append(i)
        return _Reach(passed, stops, ends)

    def meets(self, passed: set[int], pattern: re.Pattern[str]) -> bool:
        return any(pattern.match(self.opcodes[i]) for i in passed)


def reason(program: Program, index: int, executed: np.ndarray) -> str:
    """Return the name of the class that an instruction is of which nobody misses, or "".

    Args:
        program: of the kernel.
        index: of an instruction that orders something, and without which the machine found nothing wrong.
        executed: how often each instruction was.
    """
    flow, opcode = _Flow(program), program.opcodes[index]
    if _BARRIER.match(opcode):
        return _barrier(flow, index)
    if _PROXY_FENCE.match(opcode):
        return _proxy_fence(flow, index)
    if opcode.startswith("wgmma.fence"):
        found = flow.reach(index, flow.before, lambda x: x.startswith("wgmma.fence"))
        return "registers untouched" if found.stops and not found.ends else ""
    kind = "wgmma" if opcode.startswith("wgmma") else "cp.async"
    if ".commit_group" in opcode:
        return _commit(flow, index, kind)
    if ".wait_" in opcode:
        return _wait(flow, program, index, kind, executed)
    return ""


def _barrier(flow: _Flow, index: int) -> str:
    ahead = flow.reach(index, flow.behind, lambda x: bool(_BARRIER.match(x))).passed
    past = flow.reach(index, flow.before, lambda x: bool(_BARRIER.match(x))).passed
    spaces = ((_SHARED, _SHARED_WRITE), (_GLOBAL, _GLOBAL_WRITE))
    both = [pair for pair in spaces if flow.meets(ahead, pair[0]) and flow.meets(past, pair[0])]
    conflicts = [pair for pair in both if flow.meets(ahead | past, pair[1])]
    if not conflicts:
        return "loads alone" if any(flow.meets(ahead, a) for a, _ in both) else "no access between"
    return "other bytes"


def _proxy_fence(flow: _Flow, index: int) -> str:
    past = flow.reach(index, flow.before, lambda x: bool(_PROXY_FENCE.match(x)))
    if past.stops and not past.ends and not flow.meets(past.passed, _SHARED_WRITE):
        return "nothing written"
    ahead = flow.reach(index, flow.behind, lambda x: bool(_PROXY_FENCE.match(x)))
    if not flow.meets(ahead.passed, re.compile(r"wgmma\.mma")):
        return "fence behind"
    return "another fence" if past.stops and not past.ends else ""


def _commit(flow: _Flow, index: int, kind: str) -> str:
    commit = re.compile(rf"{kind}\.commit_group")
    wait = re.compile(rf"{kind}\.wait_")
    ahead = flow.reach(index, flow.behind, lambda x: bool(commit.match(x)))
    if ahead.stops and not ahead.ends:
        return "later group" if flow.meets(ahead.passed, wait) else "next group"
    return ""


def _wait(flow: _Flow, program: Program, index: int, kind: str, executed: np.ndarray) -> str:
    wait = re.compile(rf"{kind}\.wait_")
    allowed = program.instructions["offset"]

    def as_strict(found: _Reach) -> bool:
        return all(allowed[i] <= allowed[index] for i in found.stops)

    def met(found: _Reach) -> bool:
        return bool(found.stops) and not found.ends and as_strict(found)

    past = flow.reach(index, flow.before, lambda x: bool(wait.match(x)))
    started = re.compile(r"wgmma\.mma" if kind == "wgmma" else r"cp\.async\.c[ag]")
    if met(past) and not flow.meets(past.passed, started):
        return "nothing in flight"
    if as_strict(past) and not any(executed[i] for i in past.passed if started.match(flow.opcodes[i])):
        return "nothing started"
    return "later wait" if met(flow.reach(index, flow.behind, lambda x: bool(wait.match(x)))) else ""
