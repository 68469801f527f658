"""One launch of the CUDA forward: what csrc/cuda/README.md says under "What the host prepares".

`Call` is what a launch of the backward needs as well, see backward_arguments.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from deberta_kernels import dropout
from deberta_kernels.impl.common import LOG2E, extent, has_positions, padded_row_value, steps
from deberta_kernels.impl.gpu_tables import check_prepared, ends_of, shared_index
from deberta_kernels.position import plain_tensors
from deberta_kernels.types import AttentionProblem, PositionSpec

__all__ = [
    "ALIGNMENT", "Arguments", "Box", "Call", "Encode", "ForwardInfo", "ForwardParams", "Info", "TensorMap", "box_of",
    "expand", "grid", "readable", "rows_of_distances", "select",
]  # fmt: skip

ALIGNMENT = 64  # of a tensor map
# Rows of expanded tables come in multiples of this, a tile: lengths without end would have index tensors without end.
_TABLE_STEP = 64
_BOX = 64  # elements and rows of a box: the 128-byte swizzle allows no more


class Info(ctypes.Structure):
    """What a compiled module says of itself: seven integers in constant memory.

    Attributes:
        VERSION: the `abi_version` that this package fills arguments for.
    """

    VERSION: ClassVar[int]


class ForwardInfo(Info):
    """`ForwardInfo` of csrc/cuda/params.h."""

    VERSION = 1
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("abi_version", "head_dim", "rows", "keys", "threads", "shared_bytes", "table_margin")
    ]


class TensorMap(ctypes.Structure):
    """`TensorMap` of csrc/cuda/params.h."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class ForwardParams(ctypes.Structure):
    """`ForwardParams` of csrc/cuda/params.h."""

    _fields_ = [
        *((name, TensorMap) for name in ("k", "v", "pos_key", "pos_query")),
        *((name, ctypes.c_int64) for name in (
            "q", "q_stride_b", "q_stride_h", "q_stride_n", "out", "lse", "pos_key_rows", "pos_query_rows", "table_rows",
            "table_offset", "low_end", "high_start", "mean", "key_mask", "key_mask_stride_b", "query_mask",
            "query_mask_stride_b", "pair_mask", "pair_mask_stride_b", "pair_mask_stride_h", "pair_mask_stride_m",
            "pair_mask_stride_n", "cu_seqlens", "seed", "batch", "heads", "nq", "nk", "prefix", "row_tiles",
            "dropout_threshold",
        )),
        ("qk_scale", ctypes.c_double),
        ("keep_scale", ctypes.c_double),
    ]  # fmt: skip


@dataclass(frozen=True)
class Box:
    """What a tensor map describes, its dimensions innermost first.

    Attributes:
        address: of the first element.
        sizes: elements per dimension.
        strides: bytes from one element of a dimension to the next, one per dimension.
        box: elements that one copy takes, per dimension.
    """

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


# Fills a tensor map, see `Driver.encode`.
Encode = Callable[[TensorMap, torch.dtype, Box], None]


def box_of(x: Tensor, order: tuple[int, ...]) -> Box:
    """Describe a tensor of 16-bit elements, its dimensions in this order, innermost first."""
    sizes = tuple(x.shape[i] for i in order)
    # A dimension of one element is never stepped along, whatever its stride: the driver gets one it accepts.
    strides = tuple(2 * x.stride(i) if i == order[0] or x.shape[i] > 1 else 2 * sizes[0] for i in order)
    return Box(x.data_ptr(), sizes, strides, (_BOX, _BOX, *([1] * (len(order) - 2))))


