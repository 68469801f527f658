"""The error budget: what Hugging Face's eager code loses in the same dtype sets what it may lose.

Inputs are drawn in the tested dtype and then upcast, so backend, eager and the float64 oracle see the same numbers.
With E the error against the oracle, and floor = f * max(1, max|oracle|), every tensor must satisfy

    max E  <= a * (max E_eager + floor)      bfloat16, float16: a = 2, f = 1e-5;  float32: a = 3, f = 1e-6
    mean E <= 1.1 * (mean E_eager + floor)

Where eager itself overflows, the yardstick is eager in float32, its results rounded to the dtype, with f = eps(dtype).

E_eager of one call is one draw of a random number: with large scores a single near-tie decides the largest error of
a small tensor, and eager with its features in another order, the same mathematics, differs from itself by up to ten
times. So a tensor over the limit gets a second look: E_eager then is the largest of eager and eager in `ORDERS` other
orders. A report says which tensors needed one (`Row.second_look`); tests bound how many may, since a backend that is
as accurate as eager needs it rarely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.impl import reference
from deberta_kernels.proof import eager
from deberta_kernels.types import AttentionProblem

__all__ = ["BudgetError", "Report", "Row", "Truth", "allowance", "check", "evaluate", "measure", "truth"]

Runner = Callable[[AttentionProblem], tuple[Tensor, Tensor]]

INPUTS = ("q", "k", "v", "pos_key", "pos_query")
MEAN_FACTOR = 1.1
ORDERS = 8
# dtype: (a, f) of the formula above.
LIMITS = {
    torch.bfloat16: (2.0, 1e-5),
    torch.float16: (2.0, 1e-5),
    torch.float32: (3.0, 1e-6),
    torch.float64: (3.0, 1e-14),
}


def allowance(
    dtype: torch.dtype, error: float, largest: float = 1.0, *, mean: bool = False, relative: float | None = None
) -> float:
    """Return the error that the budget allows, by the formula above.

    Args:
        dtype: tested; decides a and f.
        error: of eager, against float64: the largest, or with `mean` the mean one.
        largest: max|oracle|; 1 for errors that are relative already.
        mean: apply the rule of the mean error.
        relative: f, where it is not that of the dtype.
    """
    factor, usual = LIMITS[dtype]
    floor = (usual if relative is None else relative) * max(1.0, largest)
    return (MEAN_FACTOR if mean else factor) * (error + floor)


class BudgetError(AssertionError):
    """Tensors of a backend are worse than the budget allows; the message is the report."""


@dataclass(frozen=True)
class Row:
    """The errors of one tensor against the float64 oracle.

    Attributes:
        name: "out", "lse" or the gradient.
        max_error: largest absolute error; inf when a value is not finite, or -inf in the wrong place.
        max_allowed: what the budget allows.
        mean_error: mean absolute error.
        mean_allowed: what the budget allows.
        eager_max: largest absolute error of the yardstick.
        problem: what else is wrong (dtype, shape), or "".
        second_look: the yardstick is the largest over several orders of summation, for it was exceeded otherwise.
    """

    name: str
    max_error: float
    max_allowed: float
    mean_error: float
    mean_allowed: float
    eager_max: float
    problem: str = ""
    second_look: bool = False

    @property
    def ok(self) -> bool:
        """Whether this tensor is within the budget."""
        within = self.max_error <= self.max_allowed and self.mean_error <= self.mean_allowed
        return within and not self.problem

    def __str__(self) -> str:
        line = (
            f"{self.name:<10} max {self.max_error:9.3e} of {self.max_allowed:9.3e}   "
            f"mean {self.mean_error:9.3e} of {self.mean_allowed:9.3e}   eager max {self.eager_max:9.3e}"
        )
        line += f" in {ORDERS + 1} orders" if self.second_look else ""
        return line + ("" if self.ok else f"   <- {self.problem or 'OVER BUDGET'}")


@dataclass(frozen=True)
class Report:
    """The errors of one call, one row per tensor; `str()` is a table."""

    label: str
    rows: tuple[Row, ...]
    yardstick: str

    @property
    def ok(self) -> bool:
        """Whether every tensor is within the budget."""
        return all(row.ok for row in self.rows)

    @property
    def second_look(self) -> bool:
        """Whether some tensor was over the limit that eager's own order of summation sets."""
        return any(row.second_look for row in self.rows)

    def __str__(self) -> str:
        head = f"{self.label or 'error against float64'} (yardstick: {self.yardstick})"
        return "\n  ".join([head, *map(str, self.rows)])


