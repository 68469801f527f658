"""Checks of the arguments of one attention call: an error names the argument, what it must be, what came, what next."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.checks.ordinary import MOST_SPAN, is_ordinary
from deberta_kernels.position import attention_span
from deberta_kernels.types import Masks, PositionSpec

__all__ = [
    "check_call",
    "check_device",
    "check_dropout",
    "check_int",
    "check_masks",
    "check_position",
    "check_qkv",
    "check_scale",
    "check_storage",
    "check_table_rows",
    "check_tables",
    "check_tensor",
    "storage_fits",
]

_DTYPE_NAMES = "float32, float16, bfloat16 or float64"
_STRIDED = torch.strided
_LEAST_SCALE, _MOST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    masks: Masks,
    position: PositionSpec,
    packed: bool,
    full: bool = False,
) -> None:
    """Check what every call has, for the functional interface and for the operators.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, Nk, D).
        v: shape of k.
        pos_key: (H, rows, D) or None.
        pos_query: (H, rows, D) or None.
        masks: the parsed masks.
        position: how distances become rows.
        packed: sequences are packed; there can be no mask then.
        full: tables must have all rows.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
    """
    table = pos_key if pos_key is not None else pos_query
    buckets, most = position.position_buckets, position.max_relative_positions
    if is_ordinary(q, k, v, pos_key, pos_query, masks, position, packed) and (
        not full or table is None or table.shape[1] == 2 * attention_span(buckets, most)
    ):
        return
    check_qkv(q, k, v)
    keys = k.shape[2]
    check_position(position, keys)
    check_tables(pos_key, pos_query, q, q.shape[1], 2 * attention_span(buckets, most) if full else None)
    check_masks(masks, q, keys, packed)
    check_table_rows(table, position)


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
        check_tensor(name, x)
    layout, dims = ("(T, H, D)", 3) if packed else ("(B, H, N, D)", 4)
    if q.dtype not in dtypes.FLOATS:
        raise TypeError(
            f"q must have dtype {_DTYPE_NAMES}, got {dtypes.name(q.dtype)}; cast it, for example with q.float()."
        )
    if q.dim() != dims:
        raise ValueError(f"q must have shape {layout}, got {_shape(q)}; add or remove dimensions.")
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a head_dim D of at least 1, got shape {_shape(q)}; check how q was split.")
    for name, x in (("k", k), ("v", v)):
        _check_dtype(name, x, q)
        check_device(name, x, q)
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
    check_int("position_buckets", buckets)
    check_int("max_relative_positions", max_relative)
    check_int("prefix_length", prefix)
    check_int("first_row", position.first_row)
    if buckets <= 0 and max_relative <= 0:
        raise ValueError(
            "position_buckets or max_relative_positions must be positive, "
            f"got position_buckets={buckets} and max_relative_positions={max_relative}; "
            "where the model's config has -1 for both, pass its max_position_embeddings as max_relative_positions."
        )
    if buckets == 1:
        raise ValueError("position_buckets must be at least 2, or <= 0 for linear positions, got 1; check the config.")
    if buckets > MOST_SPAN or (buckets <= 0 and max_relative > MOST_SPAN):
        name, value = ("position_buckets", buckets) if buckets > 0 else ("max_relative_positions", max_relative)
        raise ValueError(f"{name} must be at most 2**30, got {value}; kernels count rows in 32 bits: check the config.")
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
    if pos_key is not None:
        _check_table("pos_key", pos_key, q, heads, rows)
    if pos_query is not None:
        _check_table("pos_query", pos_query, q, heads, rows)
    if pos_key is not None and pos_query is not None and pos_key.shape[1] != pos_query.shape[1]:
        raise ValueError(
            f"pos_query must have as many rows as pos_key, {pos_key.shape[1]}, got {pos_query.shape[1]}; "
            "slice both tables alike."
        )


def _check_table(name: str, x: Tensor, q: Tensor, heads: int, rows: int | None) -> None:
    check_tensor(name, x)
    _check_dtype(name, x, q)
    check_device(name, x, q)
    shape = x.shape
    height = shape[1] if rows is None and len(shape) == 3 else rows
    if shape != (heads, height, q.shape[-1]):
        raise ValueError(
            f"{name} must have shape (H, 2*att_span, D) = {(heads, height, q.shape[-1])}, got {_shape(x)}; "
            + ("check position_buckets." if rows is not None else "check how the table was split into heads.")
        )


def check_table_rows(table: Tensor | None, position: PositionSpec) -> None:
    """Check that the rows of sliced tables lie inside the full table of 2 * att_span rows.

    Raises:
        ValueError: they do not.
    """
    if table is None:
        return
    span = attention_span(position.position_buckets, position.max_relative_positions)
    if position.first_row < 0 or position.first_row + table.shape[1] > 2 * span:
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
    if masks.key is not None:
        _check_mask("masks.key", masks.key, q, packed, (batch, keys))
    if masks.query is not None and (masks.query is not masks.key or queries != keys):
        _check_mask("masks.query", masks.query, q, packed, (batch, queries))
    if masks.pair is not None:
        _check_mask("masks.pair", masks.pair, q, packed, (batch, 1, queries, keys), (batch, heads, queries, keys))


def _check_mask(name: str, x: Tensor, q: Tensor, packed: bool, *shapes: tuple[int, ...]) -> None:
    check_tensor(name, x)
    if packed:
        raise ValueError(f"{name} must be None with cu_seqlens, got shape {_shape(x)}; pack only real tokens.")
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype bool, got {dtypes.name(x.dtype)}; parse masks with masks.py.")
    if x.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {expected}, got {_shape(x)}; check that it belongs to this batch.")
    check_device(name, x, q)


def check_scale(scale: Any) -> float:
    """Return `scale` as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not positive, or not a normal number in float32, in which scores are multiplied.
    """
    if type(scale) is float and _LEAST_SCALE <= scale <= _MOST_SCALE:
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (float, int, numbers.Real)):
        raise TypeError(f"scale must be a number or None, got {_kind(scale)}; pass a Python float.")
    try:
        value = float(scale)  # before it is compared: a fraction may be rounded across a bound
    except OverflowError:
        value = math.inf
    if not _LEAST_SCALE <= value <= _MOST_SCALE:
        raise ValueError(
            f"scale must be a positive number, normal in float32 ({_LEAST_SCALE:.1e} to {_MOST_SCALE:.1e}), got "
            f"{scale}; pass None for 1 / sqrt(D * number of score terms)."
        )
    return value


def check_dropout(dropout_p: Any) -> float:
    """Return `dropout_p` as a float.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is outside [0, 1).
    """
    if type(dropout_p) is float and 0.0 <= dropout_p < 1.0:
        return dropout_p
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (float, int, numbers.Real)):
        raise TypeError(f"dropout_p must be a number, got {_kind(dropout_p)}; pass a Python float.")
    value: Any = dropout_p
    if not 0.0 <= value < 1.0 or float(value) == 1.0:  # a fraction below 1 may be rounded to it
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}; it is a probability of dropping.")
    return float(value)


def check_storage(name: str, x: Tensor) -> None:
    """Check that the memory of `x` is still there.

    Raises:
        ValueError: it was freed or cut, or never was.
    """
    if not torch.compiler.is_compiling() and not storage_fits(x):
        if x._is_zerotensor():
            raise ValueError(f"{name} must have memory, got a ZeroTensor, which has none; pass {name}.clone().")
        last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        raise ValueError(
            f"{name} must have a storage of at least {(last + 1) * x.itemsize} bytes for shape {_shape(x)}, got "
            f"{x.untyped_storage().nbytes()}; it was freed or cut (sharding does it): gather it before the call."
        )


def storage_fits(x: Tensor) -> bool:
    """Tell whether the storage of `x` holds all that its sizes, strides and offset reach.

    A storage can be freed or cut under a tensor (`untyped_storage().resize_`, as sharded training does); native code
    and kernels would read whatever lies behind it. Tensors without a storage of their own, such as wrappers, fit; those
    whose storage says that it holds zeros it does not have (autograd's ZeroTensors) do not.
    """
    try:
        held = x.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return True
    size, last = x.nbytes, x.storage_offset()
    if x._is_zerotensor():
        return size == 0
    if not last and size <= held and x.is_contiguous():
        return True  # as nearly all are
    if size == 0:
        return True
    for count, stride in zip(x.shape, x.stride()):
        last += (count - 1) * stride
    return (last + 1) * x.itemsize <= held


def check_tensor(name: str, x: Any) -> None:
    """Check that `x` is a tensor with strides.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_kind(x)}; convert it with torch.as_tensor.")
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; pad it with to_padded_tensor and pass a mask, or pack "
            "its sequences for disentangled_attention_varlen."
        )
    if x.layout is not _STRIDED:
        raise TypeError(f"{name} must be a dense tensor, got layout {dtypes.name(x.layout)}; pass {name}.to_dense().")


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """Check that `x` is where q is.

    Raises:
        ValueError: it is elsewhere.
    """
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}; move it there.")


def _check_dtype(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(
            f"{name} must have the dtype of q, {dtypes.name(q.dtype)}, got {dtypes.name(x.dtype)}; cast it with "
            f"{name}.to(q.dtype)."
        )


def check_int(name: str, value: Any) -> None:
    """Check that `value` is an int, or one that stands for it while a call is traced.

    Raises:
        TypeError: it is something else.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
        raise TypeError(f"{name} must be an int, got {_kind(value)}; pass a Python int.")


def _shape(x: Tensor) -> str:
    return _show(tuple(x.shape))


def _show(shape: tuple[Any, ...]) -> str:
    return str(shape)


def _kind(x: Any) -> str:
    return f"{x!r} ({type(x).__name__})" if isinstance(x, (int, float, str, type(None))) else type(x).__name__
