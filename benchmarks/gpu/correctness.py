"""Checks of the kernels on the device: error budget, determinism, dropout under graphs, offsets beyond 2**31."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.candidates import Inputs, draw, ours
from benchmarks.core.candidates import problem as problem_of
from benchmarks.core.checking import worst
from benchmarks.gpu.cases import asked, cases, has_own_backward, is_for, long_cases
from benchmarks.gpu.device import captured, free_memory
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import Item
from benchmarks.harness import proving
from benchmarks.harness.work import GEOMETRY
from benchmarks.registry import Shape
from deberta_kernels import dispatch
from deberta_kernels.backends import REGISTRY
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem

__all__ = ["items"]

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def items(plan: Plan) -> list[Item]:
    """Return every check, the most telling first."""
    found = [Item(case.id, lambda case=case: _check(plan, case)) for case in cases(plan) if is_for(plan.backend, case)]
    special = [
        Item("deterministic gradients", lambda: _deterministic(plan)),
        Item("dropout: seeds, and the same mask again", lambda: _dropout_seeds(plan)),
        Item("unwritten memory is never read", lambda: _poisoned(plan)),
    ]
    if not plan.small:
        special.append(Item("graph: replays equal eager", lambda: _graph_forward(plan)))
        special.append(Item("graph: dropout differs by replay, backward agrees", lambda: _graph_dropout(plan)))
        special += [
            Item(proving.NAMED + name, lambda name=name: proving.measured(name, plan.device, name == plan.backend))
            for name in proving.DEPENDS_ON
            if name in (plan.backend, "cuda")
        ]
    found[6:6] = special  # after every dtype, short and long
    for backend in asked(plan)[1:]:
        other = replace(plan, backend=backend)
        theirs = [
            Item(f"{backend} {case.id}", lambda case=case, other=other: _check(other, case))
            for case in cases(plan)
            if is_for(backend, case)
        ]
        # The first of each kind beside those of the first backend: a run may be stopped by its time limit.
        found[6:6] = theirs[:4]
        found += [
            Item(f"{backend} deterministic gradients", lambda other=other: _deterministic(other)),
            Item(f"{backend} unwritten memory is never read", lambda other=other: _poisoned(other)),
            *theirs[4:],
        ]
    long = [case for case in long_cases(plan) if is_for(plan.backend, case)]
    found += [Item(f"long {case.id}", lambda case=case: _check(plan, case)) for case in long]
    if not (plan.small or plan.smoke):
        found.append(Item("more than 2**31 scores", lambda: _many_scores(plan)))
        found.append(Item("offsets beyond 2**31 elements", lambda: _large_offsets(plan)))
    return found


def _target(plan: Plan) -> Target:
    return Target(plan.backend, plan.backend, ALL_DTYPES, device=plan.device)


def _check(plan: Plan, case: Case) -> dict[str, Any]:
    problem = inputs.problem(case, plan.device)
    elsewhere = _gradients_elsewhere(plan, case, problem)
    if elsewhere and has_own_backward(plan.backend, case):
        return {"ok": False, "text": f"its own backward did not run: {elsewhere}"}
    against = budget.truth(problem, inputs.dout(case, problem))
    torch.manual_seed(case.seed)
    report = budget.measure(
        budget.evaluate(_target(plan).run, against.problem, against.dout), against, f"{plan.backend} {case.id}"
    )
    free_memory(plan.device)
    return {**_kept(report), "backend": plan.backend, **({"gradients": elsewhere} if elsewhere else {})}


def _gradients_elsewhere(plan: Plan, case: Case, problem: AttentionProblem) -> str:
    """Return which other backend computes the gradients of a case, and why; "" when they are the backend's own."""
    if REGISTRY[plan.backend].gradients is None:
        return ""
    explained = dispatch.explain(replace(problem, q=problem.q.detach().requires_grad_()), plan.backend)
    return explained.gradients or ""


