"""The error budget before the clock: a figure of a wrong answer is worth nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.candidates import CORES, Inputs, draw, ours, problem
from benchmarks.harness.work import GEOMETRY
from benchmarks.registry import Shape
from deberta_kernels.testing import budget, eager

__all__ = ["Check", "check_candidates", "worst"]

# Scores, in elements, the float64 oracle may have; longer shapes are checked on fewer heads.
ORACLE_SCORES = 16 << 20


@dataclass(frozen=True)
class Check:
    """The outcome for one candidate.

    Attributes:
        ok: every tensor is within the budget.
        text: the report, one line per tensor.
        worst: largest error over what is allowed, over all tensors; at most 1 when ok.
    """

    ok: bool
    text: str
    worst: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields; the text only when it explains a failure."""
        worst = round(self.worst, 4) if math.isfinite(self.worst) else None  # JSON has no infinity
        return {"ok": self.ok, "worst_of_allowed": worst, "text": "" if self.ok else self.text}


def check_candidates(
    shape: Shape, names: list[str], backend: str, device: str = "cpu", scores: int = ORACLE_SCORES
) -> dict[str, Check]:
    """Check those candidates of a shape that compute disentangled attention, on the inputs of seed 0.

    Every candidate computes all heads. The oracle computes as many as `scores` allows: first, last and some
    between; heads do not depend on each other.
    """
    inputs = draw(shape, device=device)
    count = min(GEOMETRY.heads, max(2, scores // (shape.batch * shape.length**2)))
    heads = torch.linspace(0, GEOMETRY.heads - 1, count).round().long().to(device)
    q, k, v, dout = (x[:, heads] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    chosen = Inputs(q, k, v, inputs.pos_key[heads], inputs.pos_query[heads], dout)
    truth = budget.truth(problem(chosen), chosen.dout if shape.backward else None)
    return {name: _check(name, inputs, heads, truth, backend) for name in names if name != "sdpa"}


def _check(name: str, inputs: Inputs, heads: Tensor, truth: budget.Truth, backend: str) -> Check:
    try:
        results = _results(name, inputs, backend, backward=truth.dout is not None)
    except Exception as error:  # a candidate that raises is red, and the others are still timed
        return Check(False, f"{name}: {type(error).__name__}: {error}", float("inf"))
    per_head = {key: x[heads] if x.dim() == 3 and key != "lse" else x[:, heads] for key, x in results.items()}
    if "lse" not in results:  # the cores of others return none
        truth = replace(truth, oracle={key: x for key, x in truth.oracle.items() if key != "lse"})
    report = budget.measure(per_head, truth, name)
    return Check(report.ok, str(report), worst(report))


def worst(report: budget.Report) -> float:
    """Return the largest error over what is allowed, over all tensors of a report."""
    return max(
        max(row.max_error / max(row.max_allowed, 1e-30), row.mean_error / max(row.mean_allowed, 1e-30))
        for row in report.rows
    )


def _results(name: str, inputs: Inputs, backend: str, *, backward: bool) -> dict[str, Tensor]:
    leaves = inputs.requiring_grad() if backward else inputs
    with torch.set_grad_enabled(backward):
        if name in CORES:
            results = {"out": CORES[name]([leaves])(0)}
        elif name == "eager":
            results = dict(zip(("out", "lse"), eager.attention(problem(leaves)), strict=True))
        else:
            call = ours(leaves, backend, prepare=name == "prepared", lse=True)
            results = dict(zip(("out", "lse"), call(), strict=True))
    if backward:
        gradients = torch.autograd.grad(results["out"], leaves.leaves, leaves.dout)
        results |= dict(zip(("dq", "dk", "dv", "dpos_key", "dpos_query"), gradients, strict=True))
    return {key: x.detach() for key, x in results.items()}
