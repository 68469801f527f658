"""What one tile of a zone takes: problems that differ by such tiles alone, executed and subtracted.

Let T(a, b) be what is counted with a steps of queries and b of keys. Of its parts only tiles grow with a times b:
programs grow with a or with b, and the tiles of other zones with a alone. So

    T(a + 1, b + 1) - T(a + 1, b) - T(a, b + 1) + T(a, b)

is exactly the tiles of one step by one step, instruction by instruction, whatever a kernel's programs hold fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem, Masks

__all__ = ["PAIRS", "PROGRAM", "STEP", "ZONES", "Counts", "Zone", "by_zone", "problem", "zones_of"]

# Tokens: the rows of the largest tile, of the CUDA kernels.
STEP = 128
# What is reported is of 64 x 64 pairs.
PAIRS = (STEP // 64) ** 2
# What a program (a thread block) executes outside of its loops over tiles.
PROGRAM = "program"
# By kernel: a row per instruction, as `ptx.machine.Machine.counts` has them.
Counts = Mapping[str, np.ndarray]

# Saturated from distance 64 on.
_SHORT = {"position_buckets": 16, "max_relative_positions": 64}
# Every tile, also of 16 tokens, loses a key to the mask.
_HOLES = 16


@dataclass(frozen=True)
class Zone:
    """One kind of tile, and the smallest problem that is made larger by it.

    Attributes:
        name: what tables call it.
        case: the problem; its lengths are multiples of `STEP`.
        holes: whether a mask takes keys from every tile.
    """

    name: str
    case: Case
    holes: bool = False

    @property
    def steps(self) -> int:
        """Return how many tiles of a step by a step the problem has where all of them are of this zone."""
        return self.case.nq // STEP * (self.case.keys // STEP)


_NEAR = Case(batch=1, heads=1, nq=2 * STEP, nk=2 * STEP)
_FAR = replace(_NEAR, nk=7 * STEP, **_SHORT)
_PREFIX = replace(_NEAR, nk=5 * STEP, prefix_length=3 * STEP)
ZONES = {
    "plain": Zone("plain", replace(_NEAR, terms="none")),
    "near": Zone("near", _NEAR),
    "far": Zone("far", _FAR),
    "prefix": Zone("prefix", _PREFIX),
    "near masked": Zone("near masked", _NEAR, holes=True),
    "far masked": Zone("far masked", _FAR, holes=True),
}


def zones_of(features: str) -> list[Zone]:
    """Return the zones that a set of features has, the one that `PROGRAM` is read from first.

    Args:
        features: as in `offline.variants.Variant`.
    """
    if "bias" not in features:
        names = ["plain"]
    elif "pair" in features:  # which makes every tile a masked one
        names = ["near masked", "far masked"]
    elif "mask" in features:
        names = ["near", "far", "near masked", "far masked"]
    elif "dropout" in features:
        names = ["near", "far"]
    else:
        names = ["near", "far", "prefix"]
    return [ZONES[name] for name in names]


def problem(
    zone: Zone, features: str, dtype: torch.dtype, head_dim: int, steps: tuple[int, int]
) -> AttentionProblem:  # fmt: skip
    """Return the problem of a zone, larger by steps of queries and of keys."""
    case = zone.case
    more_queries, more_keys = (STEP * n for n in steps)
    prefix = case.prefix_length + (more_keys if case.prefix_length else 0)
    dropout_p = 0.1 if "dropout" in features else 0.0
    made = inputs.problem(
        replace(case, nq=case.nq + more_queries, nk=case.keys + more_keys, prefix_length=prefix, dtype=dtype,
                head_dim=head_dim, dropout_p=dropout_p)
    )  # fmt: skip
    nq, nk = made.q.shape[2], made.k.shape[2]
    keys = torch.ones(1, nk, dtype=torch.bool)
    keys[:, ::_HOLES] = not zone.holes
    if "pair" in features:
        return replace(made, masks=Masks(pair=keys.view(1, 1, 1, nk).repeat(1, 1, nq, 1)))
    return replace(made, masks=Masks(key=keys)) if "mask" in features else made


def by_zone(zones: list[Zone], run: Callable[[Zone, tuple[int, int]], Counts]) -> dict[str, dict[str, np.ndarray]]:
    """Return the counts of each kernel for one step by one step of each zone, and for all of its programs.

    Args:
        zones: the first has tiles of one zone alone.
        run: executes the problem of a zone with more steps of queries and of keys.

    Returns:
        by kernel, by zone. What does not grow with queries times keys, such as an expansion of tables, has `PROGRAM`
        alone.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for zone in zones:
        small, wide, high, large = (run(zone, steps) for steps in ((0, 0), (0, 1), (1, 0), (1, 1)))
        for kernel, counts in small.items():
            tile = large[kernel] - high[kernel] - wide[kernel] + counts
            parts = found.setdefault(kernel, {})
            if tile.any():
                parts[zone.name] = tile
            if zone is zones[0]:
                parts[PROGRAM] = counts - zone.steps * tile
    return found