def _kept(report: budget.Report) -> dict[str, Any]:
    largest = worst(report)
    return {
        "ok": report.ok,
        "worst_of_allowed": round(largest, 4) if math.isfinite(largest) else None,
        "second_look": report.second_look,
        "text": "" if report.ok else str(report),
    }


@contextmanager
def _deterministically() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _deterministic(plan: Plan) -> dict[str, Any]:
    wrong = []
    for case in (Case(nq=700, heads=4, dtype=torch.bfloat16), Case(batch=6, nq=200, dtype=torch.float16, packed=True)):
        problem = inputs.problem(case, plan.device)
        dout = inputs.dout(case, problem)
        with _deterministically():
            first = budget.evaluate(_target(plan).run, problem, dout)
            for _ in range(5):
                again = budget.evaluate(_target(plan).run, problem, dout)
                wrong += [f"{case.id}: {name}" for name in first if not torch.equal(first[name], again[name])]
    return {"ok": not wrong, "text": f"not bit-equal: {sorted(set(wrong))}" if wrong else ""}


def _seeded(run: Callable[[AttentionProblem], tuple[Tensor, Tensor]], problem: AttentionProblem, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return run(problem)[0]


def _dropout_seeds(plan: Plan) -> dict[str, Any]:
    case = Case(nq=300, dtype=torch.bfloat16, dropout_p=0.2)
    problem, run = inputs.problem(case, plan.device), _target(plan).run
    first, again, other = (_seeded(run, problem, seed) for seed in (1, 1, 2))
    wrong = []
    if not torch.equal(first, again):
        wrong.append("the same seed gives another mask")
    if torch.equal(first, other):
        wrong.append("another seed gives the same mask")
    return {"ok": not wrong, "text": "; ".join(wrong)}


def _poisoned(plan: Plan) -> dict[str, Any]:
    """Run on memory full of NaN: the allocator hands freed blocks on, so whatever a kernel forgets to write shows."""
    wrong = []
    for case in (
        Case(nq=201, dtype=torch.bfloat16, mask="holes"),
        Case(batch=3, nq=150, dtype=torch.float16, packed=True),
    ):
        problem = inputs.problem(case, plan.device)
        dout = inputs.dout(case, problem)
        blocks = [torch.full((1 << n,), float("nan"), device=plan.device) for n in range(8, 22) for _ in range(8)]
        del blocks
        results = budget.evaluate(_target(plan).run, problem, dout)
        wrong += [f"{case.id}: {name}" for name, x in results.items() if name != "lse" and not bool(x.isfinite().all())]
    return {"ok": not wrong, "text": f"not finite: {wrong}" if wrong else ""}


def _graph_forward(plan: Plan) -> dict[str, Any]:
    shape = Shape(2, 333, plan.dtype)
    fixed, other = draw(shape, 0, plan.device), draw(shape, 1, plan.device)
    call = ours(fixed, plan.backend, prepare=False)
    with torch.no_grad():
        expected = [ours(x, plan.backend, prepare=False)().clone() for x in (fixed, other)]
        graph, out = captured(call)
        found = []
        for source in (fixed, other):
            for to, of in zip(fixed.leaves, [x.clone() for x in source.leaves], strict=True):
                to.copy_(of)
            graph.replay()
            found.append(out.clone())
    equal = [torch.equal(a, b) for a, b in zip(expected, found, strict=True)]
    return {"ok": all(equal), "text": "" if all(equal) else f"replay equals eager: {equal}"}


def _graph_dropout(plan: Plan) -> dict[str, Any]:
    """Capture forward and backward with dropout, and hold each replay to itself.

    The output is linear in v, so with the mask of the same replay sum(out * dout) = sum(dv * v), which another mask
    in the backward would break by far more than rounding.
    """
    case = Case(nq=300, dtype=torch.float32, dropout_p=0.3)
    problem = inputs.problem(case, plan.device)
    dout, run = inputs.dout(case, problem), _target(plan).run
    graph, results = captured(lambda: budget.evaluate(run, problem, dout))
    outs, gaps = [], []
    for _ in range(4):
        graph.replay()
        torch.cuda.synchronize()
        outs.append(results["out"].clone())
        forward = (results["out"].double() * dout.double()).sum()
        backward = (results["dv"].double() * problem.v.double()).sum()
        gaps.append(float((forward - backward).abs() / (results["out"].double() * dout.double()).abs().sum()))
    wrong = []
    if any(torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i]):
        wrong.append("two replays drop the same probabilities")
    if max(gaps) > 1e-6:
        wrong.append(f"the backward has another mask than the forward: gap {max(gaps):.2e}")
    return {"ok": not wrong, "text": "; ".join(wrong), "gaps": gaps}


