"""The batches that whole models run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import ModelShape

__all__ = ["Batch", "draw_batches"]


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward.

    Attributes:
        input_ids: (B, N) int64.
        attention_mask: (B, N) int64; 1 = real token.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def first(self, samples: int, tokens: int | None = None) -> Batch:
        """Return the first samples alone, and the first tokens of them."""
        return Batch(self.input_ids[:samples, :tokens], self.attention_mask[:samples, :tokens])


def lengths(shape: ModelShape, generator: torch.Generator) -> list[int]:
    """Draw the real tokens of each sample: `fill` of the batch in all, the longest sample as long as the batch."""
    if shape.fill == 1.0:
        return [shape.length] * shape.batch
    total = round(shape.fill * shape.batch * shape.length)
    found = [1] * shape.batch
    found[0] = shape.length
    weights = torch.rand(shape.batch, generator=generator) + 0.2
    while (missing := total - sum(found)) > 0:
        open_ = torch.tensor([x < shape.length for x in found])
        index = int(torch.multinomial(weights * open_, 1, generator=generator))
        found[index] += min(missing, 4, shape.length - found[index])
    order = torch.randperm(shape.batch, generator=generator).tolist()
    return [found[index] for index in order]


def draw_batches(shape: ModelShape, vocabulary: int, count: int = 4) -> list[Batch]:
    """Draw the batches that calls rotate through; both dtypes of a size get the same ones.

    Args:
        shape: what to draw.
        vocabulary: ids are drawn from 1 to this, which is left out; padding has id 0.
        count: batches.
    """
    generator = torch.Generator().manual_seed(shape.batch * shape.length)
    batches = []
    for _ in range(count):
        mask = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
        for row, real in enumerate(lengths(shape, generator)):
            mask[row, :real] = 1
        ids = torch.randint(1, vocabulary, mask.shape, generator=generator)
        batches.append(Batch(ids * mask, mask))
    return batches
