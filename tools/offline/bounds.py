"""Committed bounds, to which compiled kernels are held.

`bounds.json` holds, per Triton version, device and kernel, what was measured and the limit that follows from it: a
regression is a number over its limit. Beside it stand promises that no measurement moves; one that is not kept yet is
listed in `missed.json` with the reason, printed on every run, and must not get worse than its bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offline.chips import CHIPS
from offline.counting import Report

__all__ = ["BOUNDS", "MISSED", "broken_promises", "judge", "limits", "load", "store"]

BOUNDS = Path(__file__).resolve().parent / "bounds.json"
MISSED = Path(__file__).resolve().parent / "missed.json"

# How much a number may grow before it is a regression: factor and absolute slack.
SLACK = {
    "registers": (1.0, 16),
    "stack": (1.0, 64),
    "shared": (1.0, 0),
    "instructions": (1.10, 32),
    "shuffles": (1.0, 8),
    "local": (1.0, 24),
    "near_instructions": (1.06, 8),
    "near_local": (1.0, 12),
    "far_instructions": (1.06, 4),
}
# A kernel that multiplies matrices has at least this many instructions; a stub has a dozen.
LEAST_INSTRUCTIONS = 300
# Beyond this share of accesses to local memory a kernel does little else.
MOST_LOCAL = 0.25
# Parts of the names of the kernels that compute attention.
ATTENTION = ("fwd", "_dq", "_dkv", "_position")
# Promises that no measurement moves, for the forward in bfloat16 with head size 64 on sm_90: the near loop, per warp
# and 64 x 64 pairs, and the far loop against plain flash attention with the same tile, both without masks and dropout.
NEAR_INSTRUCTIONS = 950
FAR_OVER_PLAIN = 1.10


def measures(report: Report) -> dict[str, int]:
    """Return the numbers of a report that are bounded."""
    found = {
        "registers": report.registers,
        "stack": report.stack,
        "shared": report.shared,
        "instructions": report.whole.instructions,
        "shuffles": report.whole.shuffles,
        "local": report.whole.local,
    }
    if report.near is not None:
        found |= {"near_instructions": report.near.instructions, "near_local": report.near.local}
    if report.far is not None:
        found["far_instructions"] = report.far.instructions
    return found


def limits(report: Report) -> dict[str, list[int]]:
    """Return [measured, limit] by name, as `bounds.json` keeps them."""
    return {name: [value, int(value * SLACK[name][0]) + SLACK[name][1]] for name, value in measures(report).items()}


def judge(report: Report, chip: str, name: str, bound: dict[str, list[int]] | None) -> list[str]:
    """Return what is wrong with a compiled kernel, one clause each.

    Args:
        report: what it compiled to.
        chip: name of the device.
        name: of the kernel and its variant; the attention kernels must use matrix instructions.
        bound: its entry in `bounds.json`, or None when it has none.
    """
    device, wrong = CHIPS[chip], []
    if report.shared > device.shared:
        wrong.append(f"shared memory {report.shared} is more than the {device.shared} bytes of the device")
    if report.unfenced:
        wrong.append(f"no fence.proxy.async between copies and {report.unfenced} matrix instructions that read them")
    if attends(name):
        if report.whole.instructions < LEAST_INSTRUCTIONS:
            wrong.append(f"a stub: {report.whole.instructions} instructions")
        if "fp32" not in name and not report.matrix_name:
            wrong.append("no matrix instruction")
    if bound is None:
        return [*wrong, "no bound is committed for it; run with --update and look at what changes"]
    for measure, value in measures(report).items():
        if measure not in bound:
            wrong.append(f"no bound for {measure}")
        elif value > bound[measure][1]:
            wrong.append(f"{measure} {value} is over {bound[measure][1]} (was {bound[measure][0]})")
    return wrong


def attends(name: str) -> bool:
    """Return whether a kernel computes attention; the others expand, sum and list."""
    return any(part in name.split()[0] for part in ATTENTION)


def broken_promises(report: Report, chip: str, name: str, plain: int | None) -> list[str]:
    """Return which promises a kernel does not keep, one clause each.

    Args:
        report: what it compiled to.
        chip: name of the device.
        name: of the kernel and its variant.
        plain: instructions of the loop of a plain flash attention with the same tile, or None where none was compiled.
    """
    if not attends(name):
        return []
    wrong, device = [], CHIPS[chip]
    # float32 is multiplied exactly, which no matrix instruction of NVIDIA's does.
    if "fp32" not in name and not report.matrix_name.startswith(device.matrix):
        wrong.append(f"matrix instruction {report.matrix_name or 'none'}, not {' or '.join(device.matrix)}")
    if report.whole.local > MOST_LOCAL * report.whole.instructions:
        wrong.append(f"{report.whole.local} of {report.whole.instructions} instructions access local memory")
    forward = "fwd" in name.split()[0]
    if chip != "sm_90" or not forward or " D64 " not in name or "fp32" in name:
        return wrong
    if report.far is None:
        return [*wrong, "no far loop was found"] if "bias" in name else wrong
    if report.far.local:
        wrong.append(f"{report.far.local} accesses to local memory in the far loop")
    if name.endswith(" bf16 D64 bias"):
        if report.near is None or report.near.instructions > NEAR_INSTRUCTIONS:
            wrong.append(f"near loop over {NEAR_INSTRUCTIONS} instructions")
        if plain is None or report.far.instructions > FAR_OVER_PLAIN * plain:
            wrong.append(f"far loop {report.far.instructions} instructions, plain flash attention has {plain}")
    return wrong


def load(path: Path = BOUNDS) -> dict[str, Any]:
    """Return {triton version: {chip: {kernel and variant: {name: [measured, limit]}}}}."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def store(bounds: dict[str, Any], path: Path = BOUNDS) -> None:
    """Write the bounds, one kernel a line, so that a change reads as one."""
    lines = ["{"]
    for i, (version, chips) in enumerate(sorted(bounds.items())):
        lines.append(f" {json.dumps(version)}: {{")
        for j, (chip, kernels) in enumerate(sorted(chips.items())):
            lines.append(f"  {json.dumps(chip)}: {{")
            rows = [f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(kernels.items())]
            lines += [row + "," for row in rows[:-1]] + rows[-1:]
            lines.append("  }" + ("," if j + 1 < len(chips) else ""))
        lines.append(" }" + ("," if i + 1 < len(bounds) else ""))
    path.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
