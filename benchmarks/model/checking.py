"""The tolerance of whole models, which comes from eager's own error, and what is held to it before it is timed.

E_eager is the largest error of Hugging Face's eager model, in the dtype of the shape, against the same model in float64
with the float32 weights. With a and f of `deberta_kernels.proof.budget`, on the rows of real tokens,

    max |x - float64| <= bound = a * (E_eager + f * max(1, max|float64|))
    max |x - eager|   <= bound * (a + 1) / a

The first is checked on as many samples as float64 has time for, the second on all. Where float64 has no time at all,
the bound found on shorter batches of the same dtype has to do.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.checking import Check
from benchmarks.model.batches import Batch
from benchmarks.model.rivals import Call
from benchmarks.registry import ModelShape
from deberta_kernels.testing import budget

__all__ = ["Tolerance", "Truth", "check", "check_call", "largest_difference", "tolerance", "truths"]

# Scores of one layer and head, in elements, the float64 model may have: one sample of 512 tokens, four of 128.
ORACLE_SCORES = 1 << 18
MOST_SAMPLES = 4


@dataclass(frozen=True)
class Truth:
    """The float64 result of the first samples of a batch.

    Attributes:
        hidden: (samples, N, C) float64.
    """

    hidden: Tensor


@dataclass(frozen=True)
class Tolerance:
    """What one shape allows.

    Attributes:
        eager_error: largest error of eager against float64.
        bound: allowed against float64.
        between: allowed between a candidate and eager.
        measured: False when both were found on shorter batches.
    """

    eager_error: float
    bound: float
    between: float
    measured: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the fields."""
        return dict(self.__dict__)


def truths(plain: Any, batches: dict[ModelShape, Batch]) -> dict[ModelShape, Truth]:
    """Run those batches in float64 for which there is time; equal batches of two dtypes run once."""
    exact = copy.deepcopy(plain).double()
    found: dict[ModelShape, Truth] = {}
    known: dict[tuple[int, int, float], Truth] = {}
    for shape, batch in batches.items():
        samples = min(shape.batch, MOST_SAMPLES, ORACLE_SCORES // shape.length**2)
        if samples == 0:
            continue
        key = (shape.batch, shape.length, shape.fill)
        if key not in known:
            part = batch.first(samples)
            with torch.no_grad():
                known[key] = Truth(exact(input_ids=part.input_ids, attention_mask=part.attention_mask)[0])
        found[shape] = known[key]
    return found


def tolerance(
    shape: ModelShape, batch: Batch, eager: Tensor, truth: Truth | None, shorter: list[Tolerance]
) -> Tolerance:
    """Return what the shape allows.

    Args:
        shape: decides the factor, by its dtype.
        batch: what was run.
        eager: (B, N, C) of the eager model.
        truth: float64, or None.
        shorter: tolerances of other shapes in the same dtype, for use without a truth.

    Raises:
        ValueError: neither a truth nor a shorter shape.
    """
    dtype = getattr(torch, shape.dtype)
    if truth is None:
        measured = [x for x in shorter if x.measured]
        if not measured:
            raise ValueError(f"{shape.label} {shape.dtype} is too long for float64; measure a shorter one before it.")
        widest = max(measured, key=lambda x: x.bound)
        return Tolerance(widest.eager_error, widest.bound, widest.between, measured=False)
    error = largest_difference(eager, truth.hidden, batch.attention_mask)
    bound = budget.allowance(dtype, error, float(truth.hidden.abs().max()))
    # A candidate may be `bound` from the truth, and eager that over the factor, on the other side.
    factor = budget.LIMITS[dtype][0]
    return Tolerance(error, bound, bound * (factor + 1) / factor)


def largest_difference(got: Tensor, expected: Tensor, attention_mask: Tensor) -> float:
    """Return the largest |got - expected| over real tokens of the samples that `expected` has; NaN if there is one.

    Args:
        got: (B, N, C).
        expected: (B or fewer, N, C).
        attention_mask: (B, N); 1 = real token.
    """
    samples = expected.shape[0]
    real = attention_mask[:samples].bool()
    return float((got[:samples][real].double() - expected[real].double()).abs().max())


def check(got: Tensor, eager: Tensor, batch: Batch, truth: Truth | None, allowed: Tolerance) -> Check:
    """Check the result of one candidate."""
    if got.shape != eager.shape:
        return Check(False, f"shape {tuple(got.shape)}, expected {tuple(eager.shape)}", float("inf"))
    pairs = [("eager", largest_difference(got, eager, batch.attention_mask), allowed.between)]
    if truth is not None:
        pairs.append(("float64", largest_difference(got, truth.hidden, batch.attention_mask), allowed.bound))
    text = "; ".join(f"largest difference from {name} {error:.3e}, allowed {most:.3e}" for name, error, most in pairs)
    ok = all(error <= most for _, error, most in pairs)  # False for NaN
    return Check(ok, text, max(error / most for _, error, most in pairs))


def check_call(call: Call, eager: Tensor, batch: Batch, truth: Truth | None, allowed: Tolerance) -> Check:
    """Run and check one candidate; one that raises has failed."""
    try:
        got = call(batch)
    except Exception as error:  # the others are still timed
        return Check(False, f"{type(error).__name__}: {error}", float("inf"))
    return check(got, eager, batch, truth, allowed)
