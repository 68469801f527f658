"""Prepare one launch of the CUDA backward, and read its results: csrc/cuda/README.md, "Launching the backward"."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from deberta_kernels import dropout
from deberta_kernels.impl.cuda.arguments import (
    ALIGNMENT,
    LOG2E,
    LONGEST,
    Box,
    TensorMap,
    box_of,
    ends,
    grid,
    readable,
    rows_of_distances,
)
from deberta_kernels.position import position_index
from deberta_kernels.types import AttentionProblem, Gradients

__all__ = ["BACKWARD_ABI_VERSION", "BackwardArguments", "BackwardInfo", "BackwardParams"]

# csrc/cuda/params.h; the emulation's tests compare the sizes.
BACKWARD_ABI_VERSION = 1
_TILE = 64
_PREFIX_STEP = 16  # kPrefixStep of csrc/cuda/schedule.h


class BackwardInfo(ctypes.Structure):
    """`BackwardInfo` of csrc/cuda/params.h."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("abi_version", "head_dim", "keys", "queries", "threads", "shared_bytes", "table_margin")
    ]


class BackwardParams(ctypes.Structure):
    """`BackwardParams` of csrc/cuda/params.h."""

    _fields_ = [
        *((name, TensorMap) for name in ("q", "dout", "q_far", "pos_key", "pos_query")),
        *((name, ctypes.c_int64) for name in (
            "k", "k_stride_b", "k_stride_h", "k_stride_n", "v", "v_stride_b", "v_stride_h", "v_stride_n", "dk", "dv",
            "dq", "lse2", "delta", "far_constants", "dmean", "dq_sums", "dtables", "dtables_stride_b",
            "dtables_stride_consumer", "far_sums", "pos_key_rows", "pos_query_rows", "table_rows", "table_offset",
            "low_end", "high_start", "key_mask", "key_mask_stride_b", "pair_mask", "pair_mask_stride_b",
            "pair_mask_stride_h", "pair_mask_stride_m", "pair_mask_stride_n", "cu_seqlens", "seed", "batch", "heads",
            "nq", "nk", "prefix", "row_tiles", "key_blocks", "groups", "dropout_threshold",
        )),
        *((name, ctypes.c_double) for name in ("qk_scale", "scale", "keep_scale")),
    ]  # fmt: skip