@dataclass(frozen=True)
class Truth:
    """What one problem is measured against: computed once, used for every backend.

    Attributes:
        problem: the call, in the tested dtype.
        dout: upstream gradient of out, dtype of q, or None to measure the forward alone.
        dlse: upstream gradient of lse, or None.
        oracle: the float64 results by name.
        yardstick: the results by name whose errors set the budget.
        overflowed: eager in the tested dtype was not finite, so the yardstick is eager in float32.
    """

    problem: AttentionProblem
    dout: Tensor | None
    dlse: Tensor | None
    oracle: dict[str, Tensor]
    yardstick: dict[str, Tensor]
    overflowed: bool

    @cached_property
    def errors(self) -> dict[str, tuple[float, float]]:
        """Largest and mean error of the yardstick by name."""
        return {name: _errors(self.yardstick[name], value) for name, value in self.oracle.items()}

    @cached_property
    def errors_of_all_orders(self) -> dict[str, tuple[float, float]]:
        """The largest of `errors` over the yardstick's own order of summation and `ORDERS` others."""
        found = dict(self.errors)
        generator = torch.Generator().manual_seed(0)
        for _ in range(ORDERS):
            order = torch.randperm(self.problem.q.shape[-1], generator=generator).to(self.problem.q.device)
            for name, value in _reordered(self, order).items():
                if name not in self.oracle:  # taken out by a caller whose code does not return it
                    continue
                errors = _errors(value, self.oracle[name])
                # An order in which eager overflows says nothing.
                if errors[0] < float("inf"):
                    found[name] = (max(found[name][0], errors[0]), max(found[name][1], errors[1]))
        return found


def evaluate(
    run: Runner, problem: AttentionProblem, dout: Tensor | None = None, dlse: Tensor | None = None
) -> dict[str, Tensor]:
    """Run a problem forward, and backward when an upstream gradient is given.

    Args:
        run: problem -> (out, lse), differentiable.
        problem: strides of its tensors are kept.
        dout: upstream gradient of out, passed on as it is, strides included.
        dlse: upstream gradient of lse.

    Returns:
        the results by name: out, lse, and dq, dk, dv, dpos_key, dpos_query for the inputs there are.
    """
    leaves = {name: getattr(problem, name) for name in INPUTS if getattr(problem, name) is not None}
    leaves = {name: x.detach().requires_grad_(dout is not None or dlse is not None) for name, x in leaves.items()}
    out, lse = run(replace(problem, **leaves))
    results = {"out": out.detach(), "lse": lse.detach()}
    outputs = [(y, dy) for y, dy in ((out, dout), (lse, dlse)) if dy is not None]
    if outputs:
        gradients = torch.autograd.grad(
            [y for y, _ in outputs], list(leaves.values()), [dy for _, dy in outputs], allow_unused=True
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients):
            results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def truth(
    problem: AttentionProblem,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    float32_yardstick: bool = False,
) -> Truth:
    """Compute the oracle and the yardstick of a problem.

    Args:
        problem: the call, in the tested dtype.
        dout: upstream gradient of out; None measures the forward alone.
        dlse: upstream gradient of lse.
        float32_yardstick: use eager in float32 even where eager in the tested dtype is finite, for the cases in which
            it is finite and wrong.

    Raises:
        ValueError: a true result does not fit the tested dtype.
    """
    oracle = evaluate(reference.attention, _cast(problem, torch.float64), *_cast_all(torch.float64, dout, dlse))
    limit = torch.finfo(problem.q.dtype).max
    for name, value in oracle.items():
        if name != "lse" and value.numel() and not bool(value.abs().max() <= limit):
            raise ValueError(f"{name} of this problem does not fit {problem.q.dtype}; use smaller inputs.")
    if not float32_yardstick:
        yardstick = evaluate(eager.attention, problem, dout, dlse)
        if all(_finite_alike(yardstick[name], oracle[name]) for name in oracle):
            return Truth(problem, dout, dlse, oracle, yardstick, False)
    return Truth(problem, dout, dlse, oracle, _rounded_float32(problem, dout, dlse), True)


def measure(results: dict[str, Tensor], against: Truth, label: str = "") -> Report:
    """Compare results with the truth; never raises on a large error."""
    rows = []
    for name in against.oracle:
        row = _row(name, results.get(name), against, against.errors[name])
        if not row.ok and not row.problem:
            row = replace(_row(name, results[name], against, against.errors_of_all_orders[name]), second_look=True)
        rows.append(row)
    source = "eager in float32" if against.overflowed else f"eager in {dtypes.name(against.problem.q.dtype)}"
    return Report(label, tuple(rows), source)


