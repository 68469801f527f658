"""The short cut for the calls that nearly all are: `arguments` looks at the others, and names what is wrong.

Everything that `arguments.check_call` asks holds for them. The attributes of each tensor are read once: that is most of
what a check costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deberta_kernels.dtypes import FLOATS
from deberta_kernels.types import Masks, PositionSpec

__all__ = ["MOST_SPAN", "is_ordinary"]

MOST_SPAN = 1 << 30  # of att_span: twice as many rows are counted in 32 bits
_STRIDED = torch.strided


def is_ordinary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    masks: Masks,
    position: PositionSpec,
    packed: bool,
) -> bool:
    """Tell whether `check_call` would find nothing wrong; False may also mean that a tensor is of another class.

    Args:
        q: as in `check_call`, like every argument here.
        k: as there.
        v: as there.
        pos_key: as there.
        pos_query: as there.
        masks: as there.
        position: as there.
        packed: as there.
    """
    if type(q) is not Tensor or k is None or v is None or q.layout is not _STRIDED:
        return False
    dtype, device = q.dtype, None if q.is_cpu else q.device  # comparing devices takes longer
    if dtype not in FLOATS:
        return False
    for x in (k, v, pos_key, pos_query):
        if x is not None and (
            type(x) is not Tensor
            or x.dtype is not dtype
            or x.layout is not _STRIDED
            or not (x.is_cpu if device is None else x.device == device)
        ):
            return False
    try:
        return _fits(q.shape, k.shape, v.shape, pos_key, pos_query, masks, position, packed, device)
    except RuntimeError:  # a nested tensor has no shape
        return False


def _fits(
    shape: torch.Size,
    keys: torch.Size,
    values: torch.Size,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    masks: Masks,
    position: PositionSpec,
    packed: bool,
    device: torch.device | None,
) -> bool:
    if len(shape) != 4 or len(keys) != 4 or values != keys:
        return False
    batch, heads, queries, head_dim = shape
    length = keys[2]
    if keys != (batch, heads, length, head_dim) or head_dim < 1 or length < 1:
        return False
    rows = None
    for table in (pos_key, pos_query):
        if table is not None:
            height = table.shape
            if len(height) != 3 or height != (heads, height[1], head_dim) or (rows is not None and height[1] != rows):
                return False
            rows = height[1]
    return _fits_position(position, length, rows) and (
        masks.key is masks.query is masks.pair is None
        or (not packed and _fit_masks(masks, device, (batch, heads, queries, length)))
    )


def _fits_position(position: PositionSpec, keys: int, rows: int | None) -> bool:
    buckets, most, prefix = position.position_buckets, position.max_relative_positions, position.prefix_length
    first = position.first_row
    if not type(buckets) is type(most) is type(prefix) is type(first) is int:
        return False
    span = buckets if buckets > 0 else most
    return (
        buckets != 1
        and 0 < span <= MOST_SPAN
        and 0 <= prefix <= keys
        and (rows is None or (first >= 0 and first + rows <= 2 * span))
    )


def _fit_masks(masks: Masks, device: torch.device | None, shape: tuple[int, int, int, int]) -> bool:
    batch, heads, queries, keys = shape
    for x in (masks.key, None if masks.query is masks.key else masks.query, masks.pair):
        if x is not None and (
            type(x) is not Tensor
            or x.dtype is not torch.bool
            or x.layout is not _STRIDED
            or not (x.is_cpu if device is None else x.device == device)
        ):
            return False
    return (
        (masks.key is None or masks.key.shape == (batch, keys))
        and (masks.query is None or masks.query.shape == (batch, queries))
        and (masks.pair is None or masks.pair.shape in ((batch, 1, queries, keys), (batch, heads, queries, keys)))
    )
