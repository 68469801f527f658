"""The structs that cross the C interface. csrc/cpu/params.h says what each field means.

A struct starts as zeros: what a call does not have is left alone.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

__all__ = ["ABI_VERSION", "AttentionParams", "DropoutParams", "LinearParams", "layouts"]

ABI_VERSION = 10


def _fields(text: str) -> list[tuple[str, Any]]:
    """Return the fields named in a text: numbers and addresses, with an apostrophe doubles, with a star token tensors.

    A token tensor is an address and the strides, in elements, of batch, heads and tokens.
    """
    fields: list[tuple[str, Any]] = []
    for name in text.split():
        if name.endswith("*"):
            fields += [(name[:-1] + part, ctypes.c_int64) for part in ("", "_stride_b", "_stride_h", "_stride_n")]
        else:
            fields.append((name.rstrip("'"), ctypes.c_double if name.endswith("'") else ctypes.c_int64))
    return fields


class _Params(ctypes.Structure):
    """A struct with the fields that its text names."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


class AttentionParams(_Params):
    """The arguments of one pass of attention."""

    _fields_ = _fields("""
        abi_version batch heads nq nk head_dim dtype threads
        q* k* v* out* dout* dq* dk* dv* lse dlse lse_stride_b lse_stride_h
        pos_key pos_query pos_key_stride_h pos_key_stride_r pos_query_stride_h pos_query_stride_r
        prepared prepared_bytes dpos_key dpos_query dpos_stride_h
        has_pos_key has_pos_query table_rows first_row prefix_length
        delta reach low_end high_start smooth
        key_mask query_mask pair_mask key_mask_stride_b query_mask_stride_b
        pair_mask_stride_b pair_mask_stride_h pair_mask_stride_q cu_seqlens
        scale' dropout_threshold dropout_scale' seed
    """)


class LinearParams(_Params):
    """The arguments of one linear layer."""

    _fields_ = _fields("""
        abi_version tokens in_features out_features dtype gelu threads x_transposed weight_transposed
        x weight bias out
    """)


class DropoutParams(_Params):
    """The arguments of one dropout of hidden states."""

    _fields_ = _fields("""
        abi_version count threads x_dtype residual_dtype out_dtype x residual out threshold seed scale'
    """)


def layouts() -> str:
    """Describe the structs as csrc/cpu/layout.h does, every field with its offset in bytes."""
    return "".join(f"{struct.__name__} {ctypes.sizeof(struct)}:{_described(struct)}\n" for struct in _STRUCTS)


def _described(struct: type[ctypes.Structure]) -> str:
    marks = {ctypes.c_int64: "", ctypes.c_double: "'"}
    fields: Any = struct._fields_
    return "".join(f" {name}@{getattr(struct, name).offset}{marks[kind]}" for name, kind in fields)


_STRUCTS = (AttentionParams, LinearParams, DropoutParams)