def check(
    run: Runner,
    problem: AttentionProblem,
    dout: Tensor | None = None,
    *,
    dlse: Tensor | None = None,
    against: Truth | None = None,
    label: str = "",
) -> Report:
    """Run a problem and compare every tensor with the budget.

    Args:
        run: problem -> (out, lse), differentiable when dout or dlse is given.
        problem: the call.
        dout: upstream gradient of out; None checks the forward alone.
        dlse: upstream gradient of lse.
        against: the `truth` of exactly these arguments, if it is at hand.
        label: first line of the report.

    Returns:
        the report, all of it within the budget.

    Raises:
        BudgetError: some tensor is not; the message is the report.
    """
    known = truth(problem, dout, dlse) if against is None else against
    report = measure(evaluate(run, known.problem, known.dout, known.dlse), known, label)
    if not report.ok:
        raise BudgetError(str(report))
    return report


def _row(name: str, result: Tensor | None, against: Truth, eager_errors: tuple[float, float]) -> Row:
    oracle = against.oracle[name]
    dtype = against.problem.q.dtype
    expected_dtype = (torch.float64 if dtype == torch.float64 else torch.float32) if name == "lse" else dtype
    wrong = ""
    if result is None:
        wrong = "missing"
    elif result.shape != oracle.shape:
        wrong = f"shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    elif result.dtype != expected_dtype:
        wrong = f"dtype {result.dtype}, expected {expected_dtype}"
    if result is None or result.shape != oracle.shape:
        return Row(name, float("inf"), 0.0, float("inf"), 0.0, 0.0, wrong)
    relative = None
    if against.overflowed:
        # lse is never rounded to the dtype, so its floor stays that of float32.
        relative = LIMITS[torch.float32][1] if name == "lse" else torch.finfo(dtype).eps
    finite = oracle[oracle.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    worst, mean = _errors(result, oracle)
    eager_worst, eager_mean = eager_errors
    if worst == float("inf") and not wrong:
        wrong = f"{int((result.isfinite() != oracle.isfinite()).sum())} values not finite, or finite by mistake"
    max_allowed = allowance(dtype, eager_worst, largest, relative=relative)
    mean_allowed = allowance(dtype, eager_mean, largest, relative=relative, mean=True)
    return Row(name, worst, max_allowed, mean, mean_allowed, eager_worst, wrong)


def _errors(result: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Return the largest and the mean absolute error; inf when they differ in which values are finite."""
    if not _finite_alike(result, oracle):
        return float("inf"), float("inf")
    error = (result.double() - oracle.double())[oracle.isfinite()].abs()
    return (float(error.max()), float(error.mean())) if error.numel() else (0.0, 0.0)


def _finite_alike(result: Tensor, oracle: Tensor) -> bool:
    special = ~oracle.isfinite()
    return bool((result.isfinite() != special).all()) and bool((result[special].double() == oracle[special]).all())


def _rounded_float32(problem: AttentionProblem, dout: Tensor | None, dlse: Tensor | None) -> dict[str, Tensor]:
    """Return what eager gives in float32, rounded to the dtype of the problem."""
    exact = evaluate(eager.attention, _cast(problem, torch.float32), *_cast_all(torch.float32, dout, dlse))
    return {name: x if name == "lse" else x.to(problem.q.dtype) for name, x in exact.items()}


def _reordered(against: Truth, order: Tensor) -> dict[str, Tensor]:
    """Return the yardstick computed with the features of every tensor in another order, put back afterwards."""
    tensors = {name: getattr(against.problem, name) for name in INPUTS}
    moved: dict[str, Any] = {name: None if x is None else x[..., order] for name, x in tensors.items()}
    problem = replace(against.problem, **moved)
    dout = None if against.dout is None else against.dout[..., order]
    if against.overflowed:
        results = _rounded_float32(problem, dout, against.dlse)
    else:
        results = evaluate(eager.attention, problem, dout, against.dlse)
    back = order.argsort()
    return {name: x if name == "lse" else x[..., back] for name, x in results.items()}


def _cast(problem: AttentionProblem, dtype: torch.dtype) -> AttentionProblem:
    tensors = {name: getattr(problem, name) for name in INPUTS}
    cast: dict[str, Any] = {name: None if x is None else x.detach().to(dtype) for name, x in tensors.items()}
    return replace(problem, prepared=None, **cast)


def _cast_all(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(dtype) for x in tensors)
