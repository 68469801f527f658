"""The real tokens of a padded batch one after the other, and laid out again as they were.

The rows of a packed tensor are the real tokens, sample by sample, and then one row for each sample that has padding:
all padding of a sample enters the encoder as zeros and meets the same mean of the values, so one row can stand for all
of it, in every layer. Only the draws of dropout would differ from one padded row to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.torch_state.modes import is_mapped

__all__ = ["Packing", "find_packing"]


class Packing:
    """The place in the padded batch of each row of a packed tensor.

    Not a dataclass on purpose, as `EncoderMask`.

    Attributes:
        shape: (B, N) of the padded batch.
        tokens: number of real tokens T; rows of a packed tensor = T + number of samples with padding.
        longest: real tokens of the longest sample.
        contiguous: the real tokens of every sample are neighbours, so that distances between them are as in the
            padded batch; False with holes in the mask.
        cu_seqlens: (B + 1,) int32, where each sample's tokens begin.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        counts: list[int],
        contiguous: bool,
        cu_seqlens: Tensor,
        source: Tensor,
        row_of: Tensor,
        sample: Tensor,
    ) -> None:
        self.shape = shape
        self.tokens = sum(counts)
        self.longest = max(counts)
        self.contiguous = contiguous
        self.cu_seqlens = cu_seqlens
        self._counts = counts
        self._source = source  # (rows,) position in the flattened batch that each row is read from
        self._row_of = row_of  # (B * N,) row that each position of the flattened batch is read from
        self._sample = sample  # (rows,) sample that each row belongs to
        real = cu_seqlens.diff().to(torch.int64).index_select(0, sample[self.tokens :])
        self._paddings = shape[1] - real  # (rows - T,) positions a row stands for
        self._padding: Tensor | None = None

    def to(self, device: Any) -> Packing:
        """Return this packing on another device."""
        moved = (x.to(device) for x in (self.cu_seqlens, self._source, self._row_of, self._sample))
        return Packing(self.shape, self._counts, self.contiguous, *moved)

    def pack(self, padded: Tensor) -> Tensor:
        """Return the rows of a (B, N, C) tensor as (1, rows, C)."""
        return _rows(_flat(padded), self._source, (1, self._source.shape[0]))

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the (B, N, C) tensor that (1, rows, C) rows stand for."""
        return _rows(packed[0], self._row_of, self.shape)

    def padding(self) -> Tensor:
        """Return the (padded positions,) int64 places of padding in the flattened batch, sample by sample."""
        if self._padding is None:
            self._padding = self._row_of.argsort(stable=True)[self.tokens :]  # which waits for no device
        return self._padding

    def row_of_padding(self) -> Tensor:
        """Return the (padded positions,) int64 row that stands for each of `padding`."""
        return self._row_of.index_select(0, self.padding())

    def sum_padding(self, padded: Tensor) -> Tensor:
        """Return (1, rows, C) from (B, N, C): each row the sum of all that it stands for."""
        sums = self.sum_of_padding(_exact(_flat(padded).index_select(0, self.padding())))
        real = self.pack(padded)[:, : self.tokens]
        return torch.cat([real, sums.to(padded.dtype).unsqueeze(0)], dim=1)

    def sum_of_padding(self, values: Tensor) -> Tensor:
        """Return (rows - T, C) from (padded positions, C), in the order of `padding`: the sum of each sample."""
        return _sum_runs(values, self._paddings, self.row_of_padding() - self.tokens)

    def divide_padding(self, packed: Tensor) -> Tensor:
        """Return (1, rows, C) with the rows of padding divided by how many positions they stand for."""
        shares = packed[:, self.tokens :] / self._paddings[:, None]
        return torch.cat([packed[:, : self.tokens], shares.to(packed.dtype)], dim=1)

    def padding_context(self, values: Tensor) -> Tensor:
        """Return what the padded rows attend to by the padded-row rule.

        Args:
            values: (1, rows, C).

        Returns:
            (1, rows - T, C), dtype of values.
        """
        length = self.shape[1]
        exact = _exact(values[0])
        sums = _sum_runs(exact[: self.tokens], self.cu_seqlens.diff(), self._sample[: self.tokens])
        total = sums.index_select(0, self._sample[self.tokens :]) + self._paddings[:, None] * exact[self.tokens :]
        return (total / length).to(values.dtype).unsqueeze(0)


class _SumRuns(torch.autograd.Function):
    """Sums of rows that follow each other: `index_add` adds in any order on a GPU, and so does its counterpart."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, lengths: Tensor, run: Tensor) -> Tensor:
        ctx.save_for_backward(run)
        return torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def _sum_runs(rows: Tensor, lengths: Tensor, run: Tensor) -> Tensor:
    """Return (runs, C), the sums of runs of neighbouring rows of (rows, C).

    Args:
        rows: what is added.
        lengths: (runs,) rows of each run.
        run: (rows,) int64, the run that each row is in.
    """
    if is_mapped(rows):
        return rows.new_zeros(lengths.shape[0], rows.shape[1]).index_add(0, run, rows)
    return _SumRuns.apply(rows, lengths, run)  # type: ignore[no-any-return]


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _flat(padded: Tensor) -> Tensor:
    batch, length, channels = padded.shape
    return padded.reshape(batch * length, channels)


def _rows(source: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return rows of a (rows, C) tensor as (*shape, C), no view of another tensor where that is possible.

    Users may change what they are returned in place, which autograd forbids for views that a Function returns.
    """
    index = index.to(source.device)
    if (torch.is_grad_enabled() and source.requires_grad) or is_mapped(source):
        return source.index_select(0, index).view(*shape, source.shape[-1])
    out = source.new_empty(*shape, source.shape[-1])
    torch.index_select(source, 0, index, out=out.view(-1, source.shape[-1]))
    return out


def find_packing(keep: Tensor, hidden_states: Tensor, fullest: float) -> Packing | None:
    """Find the packing of a batch; None where it would not pay, or where one row cannot stand for all padding.

    Waits for the device once: what is known to the host then is computed there anew, for a copy would be a wait too.

    Args:
        keep: (B, N) bool; True = real token.
        hidden_states: (B, N, C), what enters the first layer.
        fullest: share of real tokens above which the batch is left padded.
    """
    batch, length = keep.shape
    runs = keep[:, 0] + (keep[:, 1:] > keep[:, :-1]).sum(1)  # of real tokens
    strays = ((hidden_states.detach().abs().amax(-1) != 0) > keep).sum(1)  # padding that is not zero
    real = keep.sum(1)
    counts, runs_of_samples, strays_of_samples = torch.stack([real, runs, strays]).tolist()
    tokens = sum(counts)
    if tokens in (0, batch * length) or tokens > fullest * batch * length or any(strays_of_samples):
        return None
    rows = tokens + sum(count < length for count in counts)
    row_of_padding = tokens - 1 + (real < length).cumsum(0)  # of no meaning where a sample has none
    positions = torch.arange(batch * length, device=keep.device)
    row_of = row_of_padding[:, None].expand(batch, length)
    row_of = row_of.masked_scatter(keep, positions).flatten()  # real tokens get 0, 1, ... in their order
    source = torch.full((rows,), batch * length, device=keep.device).scatter_reduce_(0, row_of, positions, "amin")
    cu_seqlens = nn.functional.pad(real.cumsum(0), (1, 0)).to(torch.int32)
    return Packing((batch, length), counts, max(runs_of_samples) <= 1, cu_seqlens, source, row_of, source // length)