def _many_scores(plan: Plan) -> dict[str, Any]:
    """Check the first and the last head of 12 x 16384 x 16384 scores, forward and backward."""
    shape = Shape(1, 16384, plan.dtype, backward=True)
    whole = draw(shape, 0, plan.device)
    leaves = whole.requiring_grad()
    out, lse = ours(leaves, plan.backend, prepare=False, lse=True)()
    gradients = torch.autograd.grad(out, leaves.leaves, leaves.dout)
    found = dict(zip(("out", "lse", *_GRADIENTS), (out.detach(), lse.detach(), *gradients), strict=True))
    reports = []
    for head in (GEOMETRY.heads - 1, 0):
        part = Inputs(
            *(x[:, head : head + 1] for x in (whole.q, whole.k, whole.v)), *_tables(whole, head), _one(whole, head)
        )
        against = budget.truth(problem_of(part), part.dout)
        results = {name: _head(name, x, head) for name, x in found.items()}
        reports.append(_kept(budget.measure(results, against, f"{plan.backend} head {head}")))
        del against
        free_memory(plan.device)
    return _worst(reports)


_GRADIENTS = ("dq", "dk", "dv", "dpos_key", "dpos_query")


def _one(whole: Inputs, head: int) -> Tensor:
    return whole.dout[:, head : head + 1]


def _tables(whole: Inputs, head: int) -> tuple[Tensor, Tensor]:
    return whole.pos_key[head : head + 1], whole.pos_query[head : head + 1]


def _head(name: str, x: Tensor, head: int) -> Tensor:
    return x[head : head + 1] if name in ("dpos_key", "dpos_query") else x[:, head : head + 1]


def _worst(reports: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [report for report in reports if not report["ok"]]
    return bad[0] if bad else max(reports, key=lambda report: report["worst_of_allowed"])


def _large_offsets(plan: Plan) -> dict[str, Any]:
    """Check the last samples of a batch whose q has more than 2**31 elements; the others must not be harmed."""
    length = 128
    batch = 2**31 // (length * GEOMETRY.heads * GEOMETRY.dim) + 8
    needed = 9 * batch * length * GEOMETRY.heads * GEOMETRY.dim * 2
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        return {"ok": True, "skipped": f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"}
    whole = draw(Shape(batch, length, plan.dtype), 0, plan.device)
    leaves = whole.requiring_grad()
    out, lse = ours(leaves, plan.backend, prepare=False, lse=True)()
    dq, dk, dv = torch.autograd.grad(out, leaves.leaves[:3], leaves.dout)
    found = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
    reports = []
    for samples in (slice(batch - 2, batch), slice(0, 2)):
        part = Inputs(
            *(x[samples] for x in (whole.q, whole.k, whole.v)), whole.pos_key, whole.pos_query, whole.dout[samples]
        )
        against = budget.truth(problem_of(part), part.dout)
        for name in ("dpos_key", "dpos_query"):  # sums over all samples, which the slice does not have
            del against.oracle[name]
        reports.append(_kept(budget.measure({name: x[samples] for name, x in found.items()}, against, str(samples))))
    return _worst(reports)