def grid(problem: AttentionProblem, rows: int) -> tuple[int, int]:
    """Return (blocks of a launch, blocks per sample and head) where a block takes that many queries."""
    samples, nq, _ = extent(problem)
    row_tiles = -(-nq // rows)
    return samples * problem.q.shape[1] * row_tiles, row_tiles


class Call:
    """The arguments of one call's launches, and every tensor whose address they hold.

    Attributes:
        params: to be passed by address; it lies on a 64-byte boundary.
        memory: (tensor, whether a kernel writes it).
    """

    def __init__(self, layout: type[ctypes.Structure], problem: AttentionProblem, encode: Encode) -> None:
        """Fill in what every kernel reads: sizes, scales, dropout.

        Args:
            layout: of the arguments.
            problem: the call.
            encode: fills a tensor map, see `Driver.encode`.
        """
        self.problem, self.encode = problem, encode
        self.memory: list[tuple[Tensor, bool]] = []
        self._buffer = ctypes.create_string_buffer(ctypes.sizeof(layout) + 2 * ALIGNMENT)
        self.params: Any = layout.from_buffer(self._buffer, -ctypes.addressof(self._buffer) % ALIGNMENT)
        p = self.params
        _, p.heads, p.nq, _ = problem.q.shape
        p.nk = problem.k.shape[2]
        p.batch = extent(problem).samples
        if problem.cu_seqlens is not None:
            p.cu_seqlens = self.address(problem.cu_seqlens.contiguous())
        p.qk_scale = problem.scale * LOG2E
        p.dropout_threshold = dropout.threshold(problem.dropout_p)
        p.keep_scale = dropout.keep_scale(problem.dropout_p)
        if problem.dropout_p > 0:
            p.seed = self.address(problem.seed)

    def address(self, x: Tensor | None, writable: bool = False) -> int:
        """Return the address of a tensor that a kernel reads, or writes."""
        if x is None:
            return 0
        self.memory.append((x, writable))
        return x.data_ptr()

    def map(self, name: str, x: Tensor, order: tuple[int, ...]) -> None:
        """Fill the tensor map of this name, with the dimensions of x in this order, innermost first."""
        self.address(x)
        self.encode(getattr(self.params, name), x.dtype, box_of(x, order))

    def strided(self, name: str, x: Tensor) -> None:
        """Fill in the address and the strides of (B, H, N, D) values that are read without a map."""
        x = readable(x, 2)
        setattr(self.params, name, self.address(x))
        for axis, stride in zip("bhn", x.stride()):
            setattr(self.params, f"{name}_stride_{axis}", stride)

    def tables(self, first: int, expanded: Sequence[Tensor]) -> None:
        """Fill in both expanded tables, (H, rows, D) each, whose row 0 is that of distance `first`."""
        p = self.params
        p.table_rows, p.table_offset = expanded[0].shape[1], -first
        for name, x in zip(("pos_key", "pos_query"), expanded):
            self.map(name, x, (2, 1, 0))
            setattr(p, f"{name}_rows", x.data_ptr())

    def token_mask(self, name: str, mask: Tensor | None) -> None:
        """Fill in a (B, N) bool mask."""
        if mask is not None:
            mask = mask if mask.stride(1) == 1 else mask.contiguous()
            setattr(self.params, name, self.address(mask))
            setattr(self.params, f"{name}_stride_b", mask.stride(0))

    def pair_mask(self) -> None:
        """Fill in the mask of pairs, if there is one."""
        p, pair = self.params, self.problem.masks.pair
        if pair is not None:
            p.pair_mask = self.address(pair)
            p.pair_mask_stride_b, head, p.pair_mask_stride_m, p.pair_mask_stride_n = pair.stride()
            p.pair_mask_stride_h = head if pair.shape[1] > 1 else 0


class Arguments(Call):
    """The arguments of a forward.

    Attributes:
        blocks: of the grid.
    """

    def __init__(self, problem: AttentionProblem, info: ForwardInfo, encode: Encode, out: Tensor, lse: Tensor) -> None:
        """Fill the arguments.

        Args:
            problem: the call.
            info: what the compiled kernel says of itself.
            encode: fills a tensor map, see `Driver.encode`.
            out: (B, Nq, H, D) contiguous, dtype of q; will be written.
            lse: (B, H, Nq) float32 contiguous; will be written.
        """
        super().__init__(ForwardParams, problem, encode)
        p = self.params
        self.blocks, p.row_tiles = grid(problem, info.rows)
        self.strided("q", problem.q)
        for name, x in (("k", problem.k), ("v", problem.v)):
            self.map(name, readable(x, 8), (3, 2, 1, 0))
        p.out, p.lse = self.address(out, True), self.address(lse, True)
        self._fill_tables(info.table_margin)
        mean = padded_row_value(problem)
        if mean is not None:
            p.mean = self.address(mean)
            self.token_mask("key_mask", problem.masks.key)
            self.token_mask("query_mask", problem.masks.query)
            self.pair_mask()

    def _fill_tables(self, margin: int) -> None:
        p, problem, position = self.params, self.problem, self.problem.position
        p.prefix = position.prefix_length
        if not has_positions(problem):
            p.prefix = p.nk
            return
        p.low_end, p.high_start = ends = ends_of(shared_index(max(p.nq, p.nk), position))
        expanded: Sequence[Tensor]
        if problem.prepared is None:
            reached = ends.window(p.nq, p.nk - p.prefix, margin)
            first = reached.first // _TABLE_STEP * _TABLE_STEP
            last = -(-reached.stop // _TABLE_STEP) * _TABLE_STEP
            expanded = _expanded(problem.pos_key, problem.pos_query, position, first, last)
        else:
            first = check_prepared(problem.prepared, problem.q, ends.full_window(margin), problem.q.shape[3]).first
            expanded = problem.prepared.unbind()
        self.tables(first, expanded)


def expand(pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec, margin: int) -> Tensor | None:
    """Expand the tables over every distance that is not saturated, for calls of any length.

    Args:
        pos_key: (H, rows, D) or None.
        pos_query: (H, rows, D) or None.
        position: see `PositionSpec`.
        margin: `table_margin` of the compiled kernel.

    Returns:
        (2, H, distances, D) contiguous; None when the distances are too many, or nothing saturates.
    """
    covered = ends_of(shared_index(1, position)).full_window(margin)
    if covered is None:
        return None
    return torch.stack(_expanded(pos_key, pos_query, position, covered.first, covered.stop))


def _expanded(
    pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Copy the tables with one row per distance first ... last - 1, each (H, rows, D); a missing one is all zeros."""
    given = pos_key if pos_key is not None else pos_query
    if given is None:
        raise ValueError("there are no position tables to expand.")
    return select(pos_key, pos_query, rows_of_distances(position, first, last, given.shape[1], given.device))


def select(pos_key: Tensor | None, pos_query: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Copy these rows of the tables, each (H, rows, D); a missing one is all zeros."""

    def one(table: Tensor | None, other: Tensor | None) -> Tensor:
        if table is not None:
            return table.index_select(1, rows).contiguous()
        assert other is not None  # a call without tables has none to copy
        return other.new_zeros(other.shape[0], rows.numel(), other.shape[2])

    return one(pos_key, pos_query), one(pos_query, pos_key)


def rows_of_distances(
    position: PositionSpec, first: int, last: int, count: int, device: torch.device, sign: int = 1
) -> Tensor:
    """Return the row of tables of `count` rows for each distance, first ... last - 1 times `sign`, (n,) int64."""
    found = _cached_rows(position, first, last, count, device, sign)
    if found.is_cuda:  # so that its memory is not given away while this stream reads it, once it is dropped
        found.record_stream(torch.cuda.current_stream(found.device))
    return found


@lru_cache(maxsize=256)
def _cached_rows(position: PositionSpec, first: int, last: int, count: int, device: torch.device, sign: int) -> Tensor:
    index = shared_index(max(-first, last), position)
    with plain_tensors():
        rows = index.rows(sign * torch.arange(first, last, device="cpu"))
        found = (rows.long() - position.first_row).clamp(0, count - 1)
        return found.to(device)  # waits for the copy, so later calls may read it from any stream


def readable(x: Tensor, unit: int) -> Tensor:
    """Return x in memory that the kernel can read, its rows at multiples of `unit` elements."""
    x = x.resolve_neg()
    aligned = x.stride(-1) == 1 and all(s > 0 and s % unit == 0 for s in steps(x)) and x.data_ptr() % (2 * unit) == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
