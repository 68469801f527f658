"""Proxy fences between asynchronous copies and the matrix instructions that read shared memory, looked for in PTX.

`cp.async` writes shared memory through the generic proxy; `wgmma` and `tcgen05` read it through the async proxy. A wait
for the copies is not enough: without a `fence.proxy.async` behind it the products may read what was there before (PTX
ISA, "Async proxy"). The rule here is stricter: behind every wait, on every path to a matrix instruction, is a fence.
"""

from __future__ import annotations

import re

__all__ = ["unfenced"]

_LABEL = re.compile(r"^\s*(\$\w+):")
_BRANCH = re.compile(r"(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$\w+)")
_WAIT = re.compile(r"cp\.async\.wait_(group|all)\b")
_FENCE = re.compile(r"\bfence\.proxy\.async(\.shared::\w+)?$")
_READ = re.compile(r"\b(wgmma\.mma_async|tcgen05\.(mma|cp))\b")
_END = re.compile(r"(@!?%\w+\s+)?(ret|exit)\b")


def unfenced(ptx: str) -> int:
    """Return how many matrix instructions some path from a wait for `cp.async` reaches without a fence."""
    lines = [part.strip() for line in ptx.splitlines() for part in line.split("//")[0].split(";")]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    found, seen = set[int](), set[int]()
    waiting = [i + 1 for i, line in enumerate(lines) if _WAIT.search(line)]
    while waiting:
        at = waiting.pop()
        if at in seen or at >= len(lines):
            continue
        seen.add(at)
        line = lines[at]
        if _FENCE.search(line):
            continue
        if _READ.search(line):
            found.add(at)
        branch, end = _BRANCH.search(line), _END.search(line)
        if branch:
            waiting.append(labels[branch[2]])
        conditional = (branch and branch[1]) or (end and end[1])
        if conditional or not (branch or end):
            waiting.append(at + 1)
    return len(found)
