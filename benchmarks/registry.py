"""Say what is measured: the shapes, and every figure with what it must reach and what it aims at."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "FIGURES",
    "GEOMETRY",
    "MODEL_LENGTHS",
    "Figure",
    "Geometry",
    "Shape",
    "find",
    "needed_flops",
    "needed_flops_of_model",
]


@dataclass(frozen=True)
class Geometry:
    """Hold the sizes of DeBERTa-v3-base, the model most people run.

    Attributes:
        heads: attention heads.
        dim: size of one head.
        position_buckets: log buckets on each side; the tables have 2 * position_buckets rows.
        max_relative_positions: distance, in tokens, at which the buckets saturate.
        layers: encoder layers.
        hidden: width of the hidden states.
        intermediate: width of the feed-forward layer.
    """

    heads: int = 12
    dim: int = 64
    position_buckets: int = 256
    max_relative_positions: int = 512
    layers: int = 12
    hidden: int = 768
    intermediate: int = 3072


GEOMETRY = Geometry()


@dataclass(frozen=True)
class Shape:
    """Name one timed problem; heads and head size are those of `GEOMETRY`.

    Attributes:
        batch: sequences.
        length: tokens of each sequence, queries and keys alike.
        dtype: "float32" or "bfloat16".
        backward: time forward and backward with all five gradients instead of the forward alone.
    """

    batch: int
    length: int
    dtype: str = "float32"
    backward: bool = False

    @property
    def label(self) -> str:
        """Return batch x length, as every table prints it."""
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Figure:
    """Hold one figure: two candidates of one shape, and the ratio of their times that is wanted.

    Attributes:
        group: name for `--only`.
        title: what is compared with what.
        shape: where.
        ours: candidate of ours, as `baselines` names it.
        other: candidate compared with; "" for a figure that compares with no candidate.
        must: bound that has to hold; None for a figure that is only shown.
        aim: bound worth reaching, or None.
        sense: "time" (ours / other, lower is better), "speed" (other / ours, higher is better) or
            "fraction" (needed FLOP/s over the kernel's own peak, higher is better).
    """

    group: str
    title: str
    shape: Shape
    ours: str
    other: str
    must: float | None
    aim: float | None
    sense: str

    def value(self, ours: float, other: float) -> float:
        """Turn two times, in the same unit, into the figure."""
        return ours / other if self.sense == "time" else other / ours


SDPA_SHAPES = ((1, 128), (8, 128), (1, 512), (8, 512), (1, 2048))
EAGER = {(1, 128): (8.0, 12.0), (8, 128): (6.0, 10.0), (1, 512): (5.0, 10.0), (1, 2048): (12.0, 16.0)}
BACKWARD = {(1, 512): (3.0, 5.0), (8, 128): (4.0, 6.0), (4, 512): (6.0, 8.0)}
MODEL_LENGTHS = {128: 1.9, 512: 1.6, 2048: 4.5}
PEAK = {"float32": (0.60, 0.75), "bfloat16": (0.50, 0.75)}


def _against_sdpa(batch: int, length: int) -> list[Figure]:
    short = length <= 128
    figures = []
    for ours in ("prepared", "bare"):
        if short:
            must, aim = (1.0, 0.85) if ours == "prepared" else (1.3, None)
        else:
            must, aim = 0.85, 0.65
        title = "core forward float32 / SDPA without bias"
        figures.append(Figure("sdpa32", title, Shape(batch, length), ours, "sdpa", must, aim, "time"))
        must = 0.65 if short and ours == "bare" else 0.5
        title = "core forward bfloat16 / SDPA bfloat16 without bias"
        figures.append(Figure("sdpa16", title, Shape(batch, length, "bfloat16"), ours, "sdpa", must, 0.37, "time"))
    return figures


def _against_eager() -> list[Figure]:
    figures = []
    for (batch, length), (must, aim) in EAGER.items():
        for ours in ("prepared", "bare"):
            title = "core forward float32, times faster than eager"
            figures.append(Figure("eager", title, Shape(batch, length), ours, "huggingface", must, aim, "speed"))
    for (batch, length), (must, aim) in BACKWARD.items():
        title = "core forward + backward float32, times faster than eager"
        shape = Shape(batch, length, backward=True)
        figures.append(Figure("backward", title, shape, "bare", "huggingface", must, aim, "speed"))
    for batch, length in BACKWARD:
        title = "core forward + backward bfloat16, times faster than eager bfloat16"
        shape = Shape(batch, length, "bfloat16", backward=True)
        figures.append(Figure("backward", title, shape, "bare", "huggingface", None, None, "speed"))
    return figures


def _against_peak() -> list[Figure]:
    figures = []
    for dtype, (must, aim) in PEAK.items():
        title = f"needed FLOPs / own GEMM peak, {dtype}"
        for batch, length in SDPA_SHAPES:
            shape = Shape(batch, length, dtype)
            figures.append(Figure("peak", title, shape, "prepared", "", must, aim, "fraction"))
    return figures


def _all_against_sdpa() -> list[Figure]:
    found = [figure for shape in SDPA_SHAPES for figure in _against_sdpa(*shape)]
    return sorted(found, key=lambda figure: (figure.group != "sdpa32", figure.ours != "prepared"))


FIGURES: tuple[Figure, ...] = (*_all_against_sdpa(), *_against_eager(), *_against_peak())


def find(shape: Shape, groups: frozenset[str]) -> list[Figure]:
    """Return the figures of one shape that belong to the groups given, in table order."""
    return [figure for figure in FIGURES if figure.shape == shape and figure.group in groups]


def needed_flops(shape: Shape) -> float:
    """Count the floating-point operations no forward can avoid; a multiply-add counts as two.

    2 * D * (Nq*Nk for q.k + Nq*Nk for p.v + the distinct (query, row) pairs c2p reaches + the distinct
    (key, row) pairs p2c reaches), per head. Repeated distances of one query to one row count once.
    """
    import torch

    from deberta_kernels.position import delta
    from deberta_kernels.types import PositionSpec

    n = shape.length
    spec = PositionSpec(GEOMETRY.position_buckets, GEOMETRY.max_relative_positions)
    rows = delta(torch.arange(-(n - 1), n), spec)
    # Query i sees the window of distances [i - (n - 1), i]; key j sees [-j, n - 1 - j], the same windows.
    pairs = sum(int(rows[start : start + n].unique().numel()) for start in range(n))
    return 2.0 * GEOMETRY.dim * (2 * n * n + 2 * pairs) * GEOMETRY.heads * shape.batch


def needed_flops_of_model(lengths: list[int]) -> float:
    """Count the floating-point operations of a whole model on the real tokens of a batch, as `needed_flops` does.

    Linear layers and attention; the position tables count as cached, and everything that is no product as free.

    Args:
        lengths: real tokens of each sample.
    """
    weights = 4 * GEOMETRY.hidden**2 + 2 * GEOMETRY.hidden * GEOMETRY.intermediate
    attention = sum(lengths.count(n) * needed_flops(Shape(1, n)) for n in set(lengths))
    return GEOMETRY.layers * (2.0 * weights * sum(lengths) + attention)
