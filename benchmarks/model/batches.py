"""Say on which batches whole models are measured, and what every figure must reach and aims at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Figure, Shape

__all__ = ["BETTER_RUNTIME", "MODEL_FIGURES", "MODEL_SHAPES", "Batch", "ModelShape", "draw_batches"]

RAGGED_FILL = 0.6
# Stands for the faster one of ONNX Runtime and OpenVINO, medians and minima chosen apart.
BETTER_RUNTIME = "better runtime"


@dataclass(frozen=True)
class ModelShape(Shape):
    """Name one timed batch of a whole model.

    Attributes:
        fill: real tokens over batch * length; the rest is padding on the right.
    """

    fill: float = 1.0

    @property
    def label(self) -> str:
        """Return batch x length, and the fill where there is padding."""
        full = f"{self.batch}x{self.length}"
        return full if self.fill == 1.0 else f"{full} {self.fill:.0%} full"


@dataclass(frozen=True)
class Batch:
    """Hold the inputs of one forward.

    Attributes:
        input_ids: (B, N) int64.
        attention_mask: (B, N) int64; 1 = real token.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def first(self, samples: int) -> Batch:
        """Return the first samples alone."""
        return Batch(self.input_ids[:samples], self.attention_mask[:samples])


SIZES = ((1, 32), (1, 128), (1, 512), (1, 2048), (8, 128), (8, 512))
RAGGED = (8, 128)
# (batch, length): (must, aim); a size without an entry is measured all the same and has no bound.
EAGER = {
    "float32": {(1, 128): (3.6, 5.0), (1, 512): (3.0, 4.0), (1, 2048): (7.5, 9.0)},
    "bfloat16": {(1, 128): (2.0, 3.0), (1, 512): (2.0, 3.0), (8, 512): (4.0, 5.0)},
}
EAGER_RAGGED = {"float32": (3.5, 5.0), "bfloat16": (2.9, 4.0)}
RUNTIME, RUNTIME_RAGGED = (1.0, 1.3), (1.5, 2.0)
BERT = (1.0, 0.7)
NO_BOUND = (None, None)


def _shapes() -> tuple[ModelShape, ...]:
    found = []
    for dtype in EAGER:
        found += [ModelShape(batch, length, dtype) for batch, length in SIZES]
        found.append(ModelShape(*RAGGED, dtype, fill=RAGGED_FILL))
    return tuple(found)


MODEL_SHAPES = _shapes()


def _figures() -> tuple[Figure, ...]:
    found = []
    for shape in MODEL_SHAPES:
        ragged, size, dtype = shape.fill < 1.0, (shape.batch, shape.length), shape.dtype
        eager = EAGER_RAGGED[dtype] if ragged else EAGER[dtype].get(size, NO_BOUND)
        # The bounds against the runtimes are for float32; only one of them computes in bfloat16.
        runtime = (RUNTIME_RAGGED if ragged else RUNTIME) if dtype == "float32" else NO_BOUND
        rows = [
            ("times faster than eager", "eager", eager, "speed"),
            ("times faster than the better of ONNX Runtime and OpenVINO", BETTER_RUNTIME, runtime, "speed"),
            ("time / time of BERT with SDPA", "bert", BERT, "time"),
        ]
        if ragged:
            rows.append(("times faster than with unpad=False", "padded", NO_BOUND, "speed"))
        for title, other, (must, aim), sense in rows:
            found.append(Figure(dtype, f"{title}, {dtype}", shape, "patched", other, must, aim, sense))
    titles = list(dict.fromkeys(figure.title for figure in found))
    return tuple(sorted(found, key=lambda figure: titles.index(figure.title)))


MODEL_FIGURES = _figures()


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
