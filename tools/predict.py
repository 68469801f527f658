"""Estimate times from compiled instructions alone, before a GPU has been at hand.

    python tools/kernels_offline.py --only "sm_90,bf16 D64" --json build/counts.json
    python tools/predict.py build/counts.json

For one pass over a 64 x 64 tile, each unit of a multiprocessor has its own number of cycles: issue slots, matrix units,
exponentials, shared memory, and bytes from L2. Units overlap, but not fully: the estimate is the longest, half the
second and a quarter of the third, a rule under which plain flash attention comes out at 455 TFLOP/s. Expect it to be
off by 30 %. It says nothing about launches, about waves that do not fill the device, or about latency; short shapes are
slower than it says. What it is for: to be compared with what a GPU then measures, in docs/notes/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from deberta_kernels.demo.tables import aligned

TILE, HEAD_DIM, HEADS, TOKENS = 64, 64, 12, 16384
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SATURATED = 512  # distance from which on tiles are far
WARPS = 4  # of a program that computes a tile


@dataclass(frozen=True)
class Device:
    """What the time model knows of a device.

    Attributes:
        multiprocessors: of the device.
        clock: cycles per second, chosen so that `flops` of dense bfloat16 products a cycle give its data sheet's rate.
        flops: operations of dense bfloat16 products, per cycle and multiprocessor.
        exponentials: per cycle and multiprocessor.
        shared_bytes: of shared memory, per cycle and multiprocessor.
        l2_bytes: from L2, per cycle and multiprocessor, sustained.
    """

    multiprocessors: int = 132
    clock: float = 1.755e9
    flops: int = 4096
    exponentials: int = 16
    shared_bytes: int = 128
    l2_bytes: float = 24.0


DEVICE = Device()
# Matrix instructions are 64 x 64 x 16 here.
MATRIX_FLOPS = 2 * 64 * 64 * 16
# Bytes of one operand tile, 64 rows of 64 bfloat16.
OPERAND = TILE * HEAD_DIM * 2
# Operand tiles that one pass loads from L2: keys and values, and near the diagonal a block of each table. The backward
# by keys loads q, dout and per near tile two blocks; that by diagonals loads q, k, v and dout.
LOADED = {"fwd": (4, 2), "bwd_dq": (4, 2), "bwd_dkv": (4, 2), "bwd_position": (4, 4)}


def cycles(counts: dict[str, int], loaded: int, exponentials: bool = True) -> float:
    """Return the estimated cycles of one pass over a tile on one multiprocessor."""
    products = counts["matrix"] * MATRIX_FLOPS
    accesses = counts["shared_loads"] + counts["shared_stores"] + counts["local_loads"] + counts["local_stores"]
    # Both operands of a product are read from shared memory, 16 columns of each per instruction.
    operands = counts["matrix"] * 2 * 64 * 16 * 2
    units = {
        "issue": counts["instructions"],
        "matrix": products / DEVICE.flops,
        "exponentials": TILE * TILE / DEVICE.exponentials if exponentials else 0.0,
        "shared": 1.5 * WARPS * accesses + operands / DEVICE.shared_bytes,
        "l2": loaded * OPERAND / DEVICE.l2_bytes,
    }
    return overlapped(units)


def overlapped(units: dict[str, float]) -> float:
    """Return the estimated cycles of one pass from those of each unit, by the rule above."""
    longest = sorted(units.values(), reverse=True)
    return longest[0] + 0.5 * longest[1] + 0.25 * longest[2]


def tiles(length: int) -> tuple[int, int]:
    """Return how many tiles of one head are near the diagonal, and how many are far."""
    count = -(-length // TILE)
    reach = SATURATED // TILE
    near = sum(min(i + reach, count - 1) - max(i - reach, 0) + 1 for i in range(count))
    return near, count * count - near


def seconds(near: float, far: float, length: int) -> float:
    """Return the estimated seconds of one kernel over a batch of `TOKENS` tokens, given the cycles of its two loops."""
    near_tiles, far_tiles = tiles(length)
    heads = HEADS * max(1, TOKENS // length)
    return heads * (near_tiles * near + far_tiles * far) / (DEVICE.multiprocessors * DEVICE.clock)


def counted(records: list[dict[str, Any]], kernel: str, variant: str) -> dict[str, Any]:
    """Return the report of a kernel in one variant on sm_90, bfloat16, head size 64.

    Raises:
        SystemExit: the counts lack it.
    """
    for record in records:
        names = record["name"].split()
        asked_for = record["chip"] == "sm_90" and kernel in names[0] and names[1:] == ["bf16", "D64", variant]
        if asked_for and "report" in record:
            return dict(record["report"])
    raise SystemExit(f"no counts of {kernel} bf16 D64 {variant} for sm_90; run kernels_offline.py first")


def loops(records: list[dict[str, Any]], kernel: str) -> tuple[float, float]:
    """Return the cycles of the near and of the far loop of one kernel, without masks and dropout."""
    # The pass by diagonals exists with tables only, and meets no far tiles.
    report = counted(records, kernel, "none" if kernel == "bwd_position" else "bias")
    near, far = LOADED[kernel]
    return cycles(report["near"], near), cycles(report["far"], far) if report["far"] else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Print the estimates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path, help="what kernels_offline.py --json wrote")
    records = json.loads(parser.parse_args(arguments).counts.read_text(encoding="utf-8"))["records"]
    forward = loops(records, "fwd")
    backward = {name: loops(records, name) for name in ("bwd_dq", "bwd_dkv", "bwd_position")}
    flash = cycles(counted(records, "fwd", "none")["near"], 2)
    rows = [["cycles of one 64 x 64 tile", "near", "far"], ["plain flash attention", "", f"{flash:.0f}"]]
    rows += [[name, f"{near:.0f}", f"{far:.0f}"] for name, (near, far) in {"forward": forward, **backward}.items()]
    print(aligned(rows) + "\n")
    rows = [["length", "plain ms", "forward ms", "of plain's speed", "backward ms", "dq", "dkv", "position"]]
    for length in LENGTHS:
        base, ours = seconds(flash, flash, length), seconds(*forward, length)
        parts = [seconds(*backward[name], length) for name in ("bwd_dq", "bwd_dkv", "bwd_position")]
        times = [f"{1e3 * part:.3f}" for part in (sum(parts), *parts)]
        rows.append([str(length), f"{1e3 * base:.3f}", f"{1e3 * ours:.3f}", f"{base / ours:.2f}", *times])
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
