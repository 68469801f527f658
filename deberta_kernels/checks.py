"""Check the arguments of one attention call; an error names the argument, what was expected, what came, what next."""

from __future__ import annotations

import math
import numbers
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deberta_kernels.types import Masks, PositionSpec

__all__ = [
    "check_cu_seqlens",
    "check_dropout",
    "check_masks",
    "check_max_seqlen",
    "check_position",
    "check_qkv",
    "check_scale",
    "check_table_rows",
    "check_tables",
    "storage_fits",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPE_NAMES = "float32, float16, bfloat16 or float64"


def check_qkv(q: Tensor, k: Tensor, v: Tensor, packed: bool = False) -> None:
    """Check that q, k and v fit together.

    Args:
        q: (B, H, Nq, D), or (T, H, D) when packed.
        k: (B, H, Nk, D), or (T, H, D) when packed.
        v: shape of k.
        packed: sequences are packed one after the other; q and k then have the same length.

    Raises:
        TypeError: one is not a tensor, has an unsupported dtype, or not the dtype of q.
        ValueError: the shapes or devices do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
    layout, dims = ("(T, H, D)", 3) if packed else ("(B, H, N, D)", 4)
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must have dtype {_DTYPE_NAMES}, got {_name(q.dtype)}; cast it, for example with q.float().")
    if q.dim() != dims:
        raise ValueError(f"q must have shape {layout}, got {_shape(q)}; add or remove dimensions.")
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a head_dim D of at least 1, got shape {_shape(q)}; check how q was split.")
    for name, x in (("k", k), ("v", v)):
        _check_like_q(name, x, q)
        if x.dim() != dims:
            raise ValueError(f"{name} must have shape {layout}, got {_shape(x)}; add or remove dimensions.")
    if packed:
        if k.shape != q.shape:
            raise ValueError(f"k must have the shape of q, {_shape(q)}, got {_shape(k)}; they are one packed text.")
    elif k.shape[0] != q.shape[0] or k.shape[1] != q.shape[1] or k.shape[3] != q.shape[3]:
        batch, heads, _, head_dim = q.shape
        raise ValueError(
            f"k must have shape (B, H, Nk, D) = ({batch}, {heads}, Nk, {head_dim}), got {_shape(k)}; "
            "check the batch, the heads and the head_dim of k."
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {_shape(k)}, got {_shape(v)}; keys and values come in pairs.")
    if not packed and k.shape[2] == 0 and q.numel() > 0:
        raise ValueError(f"k must hold at least one key for {q.shape[2]} queries, got shape {_shape(k)}; pass keys.")


def check_position(position: PositionSpec, keys: int) -> None:
    """Check the numbers of a `PositionSpec` for a call with `keys` keys.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of its range.
    """
    buckets, max_relative, prefix = position.position_buckets, position.max_relative_positions, position.prefix_length
    for name, value in (
        ("position_buckets", buckets),
        ("max_relative_positions", max_relative),
        ("prefix_length", prefix),
        ("first_row", position.first_row),
    ):
        _check_int(name, value)
    if buckets <= 0 and max_relative <= 0:
        raise ValueError(
            "position_buckets or max_relative_positions must be positive, "
            f"got position_buckets={buckets} and max_relative_positions={max_relative}; "
            "where the model's config has -1 for both, pass its max_position_embeddings as max_relative_positions."
        )
    if buckets == 1:
        raise ValueError("position_buckets must be at least 2, or <= 0 for linear positions, got 1; check the config.")
    if prefix < 0 or prefix > keys:
        raise ValueError(
            f"prefix_length must be between 0 and the number of keys, {keys}, got {prefix}; "
            "it counts the leading keys that have no position."
        )


def check_tables(pos_key: Tensor | None, pos_query: Tensor | None, q: Tensor, heads: int, rows: int | None) -> None:
    """Check the position tables against q.

    Args:
        pos_key: (H, rows, D) or None.
        pos_query: (H, rows, D) or None.
        q: the queries, whose dtype, device and head_dim the tables share.
        heads: H.
        rows: height the tables must have, 2 * att_span; None leaves it to `check_table_rows`.

    Raises:
        TypeError: a table is not a tensor or has not the dtype of q.
        ValueError: a shape or device does not fit.
    """
    for name, x in (("pos_key", pos_key), ("pos_query", pos_query)):
        if x is None:
            continue
        _check_tensor(name, x)
        _check_like_q(name, x, q)
        expected = (heads, x.shape[1] if rows is None and x.dim() == 3 else rows, q.shape[-1])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name} must have shape (H, 2*att_span, D) = {_show(expected)}, got {_shape(x)}; "
                + ("check position_buckets." if rows is not None else "check how the table was split into heads.")
            )
    if pos_key is not None and pos_query is not None and pos_key.shape[1] != pos_query.shape[1]:
        raise ValueError(
            f"pos_query must have as many rows as pos_key, {pos_key.shape[1]}, got {pos_query.shape[1]}; "
            "slice both tables alike."
        )


def check_table_rows(table: Tensor | None, position: PositionSpec, span: int) -> None:
    """Check that the rows of sliced tables lie inside the full table of 2 * span rows.

    Raises:
        ValueError: they do not.
    """
    if table is not None and (position.first_row < 0 or position.first_row + table.shape[1] > 2 * span):
        raise ValueError(
            f"first_row and the height of the tables must stay inside the full table of 2*att_span = {2 * span} rows, "
            f"got first_row={position.first_row} and {table.shape[1]} rows; check position_buckets."
        )


def check_masks(masks: Masks, q: Tensor, keys: int, packed: bool) -> None:
    """Check the shapes of parsed masks: a kernel would read past the end of a smaller one.

    Args:
        masks: the parsed masks.
        q: (B, H, Nq, D), whose device the masks share.
        keys: Nk.
        packed: sequences are packed; there can be no mask then.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a shape or device does not fit.
    """
    batch, heads, queries, _ = q.shape
    for name, x, shapes in (
        ("masks.key", masks.key, ((batch, keys),)),
        ("masks.query", masks.query, ((batch, queries),)),
        ("masks.pair", masks.pair, ((batch, 1, queries, keys), (batch, heads, queries, keys))),
    ):
        if x is None:
            continue
        _check_tensor(name, x)
        if packed:
            raise ValueError(f"{name} must be None with cu_seqlens, got shape {_shape(x)}; pack only real tokens.")
        if x.dtype != torch.bool:
            raise TypeError(f"{name} must have dtype bool, got {_name(x.dtype)}; parse masks with masks.py.")
        if tuple(x.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} must have shape {expected}, got {_shape(x)}; check that it belongs to this batch."
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}; move it there.")


def check_scale(scale: Any) -> float:
    """Return `scale` as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not finite.
    """
    if isinstance(scale, bool) or not isinstance(scale, (float, int, numbers.Real)):
        raise TypeError(f"scale must be a number or None, got {_kind(scale)}; pass a Python float.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; pass None for 1 / sqrt(D * number of score terms).")
    return float(scale)


def check_dropout(dropout_p: Any) -> float:
    """Return `dropout_p` as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is outside [0, 1).
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (float, int, numbers.Real)):
        raise TypeError(f"dropout_p must be a number, got {_kind(dropout_p)}; pass a Python float.")
    p = float(dropout_p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}; it is a probability of dropping.")
    return p


