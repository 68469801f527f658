"""The rows of the position tables that belong to distances between tokens, bit-equal to Hugging Face.

The one place that knows the log bucket. A bucket is float32 arithmetic with a ceiling, so a last-bit difference moves
a distance to the next row: everything here is computed on the CPU, in the order of operations of Hugging Face, and
kernels read the integer table that comes out (`position_index`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from deberta_kernels.types import PositionSpec

__all__ = [
    "PositionIndex",
    "attention_span",
    "call_index",
    "delta",
    "log_bucket",
    "plain_tensors",
    "position_index",
    "reachable_rows",
]

# A table always covers this many distances more than it must, so that a kernel may read a whole tile past the end.
_MARGIN = 64
_MIN_LENGTH = 512  # shorter calls share its table, of 5 KB
# Float32 counts exactly up to here, and every formula has reached its limit long before.
_FAR = 1 << 24


def attention_span(position_buckets: int, max_relative_positions: int) -> int:
    """Return att_span, half the number of rows of a full position table.

    Args:
        position_buckets: > 0: number of log buckets; <= 0: linear positions.
        max_relative_positions: distance in tokens at which linear positions saturate.

    Raises:
        ValueError: if there is exactly one bucket, or neither argument is positive.
    """
    if position_buckets == 1:
        raise ValueError("position_buckets must be at least 2, or <= 0 for linear positions, got 1")
    span = position_buckets if position_buckets > 0 else max_relative_positions
    if span <= 0:
        raise ValueError(
            "max_relative_positions must be positive when position_buckets is not, got "
            f"position_buckets={position_buckets}, max_relative_positions={max_relative_positions}"
        )
    return span


def log_bucket(distance: Tensor, position_buckets: int, max_relative_positions: int) -> Tensor:
    """Map distances to signed log buckets: the identity up to half the buckets, logarithmic beyond.

    Args:
        distance: int64, any shape and device; query position minus key position, in tokens.
        position_buckets: number of buckets; <= 0 returns the distance itself.
        max_relative_positions: distance in tokens of the last bucket; <= 0 returns the distance itself.

    Returns:
        int64, shape and device of distance; not clamped to the table.

    Source:
        `make_log_bucket_position` and `build_relative_position` of transformers v5.23.0,
        models/deberta_v2/modeling_deberta_v2.py. Difference: float32 on the CPU whatever the default dtype is (theirs
        divides in the default dtype, which is wrong in bfloat16).
    """
    if position_buckets <= 0 or max_relative_positions <= 0:
        return distance
    mid = position_buckets // 2
    x = distance.to(device="cpu", dtype=torch.int64)
    magnitude = torch.where((x < mid) & (x > -mid), mid - 1, x.abs())
    ratio = torch.log(magnitude.to(torch.float32) / mid)
    ratio = ratio / torch.log(torch.tensor((max_relative_positions - 1) / mid, dtype=torch.float32, device="cpu"))
    logarithmic = torch.ceil(ratio * (mid - 1)) + mid
    bucket = torch.where(magnitude <= mid, x.to(torch.float32), logarithmic * torch.sign(x))
    return bucket.to(torch.int64).to(distance.device)


def delta(distance: Tensor, spec: PositionSpec) -> Tensor:
    """Return the paper's delta: clamp(log_bucket(distance) + att_span, 0, 2 * att_span - 1).

    Args:
        distance: int64, any shape; query position minus key position, in tokens.
        spec: see `PositionSpec`; first_row is not subtracted.

    Returns:
        int64, shape and device of distance; row of the full table of 2 * att_span rows.
    """
    span = attention_span(spec.position_buckets, spec.max_relative_positions)
    bucket = log_bucket(distance, spec.position_buckets, spec.max_relative_positions)
    return torch.clamp(bucket + span, 0, 2 * span - 1)


@dataclass(frozen=True)
class PositionIndex:
    """The rows delta(x) for every distance a call can meet, and what kernels may assume about it.

    Attributes:
        delta: (2 * reach + 1,) int32, CPU, contiguous; delta[x + reach] is delta(x), a row of the full table. A
            distance outside the table has the value at the nearer end. Shared by all callers: never write to it.
        reach: largest distance in the table, in tokens; a multiple of 64. Either every |x| >= reach - 64 is saturated,
            or reach is at least the length asked for plus 64.
        low_end: every x <= low_end (down to -reach when nothing saturates) has delta(x) == delta(-reach).
        high_start: every x >= high_start (up to reach when nothing saturates) has delta(x) == delta(reach).
        smooth: from one distance to the next delta never falls and never rises by more than 1.
    """

    delta: Tensor
    reach: int
    low_end: int
    high_start: int
    smooth: bool

    def rows(self, distances: Tensor) -> Tensor:
        """Return delta of these distances, int32; of those beyond the table its value at the nearer end."""
        return self.delta[distances.clamp(-self.reach, self.reach) + self.reach]


def position_index(length: int, spec: PositionSpec) -> PositionIndex:
    """Return the cached table of delta for all distances below `length` tokens.

    Args:
        length: more than any distance between a query and a key, in tokens: max(Nq, Nk) will do.
        spec: see `PositionSpec`; only the buckets and the maximum matter.
    """
    covered = max(_MIN_LENGTH, 1 << max(length - 1, 0).bit_length())
    return _cached_index(covered, spec.position_buckets, spec.max_relative_positions)


def reachable_rows(nq: int, nk: int, spec: PositionSpec) -> tuple[int, int]:
    """Return [start, stop): the rows of the full table that lie between the least and the greatest delta in use.

    Args:
        nq: number of queries, at positions 0 ... nq - 1.
        nk: number of keys that have a position, 0 ... nk - 1: leading prefix keys are not counted.
        spec: see `PositionSpec`; only the buckets and the maximum matter.

    Returns:
        the smallest such range; the whole table while torch.compile or torch.export traces with dynamic lengths.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not (has_static_value(nq) and has_static_value(nk)):
            return 0, 2 * attention_span(spec.position_buckets, spec.max_relative_positions)
    return _constant_rows(nq, nk, spec.position_buckets, spec.max_relative_positions)


