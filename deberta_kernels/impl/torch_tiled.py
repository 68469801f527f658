"""Disentangled attention in plain PyTorch, tile by tile: any device and dtype, no compiler, no N x N memory.

Samples and heads are taken a group at a time, queries a tile at a time against all keys, so that the largest
temporary is one tile row. Both position terms are a product with the reachable rows of the table followed by a
gather: c2p per tile, p2c once per group (its gather serves every tile). The backward recomputes the probabilities of
a tile by the same function as the forward, so the two cannot drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deberta_kernels.dropout import keep_mask, keep_scale
from deberta_kernels.dtypes import accumulation_dtype
from deberta_kernels.impl.common import (
    Needs,
    empty_results,
    empty_tokens,
    exact_matmul,
    masked,
    positioned_keys,
    score_factor,
    seed_of,
    sequences,
    wanted,
)
from deberta_kernels.position import plain_tensors, position_index, reachable_rows
from deberta_kernels.torch_state.captures import kept_on_device
from deberta_kernels.types import AttentionProblem, Gradients, Masks, PositionSpec

__all__ = ["backward", "forward", "refusal"]

# Scores in flight, in numbers. Measured on one core at B1 H12 N512 D64 float32, forward and backward: 2**18 takes 1.5
# times as long as 2**20 (4 MiB), 2**22 the same for four times the memory. Elsewhere launches must be few.
_CPU_SCORES = 1 << 20
_DEVICE_SCORES = 1 << 25
# Rows of a tile. Measured there: 64 rows take 1.4 times as long as 256. Very long inputs get the minimum.
_MIN_ROWS = 16
_MAX_ROWS = 256


def refusal(problem: AttentionProblem) -> str | None:
    """Return None: this backend runs every problem."""
    return None


@dataclass(frozen=True)
class _Table:
    """The rows of the position tables that one problem can reach.

    Attributes:
        pos_key: (H, rows, D) of the accumulation dtype, or None.
        pos_query: like pos_key.
        rows: where these rows lie in the tables given.
        row: (Nq + Nk' - 1,) int64; entry x + Nk' - 1 is the row, within these, of distance x. Nk' keys have a
            position.
    """

    pos_key: Tensor | None
    pos_query: Tensor | None
    rows: slice
    row: Tensor

    def of_heads(self, heads: slice) -> _Table:
        """Return the same rows of some heads."""
        pos_key, pos_query = (None if x is None else x[heads] for x in (self.pos_key, self.pos_query))
        return _Table(pos_key, pos_query, self.rows, self.row)

    def rows_of(self, rows: range, positioned: int) -> Tensor:
        """Return (len(rows), Nk') int64: the table row of each query of a tile and each key that has a position."""
        queries = torch.arange(rows.start, rows.stop, device=self.row.device)[:, None]
        keys = torch.arange(positioned, device=self.row.device)
        return self.row[queries - keys + (positioned - 1)]


@dataclass(frozen=True)
class _Group:
    """The samples and heads that are computed at once, in the accumulation dtype, masked tokens at zero.

    Attributes:
        batch: samples of the group.
        heads: heads of the group.
        k: (b, h, Nk, D).
        v: (b, h, Nk, D).
        p2c: (b, h, Nk', rows), score_factor * k_j . pos_query[row], or None.
        mean: (b, h, 1, D), mean of v over all keys; None when no row can be padding.
    """

    batch: slice
    heads: slice
    k: Tensor
    v: Tensor
    p2c: Tensor | None
    mean: Tensor | None


@dataclass(frozen=True)
class _Tile:
    """One tile of queries against all keys.

    Attributes:
        q: (b, h, T, D), accumulation dtype.
        probability: (b, h, T, Nk), softmax of the scores, zero on padded rows, before dropout.
        kept: (b, h, T, Nk) of the accumulation dtype: keep_scale where dropout keeps, else 0; None without dropout.
        lse: (b, h, T, 1), -inf on padded rows.
        row: (T, Nk') int64, see `_Table.rows_of`; None without position terms.
    """

    q: Tensor
    probability: Tensor
    kept: Tensor | None
    lse: Tensor
    row: Tensor | None

    def dropped(self) -> Tensor:
        """Return the probabilities after dropout."""
        return self.probability if self.kept is None else self.probability * self.kept


@torch.no_grad()
def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Attend; see `AttentionProblem` for the inputs.

    Returns:
        out: (B, H, Nq, D), dtype of q, a view of (B, Nq, H, D) memory.
        lse: (B, H, Nq) float32 (float64 for float64 inputs), natural log; -inf on padded rows.
    """
    q = problem.q
    out, lse = empty_results(q)
    with exact_matmul(q.device):
        for first, tokens, part in _samples(problem):
            _forward_sample(part, first, out[:, :, tokens], lse[:, :, tokens])
    return out, lse


@torch.no_grad()
def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients of `forward`.

    Args:
        problem: the problem of the forward.
        dout: (B, H, Nq, D), dtype of q, any strides; gradient of out.
        dlse: (B, H, Nq), dtype of lse, or None; gradient of lse.
        out: unused; the sum of out * dout is recomputed from unrounded probabilities.
        lse: unused, for the same reason.
        needs: whether q, k, v, pos_key, pos_query need a gradient.

    Returns:
        dq, dk, dv as views of (B, N, H, D) memory, dpos_key and dpos_query contiguous; None where not needed.
    """
    dtype = accumulation_dtype(problem.q.dtype)
    found = wanted(problem, needs)
    dq, dk, dv = (None if x is None else empty_tokens(x).zero_() for x in found[:3])
    dpos = [None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in found[3:]]
    with exact_matmul(problem.q.device):
        for first, tokens, part in _samples(problem):
            local = Gradients(*(None if x is None else x[:, :, tokens] for x in (dq, dk, dv)), *dpos)
            _backward_sample(part, first, dout[:, :, tokens], None if dlse is None else dlse[:, :, tokens], local)
    return Gradients(dq, dk, dv, *(None if x is None else x.to(problem.q.dtype) for x in dpos))


def _samples(problem: AttentionProblem) -> Iterator[tuple[int, slice, AttentionProblem]]:
    """Yield (index of the first sample, its tokens, problem): the whole batch, or each packed sequence alone."""
    if problem.cu_seqlens is None:
        if problem.q.numel() > 0:
            yield 0, slice(None), problem
        return
    for sequence, tokens in enumerate(sequences(problem.cu_seqlens)):
        if tokens.stop > tokens.start:
            q, k, v = (x[:, :, tokens] for x in (problem.q, problem.k, problem.v))
            yield sequence, tokens, replace(problem, q=q, k=k, v=v, masks=Masks(), cu_seqlens=None)


def _forward_sample(problem: AttentionProblem, first: int, out: Tensor, lse: Tensor) -> None:
    """Write out and lse of one batch, or of packed sequence number `first`."""
    table = _reachable(problem)
    for group, tile_rows in _groups(problem, table):
        for rows in tile_rows:
            tile = _tile(problem, table, group, rows, first)
            result = tile.dropped() @ group.v
            if group.mean is not None:
                result = torch.where(torch.isneginf(tile.lse), group.mean, result)
            out[group.batch, group.heads, rows.start : rows.stop] = result
            lse[group.batch, group.heads, rows.start : rows.stop] = tile.lse.squeeze(-1)


def _backward_sample(
    problem: AttentionProblem, first: int, dout: Tensor, dlse: Tensor | None, grads: Gradients
) -> None:
    """Write dq, dk, dv and add to dpos_key, dpos_query (accumulation dtype, rows of the tables given)."""
    table = _reachable(problem)
    for group, tile_rows in _groups(problem, table):
        sums = _Sums(group, table, problem.position.prefix_length, grads)
        for rows in tile_rows:
            tile = _tile(problem, table, group, rows, first)
            where = (group.batch, group.heads, slice(rows.start, rows.stop))
            dscore = sums.add_values(tile, dout[where].to(group.k.dtype), None if dlse is None else dlse[where])
            dq = sums.add_scores(tile, dscore.mul_(problem.scale))
            if grads.dq is not None and dq is not None:
                grads.dq[where] = dq
        sums.store()


class _Sums:
    """The gradients of one group, summed over its tiles in the accumulation dtype; what nobody needs stays None."""

    def __init__(self, group: _Group, table: _Table, prefix: int, grads: Gradients) -> None:
        """Start at zero; prefix is the number of leading keys without a position."""
        self.group, self.prefix, self.grads = group, prefix, grads
        self.table = table.of_heads(group.heads)
        self.dk = None if grads.dk is None else torch.zeros_like(group.k)
        self.dv = None if grads.dv is None else torch.zeros_like(group.v)
        self.dmean = None if grads.dv is None or group.mean is None else torch.zeros_like(group.mean)
        needs_p2c = grads.dk is not None or grads.dpos_query is not None
        self.dp2c = None if group.p2c is None or not needs_p2c else torch.zeros_like(group.p2c)

    def add_values(self, tile: _Tile, dout: Tensor, dlse: Tensor | None) -> Tensor:
        """Add one tile to dv; return the gradient of its scaled scores, (b, h, T, Nk)."""
        if self.group.mean is not None:
            padded = torch.isneginf(tile.lse)
            if self.dmean is not None:
                self.dmean += torch.where(padded, dout, 0.0).sum(2, keepdim=True)
            dout = torch.where(padded, 0.0, dout)
            dlse = None if dlse is None else torch.where(padded.squeeze(-1), 0.0, dlse)
        if self.dv is not None:
            self.dv += tile.dropped().mT @ dout
        dprobability = dout @ self.group.v.mT
        if tile.kept is not None:
            dprobability *= tile.kept
        out_dot_dout = (tile.probability * dprobability).sum(-1, keepdim=True)
        if dlse is not None:
            out_dot_dout = out_dot_dout - dlse.unsqueeze(-1)
        return dprobability.sub_(out_dot_dout).mul_(tile.probability)

    def add_scores(self, tile: _Tile, dscore: Tensor) -> Tensor | None:
        """Add one tile to dk and the position gradients; return its dq, (b, h, T, D), if anybody needs it."""
        if self.dk is not None:
            self.dk += dscore.mT @ tile.q
        dq = None if self.grads.dq is None else dscore @ self.group.k
        if tile.row is None:
            return dq
        dscore = dscore[..., self.prefix :]
        pos_key, dpos_key = self.table.pos_key, self.grads.dpos_key
        if pos_key is not None and (dq is not None or dpos_key is not None):
            dc2p = dscore.new_zeros(*dscore.shape[:3], pos_key.shape[1])
            dc2p.scatter_add_(-1, tile.row.expand(dscore.shape), dscore)
            if dq is not None:
                dq += dc2p @ pos_key
            if dpos_key is not None:
                dpos_key[self.group.heads, self.table.rows] += (dc2p.mT @ tile.q).sum(0)
        if self.dp2c is not None:
            self.dp2c.scatter_add_(-1, tile.row.mT.expand(dscore.mT.shape), dscore.mT)
        return dq

    def store(self) -> None:
        """Write or add the sums to the gradients."""
        group, grads = self.group, self.grads
        if self.dp2c is not None and self.table.pos_query is not None:
            if self.dk is not None:
                self.dk[:, :, self.prefix :] += self.dp2c @ self.table.pos_query
            if grads.dpos_query is not None:
                dpos_query = (self.dp2c.mT @ group.k[:, :, self.prefix :]).sum(0)
                grads.dpos_query[group.heads, self.table.rows] += dpos_query
        if self.dv is not None and self.dmean is not None:
            self.dv += self.dmean / group.v.shape[2]
        if grads.dk is not None and self.dk is not None:
            grads.dk[group.batch, group.heads] = self.dk
        if grads.dv is not None and self.dv is not None:
            grads.dv[group.batch, group.heads] = self.dv


def _reachable(problem: AttentionProblem) -> _Table:
    """Cut the tables to the rows that the lengths of the problem can reach."""
    nq, positioned = problem.q.shape[2], positioned_keys(problem)
    if positioned == 0:
        return _Table(None, None, slice(0, 0), torch.empty(0, dtype=torch.int64, device=problem.q.device))
    start, stop = reachable_rows(nq, positioned, problem.position)
    first_row = problem.position.first_row
    rows = slice(start - first_row, stop - first_row)
    dtype = accumulation_dtype(problem.q.dtype)
    pos_key, pos_query = (None if x is None else x[:, rows].to(dtype) for x in (problem.pos_key, problem.pos_query))
    spec, device = problem.position, problem.q.device
    known = (nq, positioned, spec.position_buckets, spec.max_relative_positions)
    row = _row_of_distances(*known) if device.type == "cpu" else _row_on_device(device, *known)
    return _Table(pos_key, pos_query, rows, row)


def _row_of_distances(nq: int, positioned: int, position_buckets: int, max_relative_positions: int) -> Tensor:
    """Return `_Table.row`, on the CPU."""
    spec = PositionSpec(position_buckets, max_relative_positions)
    start, _ = reachable_rows(nq, positioned, spec)
    distances = torch.arange(1 - positioned, nq, device="cpu")
    return position_index(max(nq, positioned), spec).rows(distances).to(torch.int64) - start


@kept_on_device(64)
def _row_on_device(device: torch.device, *known: int) -> Tensor:
    with plain_tensors():
        return _row_of_distances(*known).to(device)


def _groups(problem: AttentionProblem, table: _Table) -> Iterator[tuple[_Group, list[range]]]:
    """Yield groups of samples and heads, each with the query tiles that fit beside it."""
    batch, heads, nq, _ = problem.q.shape
    nk = problem.k.shape[2]
    budget = _CPU_SCORES if problem.q.device.type == "cpu" else _DEVICE_SCORES
    widest = max(min(nq, _MAX_ROWS), table.rows.stop - table.rows.start)
    units = max(budget // (nk * widest), 1)
    some_heads, some_samples = min(units, heads), min(max(units // heads, 1), batch)
    height = min(max(budget // (some_samples * some_heads * nk), _MIN_ROWS), _MAX_ROWS)
    tiles = [range(start, min(start + height, nq)) for start in range(0, nq, height)]
    for sample in range(0, batch, some_samples):
        for head in range(0, heads, some_heads):
            samples = slice(sample, min(sample + some_samples, batch))
            yield _group(problem, table, samples, slice(head, min(head + some_heads, heads))), tiles


def _group(problem: AttentionProblem, table: _Table, batch: slice, heads: slice) -> _Group:
    """Prepare what all tiles of a group share."""
    dtype = accumulation_dtype(problem.q.dtype)
    k, v = problem.k[batch, heads].to(dtype), problem.v[batch, heads].to(dtype)
    masks = problem.masks
    mean = v.mean(2, keepdim=True) if masked(problem) else None
    if masks.key is not None:
        padding = ~masks.key[batch, None, :, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    pos_query = table.of_heads(heads).pos_query
    positioned = k[:, :, problem.position.prefix_length :]
    p2c = None if pos_query is None else (positioned * score_factor(problem.scale)) @ pos_query.mT
    return _Group(batch, heads, k, v, p2c, mean)


def _tile(problem: AttentionProblem, table: _Table, group: _Group, rows: range, first: int) -> _Tile:
    """Compute scores and probabilities of one tile; `first` is the index of sample 0 in the dropout counter."""
    q = problem.q[group.batch, group.heads, rows.start : rows.stop].to(group.k.dtype)
    query_mask = problem.masks.query
    if query_mask is not None:
        q = q.masked_fill(~query_mask[group.batch, None, rows.start : rows.stop, None], 0.0)
    factor = score_factor(problem.scale)
    scaled = q * factor
    score = scaled @ group.k.mT
    row = None
    pos_key = table.of_heads(group.heads).pos_key
    if pos_key is not None or group.p2c is not None:
        positioned = score[..., problem.position.prefix_length :]
        row = table.rows_of(rows, positioned.shape[-1])
        if pos_key is not None:
            positioned += (scaled @ pos_key.mT).gather(-1, row.expand(positioned.shape))
        if group.p2c is not None:
            positioned += group.p2c.gather(-1, row.mT.expand(positioned.mT.shape)).mT
    score *= problem.scale / factor
    _exclude(score, problem.masks, group, rows)
    peak = score.amax(-1, keepdim=True)
    peak = torch.where(torch.isneginf(peak), 0.0, peak)
    probability = score.sub_(peak).exp_()
    total = probability.sum(-1, keepdim=True)
    probability /= torch.where(total == 0, 1.0, total)
    return _Tile(q, probability, _kept(problem, group, rows, first), peak + total.log(), row)


def _exclude(score: Tensor, masks: Masks, group: _Group, rows: range) -> None:
    """Set the scores of forbidden pairs to -inf."""
    if masks.key is not None:
        score.masked_fill_(~masks.key[group.batch, None, None, :], float("-inf"))
    if masks.query is not None:
        score.masked_fill_(~masks.query[group.batch, None, rows.start : rows.stop, None], float("-inf"))
    if masks.pair is not None:
        heads = group.heads if masks.pair.shape[1] > 1 else slice(None)
        score.masked_fill_(~masks.pair[group.batch, heads, rows.start : rows.stop], float("-inf"))


def _kept(problem: AttentionProblem, group: _Group, rows: range, first: int) -> Tensor | None:
    """Return the factors of dropout for one tile."""
    if problem.dropout_p == 0:
        return None
    device = problem.q.device
    samples = torch.arange(first + group.batch.start, first + group.batch.stop, device=device)[:, None]
    batch_heads = samples * problem.q.shape[1] + torch.arange(group.heads.start, group.heads.stop, device=device)
    nk = problem.k.shape[2]
    kept = keep_mask(seed_of(problem), problem.dropout_p, batch_heads.flatten(), rows, range(nk))
    return kept.view(*batch_heads.shape, len(rows), nk).to(group.k.dtype) * keep_scale(problem.dropout_p)