def check_max_seqlen(max_seqlen: Any) -> None:
    """Check that `max_seqlen` can be a number of tokens.

    Raises:
        TypeError: it is not an int.
        ValueError: it is negative.
    """
    _check_int("max_seqlen", max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}; pass the length of the longest sequence.")


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, tokens: int, max_seqlen: int) -> None:
    """Check the bounds of packed sequences.

    Args:
        cu_seqlens: (S + 1,) int32: sequence s holds the tokens [cu_seqlens[s], cu_seqlens[s + 1]).
        q: the queries, whose device it shares.
        tokens: T, tokens of all sequences.
        max_seqlen: upper bound of the lengths, in tokens.

    Raises:
        TypeError: cu_seqlens is not an int32 tensor.
        ValueError: its shape or device does not fit, or its values where they can be read without waiting for a device.
    """
    _check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must have dtype int32, got {_name(cu_seqlens.dtype)}; cast it with .int().")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must have shape (S + 1,) for S sequences, got {_shape(cu_seqlens)}; "
            "it holds 0 followed by the running sum of the lengths."
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on the device of q, {q.device}, got {cu_seqlens.device}; move it there.")
    if not _host_readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}; put 0 before the running sum of lengths.")
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if lengths and min(lengths) < 0:
        at = lengths.index(min(lengths))
        raise ValueError(
            f"cu_seqlens must not fall, got {bounds[at]} followed by {bounds[at + 1]} at index {at}; "
            "it holds 0 followed by the running sum of the lengths."
        )
    if bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must end at T = {tokens}, the number of tokens of q, got {bounds[-1]}; "
            "check that the lengths add up."
        )
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least {max(lengths)}, the longest sequence of cu_seqlens, got {max_seqlen}; "
            "pass the length of the longest sequence."
        )


def storage_fits(x: Tensor) -> bool:
    """Tell whether the storage of `x` holds all that its sizes, strides and offset reach.

    A storage can be freed or cut under a tensor (`untyped_storage().resize_`, as sharded training does); native code
    and kernels would read whatever lies behind it. Tensors without a storage of their own, such as wrappers, fit.
    """
    try:
        held = x.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return True
    if x.is_contiguous():
        return x.nbytes == 0 or x.nbytes + x.storage_offset() * x.itemsize <= held
    last = x.storage_offset()
    for size, stride in zip(x.shape, x.stride()):
        if size == 0:
            return True
        last += (size - 1) * stride
    return (last + 1) * x.itemsize <= held


def _host_readable(x: Tensor) -> bool:
    """Whether the values of `x` can be read now, at no cost: a real CPU tensor outside any tracing."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_kind(x)}; convert it with torch.as_tensor.")


def _check_like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(
            f"{name} must have the dtype of q, {_name(q.dtype)}, got {_name(x.dtype)}; cast it with {name}.to(q.dtype)."
        )
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}; move it there.")


def _check_int(name: str, value: Any) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
        raise TypeError(f"{name} must be an int, got {_kind(value)}; pass a Python int.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return _show(tuple(x.shape))


def _show(shape: tuple[Any, ...]) -> str:
    return str(shape)


def _kind(x: Any) -> str:
    return f"{x!r} ({type(x).__name__})" if isinstance(x, (int, float, str, type(None))) else type(x).__name__
