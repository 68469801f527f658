"""The counter-based dropout contract shared by every backend.

Whether the probability of query i and key j is kept is a pure function of (seed, batch, head, i, j), so the backward
recomputes the mask of the forward and every tile shape, thread count and backend agrees on it:

* generator: Philox4x32-10 with key (low, high 32 bits of seed) and counter (j >> 3, i, b * H + h, 0);
* its four 32-bit words hold eight 16-bit draws, low half first: key j takes draw j & 7;
* the probability is kept iff draw >= threshold(p), and then multiplied by keep_scale(p).

i and j count inside the sample; with packed sequences b is the index of the sequence and i and j count inside it.
Prefix keys count in j. Elements of hidden states, where they are dropped by this package, are drawn for in the same
way: element n of a contiguous tensor takes draw n & 7 of counter (n >> 3, 0, 0, 1). The keep rate is a multiple of
2**-16, and keep_scale is its exact inverse, so the expected value is exact for every p.

Source:
    J. Salmon, M. Moraes, R. Dror, D. Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (2011), Philox4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "keep_scale", "philox", "threshold"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_DRAWS = 1 << 16
_DRAWS_PER_CALL = 8


def draw_seed(device: torch.device | str) -> Tensor:
    """Draw the key of one call from torch's default generator of the device.

    Returns:
        (1,) int64 on the device; uniform over the non-negative int64 values.
    """
    return torch.randint(0, (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Return the number of 16-bit draws that drop: round(p * 65536), within 0 ... 65535."""
    return min(max(round(p * _DRAWS), 0), _DRAWS - 1)


def keep_scale(p: float) -> float:
    """Return what kept probabilities are multiplied by, the inverse of the true keep rate."""
    return _DRAWS / (_DRAWS - threshold(p))


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run Philox4x32-10 on many counters at once.

    Args:
        seed: (1,) int64; the 64-bit key, low word first.
        counter: four int64 tensors that broadcast, each value in 0 ... 2**32 - 1.

    Returns:
        four int64 tensors, each value in 0 ... 2**32 - 1.
    """
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # int64 products wrap, but all 64 bits are those of the unsigned product: mask after every shift.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor, p: float, batch_heads: Tensor | range, rows: Tensor | range, cols: Tensor | range
) -> Tensor:
    """Say which attention probabilities dropout keeps.

    Args:
        seed: (1,) int64 from `draw_seed`; the result lies on its device.
        p: probability in [0, 1) that one is dropped.
        batch_heads: values of b * H + h, 1-D.
        rows: query indices i, 1-D.
        cols: key indices j, 1-D; a `range` of step 1 costs an eighth of a tensor.

    Returns:
        (len(batch_heads), len(rows), len(cols)) bool; True = kept.
    """
    device = seed.device
    outer = _counters(batch_heads, device)[:, None, None, None]
    row = _counters(rows, device)[None, :, None, None]
    if isinstance(cols, range) and cols.step == 1 and len(cols) > 0:
        first, last = cols.start // _DRAWS_PER_CALL, (cols.stop - 1) // _DRAWS_PER_CALL
        groups = torch.arange(first, last + 1, device=device)[:, None]
        lanes = torch.arange(_DRAWS_PER_CALL, device=device)
        skipped = cols.start - first * _DRAWS_PER_CALL
    else:
        columns = _counters(cols, device)
        groups, lanes, skipped = columns[:, None] >> 3, columns[:, None] & 7, 0
    words = philox(seed, (groups, row, outer, torch.zeros_like(seed)))
    # (..., groups, 4) words of two draws each -> (..., groups, lanes)
    stacked = torch.cat(torch.broadcast_tensors(*words), dim=-1)
    lanes = lanes.expand(*stacked.shape[:-1], lanes.shape[-1])
    draws = (stacked.gather(-1, lanes >> 1) >> ((lanes & 1) << 4)) & (_DRAWS - 1)
    return (draws >= threshold(p)).flatten(2)[:, :, skipped : skipped + len(cols)]


def _counters(values: Tensor | range, device: torch.device) -> Tensor:
    """Return the values as 1-D int64 on the device."""
    if isinstance(values, range):
        return torch.arange(values.start, values.stop, values.step, dtype=torch.int64, device=device)
    return values.to(device=device, dtype=torch.int64)
