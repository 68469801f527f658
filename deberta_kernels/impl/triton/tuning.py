"""Tile sizes: from the committed table of the device, else its nearest entry, else a pinned default.

Nothing is timed in a user's step. `make tune` measures `candidates` on a device and writes `configs/<device>.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from deberta_kernels import dtypes

__all__ = ["DIRECTIONS", "LARGEST_TILE", "MOST_GROUPS", "TileConfig", "candidates", "config", "device_key", "shrunk"]

DIRECTIONS = ("forward", "backward")
CONFIGS = Path(__file__).resolve().parent / "configs"
LARGEST_TILE = 64
# Tiles of queries in a program of the forward.
MOST_GROUPS = 2
# Where a backward tile of 64 has room: matrix units that read operands from shared memory, which leaves the registers
# to the accumulators, or 512 registers a lane; and the interpreter, which pays by the operation.
_ROOMY = ("sm_90", "sm_100", "sm_103", "gfx942", "cpu")


@dataclass(frozen=True)
class TileConfig:
    """How one direction of one head size is compiled.

    Attributes:
        tile: queries and keys per tile; 16, 32 or 64.
        num_warps: warps per program.
        num_stages: tiles in flight in the loops that only load keys and values.
        groups: tiles of queries per program of a forward, 1 or 2.
    """

    tile: int
    num_warps: int
    num_stages: int
    groups: int = 1

    @property
    def queries(self) -> int:
        """Return how many queries a program of a forward has."""
        return self.tile * self.groups


@lru_cache(maxsize=32)
def device_key(device: torch.device) -> str:
    """Return the name of a device in `configs/`: sm_90 for an NVIDIA GPU, gfx942 for an AMD one, else its type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config(key: str, dtype: torch.dtype, head_dim: int, direction: str) -> TileConfig:
    """Return the tiles to use: measured on this device, or on it for the nearest head size, or the default.

    Args:
        key: what `device_key` returned.
        dtype: of q.
        head_dim: D.
        direction: one of `DIRECTIONS`.
    """
    known = _shrunk.get((key, dtype, head_dim, direction))
    if known is not None:
        return known
    table = _table(key)
    entries = [e for e in table if e["direction"] == direction and e["dtype"] == dtypes.name(dtype)] if table else None
    if entries:
        best = min(entries, key=lambda e: (abs(e["head_dim"] - head_dim), e["head_dim"]))
        if best["head_dim"] >= head_dim:  # a tile measured for smaller heads may not fit
            return TileConfig(best["tile"], best["num_warps"], best["num_stages"], best.get("groups", 1))
    return _default(key, dtype, head_dim, direction)


def candidates(key: str, dtype: torch.dtype, head_dim: int, direction: str) -> list[TileConfig]:
    """Return the configurations worth timing on a device, the pinned default first."""
    first = _default(key, dtype, head_dim, direction)
    others = [
        TileConfig(tile, warps, stages, groups)
        for tile in (32, 64)
        for warps in (4, 8)
        for stages in (1, 2, 3)
        for groups in ((1, 2) if direction == "forward" and dtype == torch.bfloat16 else (1,))
        if tile >= first.tile // 2 and tile * warps <= 1024
    ]
    return [first, *(c for c in others if c != first)]


def shrunk(key: str, dtype: torch.dtype, head_dim: int, direction: str, after: TileConfig) -> TileConfig | None:
    """Remember and return what to try when `after` needs more than the device has; None when nothing is left."""
    if after.num_stages > 1:
        smaller = TileConfig(after.tile, after.num_warps, 1, after.groups)
    elif after.groups > 1:
        smaller = TileConfig(after.tile, after.num_warps // 2, 1)
    elif after.tile > 16:
        smaller = TileConfig(after.tile // 2, min(after.num_warps, 4), 1)
    else:
        return None
    _shrunk[key, dtype, head_dim, direction] = smaller
    return smaller


_shrunk: dict[tuple[str, torch.dtype, int, str], TileConfig] = {}


def _default(key: str, dtype: torch.dtype, head_dim: int, direction: str) -> TileConfig:
    """Return the pinned default; the reasons are counts of compiled instructions and bytes, no device was at hand."""
    if dtype == torch.float32 and key != "cpu":
        # Exact products run on the ordinary units, with operands in registers: 64 x 64 by 8 warps has 1,626 accesses to
        # local memory among 15,632 instructions of a forward, 32 x 32 has 157 among 4,528; sm_90, heads of 64.
        return TileConfig(32 if head_dim <= 64 else 16, 8, 1)
    if head_dim > 128:
        # Six tiles of tokens and tables, 64 numbers wide or more, would not fit the 99 KiB of sm_86 and sm_120.
        return TileConfig(32, 4, 1)
    if direction == "backward" and key not in _ROOMY:
        # With operands in registers a backward tile of 64 spills: 13,808 instructions and 5 KiB of stack on sm_80,
        # against 1,864 and none with 32.
        return TileConfig(32, 4, 2 if head_dim <= 64 else 1)
    if direction == "forward" and key == "sm_90" and dtype == torch.bfloat16 and head_dim <= 64:
        # Two tiles of queries share what comes from L2: 20 KiB instead of 32 for a near tile of 64 x 64, 8 instead of
        # 16 for a far one. By the model of tools/counted 1,778 cycles instead of 2,219, and 554 instead of 918; up to
        # 64 queries one tile would be faster, but lengths are no part of a variant. Where terms are carried in 32 bits,
        # and for larger heads, there are no registers for a second tile.
        return TileConfig(64, 8, 2, 2)
    # 64 x 64 by 4 warps: the largest tile whose far loop has no access to local memory on sm_90. Two stages of larger
    # rows would not fit the 99 KiB.
    return TileConfig(64, 4, 2 if head_dim <= 64 else 1)


@lru_cache(maxsize=16)
def _table(key: str) -> list[dict[str, Any]]:
    path = CONFIGS / f"{key}.json"
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"]
    return entries