class BackwardArguments:
    """The arguments of one launch, and every tensor whose address they hold.

    Attributes:
        params: to be passed by address; it lies on a 64-byte boundary.
        blocks: of the grid of the backward.
        convert_blocks: of the grid of the conversion of dq.
        memory: (tensor, whether a kernel writes it).
    """

    def __init__(
        self, problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
        info: BackwardInfo, encode: Callable[[TensorMap, torch.dtype, Box], None], *, deterministic: bool = False,
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
            deterministic: add every sum in one fixed order; slower, since a block then holds all keys of a head.
        """
        self.problem, self.info, self.encode = problem, info, encode
        self.memory: list[tuple[Tensor, bool]] = []
        self._buffer = ctypes.create_string_buffer(ctypes.sizeof(BackwardParams) + 2 * ALIGNMENT)
        start = -ctypes.addressof(self._buffer) % ALIGNMENT
        self.params = BackwardParams.from_buffer(self._buffer, start)
        self.padded = lse == -torch.inf
        self._table_rows: Tensor | None = None
        self._fill_call()
        self._fill_rows(dout, dlse, out, lse)
        self._fill_tables()
        self._fill_blocks(deterministic)
        self._fill_masks(dout)
        self._fill_results()

    def _address(self, x: Tensor | None, writable: bool = False) -> int:
        if x is None:
            return 0
        self.memory.append((x, writable))
        return x.data_ptr()

    def _map(self, name: str, x: Tensor, order: tuple[int, ...]) -> None:
        self._address(x)
        self.encode(getattr(self.params, name), x.dtype, box_of(x, order))

    def _fill_call(self) -> None:
        p, problem = self.params, self.problem
        p.batch, p.heads, p.nq, self.head_dim = problem.q.shape
        p.nk = problem.k.shape[2]
        self.samples, self.longest = p.batch, p.nk
        if problem.cu_seqlens is not None:
            p.batch = problem.cu_seqlens.numel() - 1
            p.cu_seqlens = self._address(problem.cu_seqlens.contiguous())
            self.longest = problem.max_seqlen
        self.convert_blocks, p.row_tiles = grid(problem, self.info.queries)
        for name, x in (("k", problem.k), ("v", problem.v)):
            x = readable(x, 2)
            setattr(p, name, self._address(x))
            for axis, stride in zip("bhn", x.stride()):
                setattr(p, f"{name}_stride_{axis}", stride)
        p.scale, p.qk_scale, p.keep_scale = problem.scale, problem.scale * LOG2E, 1.0
        if problem.dropout_p > 0:
            p.dropout_threshold = dropout.threshold(problem.dropout_p)
            p.keep_scale = dropout.keep_scale(problem.dropout_p)
            p.seed = self._address(problem.seed)

    def _fill_rows(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """What the kernel needs of each query beside itself."""
        p = self.params
        self._map("q", readable(self.problem.q, 8), (3, 2, 1, 0))
        self._map("dout", readable(dout, 8), (3, 2, 1, 0))
        delta = (dout.float() * out.float()).sum(-1)
        if dlse is not None:
            delta = delta - dlse
        delta = delta.masked_fill(self.padded, 0.0).contiguous()
        lse2 = (lse.double() * LOG2E).float().masked_fill(self.padded, torch.inf).contiguous()
        p.lse2, p.delta = self._address(lse2), self._address(delta)

    def _fill_tables(self) -> None:
        p, problem, position = self.params, self.problem, self.problem.position
        p.prefix = position.prefix_length
        given = problem.pos_key if problem.pos_key is not None else problem.pos_query
        if given is None or p.prefix >= p.nk:
            p.prefix = p.nk
            return
        p.low_end, p.high_start = low_end, high_start = ends(position_index(max(p.nq, p.nk, LONGEST), position))
        first = max(-high_start, 1 - p.nq) - self.info.table_margin
        last = min(-low_end, p.nk - p.prefix - 1) + 1 + self.info.table_margin
        first -= (first + p.prefix % _PREFIX_STEP) % _TILE
        last += (first - last) % _TILE
        p.table_rows, p.table_offset = last - first, -first
        self._table_rows = rows_of_distances(position, 1 - last, 1 - first, given.shape[1], given.device).flip(0)
        reversed_tables = [
            given.new_zeros(given.shape[0], last - first, given.shape[2]) if table is None
            else table.index_select(1, self._table_rows).contiguous()
            for table in (problem.pos_key, problem.pos_query)
        ]  # fmt: skip
        for name, x in zip(("pos_key", "pos_query"), reversed_tables):
            self._map(name, x, (2, 1, 0))
            setattr(p, f"{name}_rows", x.data_ptr())
        self._fill_far(*reversed_tables)

    def _fill_far(self, pos_key: Tensor, pos_query: Tensor) -> None:
        """The second operand and the constant of each query for distances <= low_end, then for those >= high_start."""
        p = self.params
        q = self.problem.q.masked_fill(self.padded[..., None], 0.0)
        a, b = (table[:, [-1, 0]].transpose(0, 1)[:, None, :, None] for table in (pos_key, pos_query))  # (2, 1, H, 1, D)
        self._map("q_far", (q[None] + b).flatten(0, 1).contiguous(), (3, 2, 1, 0))
        constants = (q[None].float() * a.float()).sum(-1) * p.qk_scale
        p.far_constants = self._address(constants.contiguous())

    def _fill_blocks(self, deterministic: bool) -> None:
        p, info = self.params, self.info
        longest, prefix = self.longest, min(p.prefix, self.longest)
        others = longest - prefix // _PREFIX_STEP * _PREFIX_STEP if longest > prefix else 0
        p.key_blocks = -(-prefix // info.keys) + -(-others // info.keys)
        p.groups = min(1, p.key_blocks) if deterministic else p.key_blocks
        self.blocks = p.batch * p.heads * p.groups
        device, consumers = self.problem.q.device, info.keys // _TILE
        tiles = p.batch * p.row_tiles
        if self.problem.cu_seqlens is not None:
            tiles = p.nq // _TILE + p.batch
        size = 2 * p.heads * p.table_rows * self.head_dim
        copies = (p.batch, consumers) if deterministic else (1, 1)
        self.dq_sums = torch.zeros(tiles, p.heads, _TILE * self.head_dim, device=device)
        self.dtables = torch.zeros(*copies, 2, p.heads, p.table_rows // _TILE, _TILE * self.head_dim, device=device)
        self.far_sums = torch.zeros(2, 2, p.heads, p.batch * p.key_blocks * consumers, self.head_dim, device=device)
        p.dq_sums, p.dtables, p.far_sums = (self._address(x, True) for x in (self.dq_sums, self.dtables, self.far_sums))
        self.memory.append((self.dq_sums, False))  # read by the conversion
        p.dtables_stride_b, p.dtables_stride_consumer = (consumers * size, size) if deterministic else (0, 0)

    def _fill_masks(self, dout: Tensor) -> None:
        p, masks = self.params, self.problem.masks
        key, pair = masks.key, masks.pair
        if key is not None or pair is not None or masks.query is not None:
            p.dmean = self._address((dout.float() * self.padded[..., None]).sum(2) / p.nk)
        if key is not None:
            key = key if key.stride(1) == 1 else key.contiguous()
            p.key_mask, p.key_mask_stride_b = self._address(key), key.stride(0)
        if pair is not None:
            p.pair_mask = self._address(pair)
            p.pair_mask_stride_b, head, p.pair_mask_stride_m, p.pair_mask_stride_n = pair.stride()
            p.pair_mask_stride_h = head if pair.shape[1] > 1 else 0

    def _fill_results(self) -> None:
        p, problem = self.params, self.problem
        results = []
        for x in (problem.q, problem.k, problem.v):
            batch, heads, length, head_dim = x.shape
            results.append(torch.empty(batch, length, heads, head_dim, dtype=x.dtype, device=x.device))
        self.dq, self.dk, self.dv = results
        p.dq, p.dk, p.dv = (self._address(x, True) for x in results)

    def gradients(self) -> Gradients:
        """Return the gradients, once the kernels have run."""
        dq, dk, dv = (x.transpose(1, 2) for x in (self.dq, self.dk, self.dv))
        return Gradients(dq, dk, dv, self._table_gradient(self.problem.pos_key, 0),
                         self._table_gradient(self.problem.pos_query, 1))  # fmt: skip

    def _table_gradient(self, table: Tensor | None, which: int) -> Tensor | None:
        if table is None:
            return None
        found = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        rows = self._table_rows
        if rows is not None:
            sums = _in_order(self.dtables[:, :, which].sum((0, 1)), self.head_dim)
            found.index_add_(1, rows, sums)
            far = self.far_sums[which].sum(2)
            for side, row in enumerate((rows[-1:], rows[:1])):
                found.index_add_(1, row, far[side][:, None])
        return (found * self.problem.scale).to(table.dtype)


def _in_order(sums: Tensor, head_dim: int) -> Tensor:
    """Return (H, rows, D) from (H, rows / 64, 64 * D), whose blocks lie as accumulators do."""
    heads, blocks, _ = sums.shape
    panels = head_dim // 64
    parts = sums.view(heads, blocks, panels, 8, 4, 8, 4, 2, 2)  # panel, n, w, g, t, h, e
    # Row 16 w + 8 h + g, column 64 panel + 8 n + 2 t + e.
    return parts.permute(0, 1, 4, 7, 5, 2, 3, 6, 8).reshape(heads, blocks * _TILE, head_dim)