def call_index(nq: int, nk: int, spec: PositionSpec) -> tuple[PositionIndex, int, int]:
    """Return `position_index` and `reachable_rows` of one call, which a backend would look up at every one.

    Args:
        nq: number of queries.
        nk: number of keys, prefix keys included.
        spec: see `PositionSpec`; first_row does not matter.
    """
    return _cached_call(nq, nk, spec.prefix_length, spec.position_buckets, spec.max_relative_positions)


def _constant_rows(nq: int, nk: int, position_buckets: int, max_relative_positions: int) -> tuple[int, int]:
    """Look the rows up; torch.compile runs this while it traces, and keeps the two integers."""
    return _cached_rows(max(nq, 1), max(nk, 1), position_buckets, max_relative_positions)


# What torch.compiler.assume_constant_result does; calling that would import the whole compiler.
_constant_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Compute real, ordinary tensors whatever is active: a cached fake or inference tensor would poison later calls."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


# One entry for each power of two up to the longest text, and for each setting of the models in the process.
@lru_cache(maxsize=128)
def _cached_index(length: int, position_buckets: int, max_relative_positions: int) -> PositionIndex:
    spec = PositionSpec(position_buckets, max_relative_positions)
    reach = length + _MARGIN
    with plain_tensors():
        table = delta(torch.arange(-reach, reach + 1, device="cpu"), spec)
        far = delta(torch.tensor([-_FAR, _FAR], device="cpu"), spec).tolist()
        low_run = _equal_run(table)
        high_run = _equal_run(table.flip(0))
        low_end, high_start = low_run - 1 - reach, reach + 1 - high_run
        if [int(table[0]), int(table[-1])] == far:
            saturated = max(-low_end, high_start, 0)
            shorter = -(-saturated // _MARGIN) * _MARGIN + _MARGIN
            if shorter < reach:
                table, reach = table[reach - shorter : reach + shorter + 1], shorter
        steps = table.diff()
        smooth = bool(((steps >= 0) & (steps <= 1)).all())
        return PositionIndex(table.to(torch.int32).contiguous(), reach, low_end, high_start, smooth)


@lru_cache(maxsize=4096)  # as _cached_rows
def _cached_call(
    nq: int, nk: int, prefix_length: int, position_buckets: int, max_relative_positions: int
) -> tuple[PositionIndex, int, int]:
    spec = PositionSpec(position_buckets, max_relative_positions)
    return position_index(max(nq, nk), spec), *reachable_rows(nq, nk - prefix_length, spec)


def _equal_run(values: Tensor) -> int:
    """Count the leading values that equal the first one."""
    differs = (values != values[0]).nonzero()
    return int(differs[0]) if differs.numel() else values.numel()


# One for each length or pair of lengths; they take a few hundred bytes.
@lru_cache(maxsize=4096)
def _cached_rows(nq: int, nk: int, position_buckets: int, max_relative_positions: int) -> tuple[int, int]:
    index = position_index(max(nq, nk), PositionSpec(position_buckets, max_relative_positions))
    with plain_tensors():
        first, last = (min(max(x, -index.reach), index.reach) + index.reach for x in (1 - nk, nq - 1))
        low, high = torch.aminmax(index.delta[first : last + 1])
        return int(low), int(high) + 1
