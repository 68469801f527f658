"""One launch of the CUDA backward, and its results: csrc/cuda/README.md, "Launching the backward"."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from deberta_kernels.impl.common import LOG2E, empty_tokens, extent, has_positions, masked, wanted
from deberta_kernels.impl.cuda.arguments import (
    Call,
    Encode,
    Info,
    TensorMap,
    grid,
    readable,
    rows_of_distances,
    select,
)
from deberta_kernels.impl.gpu_tables import PREFIX_STEP, Ends, ends_of, shared_index
from deberta_kernels.types import AttentionProblem, Gradients

__all__ = ["CONVERSION_THREADS", "BackwardArguments", "BackwardInfo", "BackwardParams", "Plan", "in_order", "plan"]

CONVERSION_THREADS = 128  # of a block of the second kernel: a warpgroup, as csrc/cuda/query_gradient.h has it
_TILE = 64  # kTile of csrc/cuda/layout.h
_FLOAT = 4  # bytes


class BackwardInfo(Info):
    """`BackwardInfo` of csrc/cuda/params.h."""

    VERSION = 1
    _fields_: ClassVar = [
        (name, ctypes.c_int32)
        for name in ("abi_version", "head_dim", "keys", "queries", "threads", "shared_bytes", "table_margin")
    ]


class BackwardParams(ctypes.Structure):
    """`BackwardParams` of csrc/cuda/params.h."""

    _fields_ = [
        *((name, TensorMap) for name in ("q", "dout", "q_far", "pos_key", "pos_query")),
        *((name, ctypes.c_int64) for name in (
            "k", "k_stride_b", "k_stride_h", "k_stride_n", "v", "v_stride_b", "v_stride_h", "v_stride_n", "dk", "dv",
            "dq", "lse2", "out_dot_dout", "far_constants", "dmean", "dq_sums", "dtables", "dtables_stride_b",
            "dtables_stride_consumer", "far_sums", "pos_key_rows", "pos_query_rows", "table_rows", "table_offset",
            "low_end", "high_start", "key_mask", "key_mask_stride_b", "pair_mask", "pair_mask_stride_b",
            "pair_mask_stride_h", "pair_mask_stride_m", "pair_mask_stride_n", "cu_seqlens", "seed", "batch", "heads",
            "nq", "nk", "prefix", "row_tiles", "key_blocks", "groups", "dropout_threshold",
        )),
        *((name, ctypes.c_double) for name in ("qk_scale", "scale", "keep_scale")),
    ]  # fmt: skip


class Plan(NamedTuple):
    """The sizes of a launch: what follows from lengths and from the compiled kernel.

    Attributes:
        samples: of a batch, or packed sequences.
        heads: H.
        prefix: leading keys without a position; all keys where there are no tables.
        ends: where distances saturate.
        first: smallest distance from a query to a key, j - i, that has a row in the expanded tables.
        table_rows: how many they have, a multiple of 64; 0 where there are no tables.
        is_far: whether there are tiles all of whose distances are saturated.
        row_tiles: tiles of queries per sample and head.
        convert_blocks: blocks of the conversion of dq.
        key_blocks: blocks of keys per sample and head.
        groups: thread blocks that share them.
        copies: (B, consumers): sums of table gradients that are kept apart.
    """

    samples: int
    heads: int
    prefix: int
    ends: Ends
    first: int
    table_rows: int
    is_far: bool
    row_tiles: int
    convert_blocks: int
    key_blocks: int
    groups: int
    copies: tuple[int, int]

    @property
    def blocks(self) -> int:
        """Return the blocks of the grid."""
        return self.samples * self.heads * self.groups

    def table_bytes(self, head_dim: int) -> int:
        """Return the memory that the sums of table gradients take."""
        return _FLOAT * self.copies[0] * self.copies[1] * 2 * self.heads * self.table_rows * head_dim


def plan(problem: AttentionProblem, info: BackwardInfo, deterministic: bool) -> Plan:
    """Plan a launch.

    Args:
        problem: the call.
        info: what the compiled kernel says of itself.
        deterministic: add every sum in one fixed order: a thread block then holds all keys of a head, one after the
            other, and adds to sums of its own.
    """
    position, heads = problem.position, problem.q.shape[1]
    samples, nq, nk = extent(problem)
    biased = has_positions(problem)
    prefix = position.prefix_length if biased else problem.k.shape[2]
    convert_blocks, row_tiles = grid(problem, info.queries)
    shift, keys = prefix % PREFIX_STEP, info.keys
    others = nk - prefix + shift if nk > prefix else 0  # these blocks start at a multiple of the step
    key_blocks = -(-min(prefix, nk) // keys) + -(-others // keys)
    consumers = keys // _TILE
    found = Plan(
        samples, heads, prefix, Ends(0, 0), 0, 0, False, row_tiles, convert_blocks, key_blocks,
        min(1, key_blocks) if deterministic else key_blocks, (samples, consumers) if deterministic else (1, 1),
    )  # fmt: skip
    if not biased:
        return found
    low_end, high_start = ends = ends_of(shared_index(max(problem.q.shape[2], problem.k.shape[2]), position))
    first = max(-high_start, 1 - nq) - info.table_margin
    last = min(-low_end, nk - prefix - 1) + 1 + info.table_margin
    first -= (first + shift) % _TILE
    last += (first - last) % _TILE
    # Of the last tile of queries with the first block of keys, and of the first tile with the last block.
    highest = (row_tiles - 1) * _TILE - (keys - 1 - shift)
    lowest = _TILE - 1 - ((-(-others // keys) - 1) * keys - shift)
    is_far = highest >= high_start or lowest <= low_end
    return found._replace(ends=ends, first=first, table_rows=last - first, is_far=is_far)


class BackwardArguments(Call):
    """The arguments of one backward: of its kernel, and of the one that converts dq after it.

    Attributes:
        plan: how large the launch is.
        blocks: of the grid of the backward.
        convert_blocks: of the grid of the conversion of dq.
    """

    def __init__(
        self, problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
        info: BackwardInfo, encode: Encode, *, deterministic: bool = False,
    ) -> None:  # fmt: skip
        """Fill the arguments.

        Args:
            problem: the call.
            dout: (B, H, Nq, D), gradient of out.
            dlse: (B, H, Nq) float32, gradient of lse, or None.
            out: (B, H, Nq, D), of the forward.
            lse: (B, H, Nq) float32, of the forward.
            info: what the compiled kernel says of itself.
            encode: fills a tensor map, see `Driver.encode`.
            deterministic: see `plan`.
        """
        super().__init__(BackwardParams, problem, encode)
        self.plan = plan(problem, info, deterministic)
        self.blocks, self.convert_blocks = self.plan.blocks, self.plan.convert_blocks
        self._rows: Tensor | None = None  # of the tables, one for each row of the expanded ones
        p = self.params
        p.scale, p.prefix, p.row_tiles = problem.scale, self.plan.prefix, self.plan.row_tiles
        p.key_blocks, p.groups = self.plan.key_blocks, self.plan.groups
        self.strided("k", problem.k)
        self.strided("v", problem.v)
        self._fill_rows(dout, dlse, out, lse)
        self._fill_tables()
        self._fill_sums(info.keys // _TILE)
        self.dq, self.dk, self.dv = (self._result(name) for name in ("q", "k", "v"))

    def _fill_rows(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """Fill in what the kernel reads of each query, its position aside."""
        p, problem = self.params, self.problem
        self.map("q", readable(problem.q, 8), (3, 2, 1, 0))
        self.map("dout", readable(dout, 8), (3, 2, 1, 0))
        sums = torch.zeros(2, *lse.shape, dtype=torch.float32, device=lse.device)
        torch.sum(dout.to(torch.float32, copy=True).mul_(out), -1, out=sums[0])
        if dlse is not None:
            sums[0] -= dlse
            sums[1] = dlse
        # Rounded once: a large score makes the last bit of a weight coarse.
        lse2 = (lse.double() * LOG2E).float()
        if masked(problem):
            padded = lse == -torch.inf
            sums, lse2 = sums.masked_fill_(padded, 0.0), lse2.masked_fill_(padded, torch.inf)
            dmean = dout.masked_fill(~padded[..., None], 0.0).sum(2, dtype=torch.float32).div_(p.nk)
            p.dmean = self.address(dmean.contiguous())
            self.token_mask("key_mask", problem.masks.key)
            self.pair_mask()
        p.lse2, p.out_dot_dout = self.address(lse2.contiguous()), self.address(sums)

    def _fill_tables(self) -> None:
        p, problem, size = self.params, self.problem, self.plan
        p.low_end, p.high_start = size.ends
        given = problem.pos_key if problem.pos_key is not None else problem.pos_query
        if given is None or size.table_rows == 0:
            return
        last = size.first + size.table_rows
        self._rows = rows_of_distances(given.device, problem.position, size.first, last, given.shape[1], -1)
        pos_key, pos_query = select(problem.pos_key, problem.pos_query, self._rows)
        self.tables(size.first, (pos_key, pos_query))
        if size.is_far:
            self._fill_far(pos_key, pos_query)

    def _fill_far(self, pos_key: Tensor, pos_query: Tensor) -> None:
        """Fill in what far tiles read in the place of tables: first that of i - j <= low_end, then of >= high_start.

        All their pairs read one row a of pos_key and one row b of pos_query. So they are plain attention with q + b for
        the query, rounded as in the forward, and q . a, a constant of the query, added to its scores.
        """
        p, q = self.params, self.problem.q
        batch, heads, nq, head_dim = q.shape
        far = q.new_empty(2 * batch, heads, nq, head_dim)
        constants = torch.empty(2, batch, heads, nq, dtype=torch.float32, device=q.device)
        for side, row in enumerate((-1, 0)):
            torch.add(q, pos_query[:, row, None], out=far[side * batch :][:batch])
            torch.sum(q * pos_key[:, row, None].float(), -1, out=constants[side])
        self.map("q_far", far, (3, 2, 1, 0))
        p.far_constants = self.address(constants.mul_(p.qk_scale))

    def _fill_sums(self, consumers: int) -> None:
        """Make zeroed memory for what more than one thread block adds to; `consumers` of a block add on their own."""
        p, size = self.params, self.plan
        head_dim, heads = self.problem.q.shape[3], size.heads
        packed = self.problem.cu_seqlens is not None
        tiles = p.nq // _TILE + size.samples if packed else size.samples * size.row_tiles
        shapes = (
            (tiles, heads, _TILE * head_dim),
            (*size.copies, 2, heads, size.table_rows // _TILE, _TILE * head_dim),
            (2, 2, heads, size.samples * size.key_blocks * consumers if size.is_far else 0, head_dim),
        )
        sizes = [math.prod(shape) for shape in shapes]
        memory = torch.zeros(sum(sizes), device=self.problem.q.device).split(sizes)
        dq_sums, self._dtables, self._far_sums = (x.view(shape) for x, shape in zip(memory, shapes))
        for name, x in (("dq_sums", dq_sums), ("dtables", self._dtables), ("far_sums", self._far_sums)):
            if x.numel():
                setattr(p, name, self.address(x, True))
        self.address(dq_sums)  # read by the conversion
        if size.copies != (1, 1):
            p.dtables_stride_b, p.dtables_stride_consumer = self._dtables.stride()[:2]

    def _result(self, name: str) -> Tensor:
        found = empty_tokens(getattr(self.problem, name)).transpose(1, 2)  # (B, N, H, D)
        setattr(self.params, f"d{name}", self.address(found, True))
        return found

    def gradients(self, needs: Sequence[bool] = (True,) * 5) -> Gradients:
        """Return the gradients asked for, dq ... dpos_query, once the kernels have run."""
        dq, dk, dv = (x.transpose(1, 2) if need else None for x, need in zip((self.dq, self.dk, self.dv), needs))
        tables = wanted(self.problem, needs)[3:]
        folded = (None if x is None else self._folded(which, x) for which, x in enumerate(tables))
        return Gradients(dq, dk, dv, *folded)

    def _folded(self, which: int, table: Tensor) -> Tensor:
        """Return the gradient of a table: of all distances that share a row, and of far tiles, the sum."""
        found = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        if self._rows is not None:
            found.index_add_(1, self._rows, in_order(self._dtables[:, :, which].sum((0, 1)), table.shape[2]))
            far = self._far_sums[which].sum(2)
            for side, row in enumerate((self._rows[-1:], self._rows[:1])):
                found.index_add_(1, row, far[side, :, None])
        return found.mul_(self.problem.scale).to(table.dtype)


def in_order(sums: Tensor, head_dim: int) -> Tensor:
    """Return (H, rows, D) from (H, rows / 64, 64 * D), whose blocks lie as accumulators do."""
    heads, blocks, _ = sums.shape
    parts = sums.view(heads, blocks, head_dim // 64, 8, 4, 8, 4, 2, 2)  # panel, n, w, g, t, h, e
    # Row 16 w + 8 h + g, column 64 panel + 8 n + 2 t + e.
    return parts.permute(0, 1, 4, 7, 5, 2, 3, 6, 8).reshape(heads, blocks * _TILE, head_dim)
