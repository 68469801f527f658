"""The kernels of all cases, compiled in many processes at once, so that the checks after it find them in the cache."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from typing import Any

import torch

from benchmarks.core import rivals
from benchmarks.core.candidates import candidates
from benchmarks.gpu import timings
from benchmarks.gpu.cases import asked, cases, is_for, long_cases
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.stages import Item
from benchmarks.harness.process import environment, program
from benchmarks.registry import PEERS, Shape
from deberta_kernels import dispatch
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = ["distinct", "items", "run_share", "summed"]

# How lines of a process begin that tell of failures, and its exit status then.
OURS, THEIRS, FAILED = "FAILED ours: ", "FAILED others': ", 1

MOST_PROCESSES = 16
SHORTENED = 64  # tokens
# Longest sequences for which Hugging Face's code, with its N x N tensors, is compiled beside a dozen other processes.
MOST_COMPILED = 1024


def items(plan: Plan) -> list[Item]:
    """Return the one item of this stage."""
    return [Item("all variants", lambda: _together(plan))]


def distinct(plan: Plan) -> list[Case]:
    """Return the shortest case of each variant that is compiled, the main dtype and size first."""
    found: dict[Any, Case] = {}
    for case in sorted([*cases(plan), *long_cases(plan)], key=lambda case: case.nq):
        if is_for(plan.backend, case):
            found.setdefault(_variant(plan, case), case)
    return sorted(found.values(), key=lambda case: (case.dtype != torch.bfloat16, case.head_dim != 64))


def _variant(plan: Plan, case: Case) -> Any:
    """Return what the backend compiles a case for, as it says itself."""
    if plan.backend != "triton":
        return case.dtype, case.head_dim
    from deberta_kernels.impl.triton import execute

    # No variant depends on a length, and every process asks for all cases.
    positioned = min(case.nk - case.prefix_length, SHORTENED) if case.nk else None
    short = replace(
        case,
        batch=min(case.batch, 2),
        heads=min(case.heads, 2),
        nq=min(case.nq, SHORTENED),
        nk=None if positioned is None else positioned + case.prefix_length,
    )
    return execute.variant(inputs.problem(short, "cpu"))


def foreign(plan: Plan) -> list[tuple[str, Shape]]:
    """Return what other packages compile: (candidate, shape), where it takes no more memory than many can have at once.

    Their compilers depend on the shape, so every one is there.
    """
    if plan.small or plan.smoke:
        return []
    names = ["compiled", *(name for name in PEERS if not rivals.available(name))]
    return [(name, s) for s in plan.shapes() for name in names if name != "compiled" or s.length <= MOST_COMPILED]


def _together(plan: Plan) -> dict[str, Any]:
    count = 1 if plan.small else max(1, min(MOST_PROCESSES, os.cpu_count() or 1))
    command = [*program("gpu"), "--plan", plan.as_text(), "--share"]
    running = [
        subprocess.Popen(
            [*command, f"{i}/{count}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        for i in range(count)
    ]
    texts = [process.communicate()[0] for process in running]
    return {
        **summed([process.returncode for process in running], texts),
        "processes": count,
        "variants": len(distinct(plan)),
    }


def summed(statuses: list[int], texts: list[str]) -> dict[str, Any]:
    """Return what the processes came to: a failure of ours is one of the run, others' are told.

    Args:
        statuses: exit status of each process.
        texts: what each printed, see `run_share`.
    """
    lines = [line for text in texts for line in text.splitlines()]
    ours = [line.removeprefix(OURS) for line in lines if line.startswith(OURS)]
    theirs = [line.removeprefix(THEIRS) for line in lines if line.startswith(THEIRS)]
    # One that ended without a word was ended by somebody, or by a compiler that crashed.
    ours += [
        f"a process ended with status {status}: {text[-500:]}"
        for status, text in zip(statuses, texts, strict=True)
        if status not in (0, FAILED)
    ]
    return {"ok": not ours, "text": "; ".join(ours), "failed": ours, "failed_of_others": theirs}


def run_share(plan: Plan, share: str) -> int:
    """Run every n-th case once, for what is compiled on the way; `share` is "i/n". Print a line for each failure."""
    index, count = (int(part) for part in share.split("/"))
    target = Target(plan.backend, plan.backend, (torch.float32, torch.bfloat16, torch.float16), device=plan.device)
    rivals.register()
    timings.register_compiled()

    def ours(case: Case) -> None:
        problem = inputs.problem(case, plan.device)
        budget.evaluate(target.run, problem, inputs.dout(case, problem))

    def theirs(unit: tuple[str, Shape]) -> None:
        name, shape = unit
        candidates(shape, frozenset({name}), plan.backend, plan.device)[name](0)

    def modules(kind: tuple[torch.dtype, int]) -> None:
        """Have the CUDA backend find or compile its modules."""
        dtype, head_dim = kind
        q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=plan.device, requires_grad=True)
        dispatch.choose(AttentionProblem(q, q, q, None, None, Masks(), PositionSpec(), 1.0), "cuda")

    # Those first: one takes longer than any kernel of Triton's.
    kinds = (
        [(dtype, n) for n in (64, 128) for dtype in (torch.bfloat16, torch.float16)] if "cuda" in asked(plan) else []
    )
    work = [*((OURS, modules, kind) for kind in kinds), *((OURS, ours, case) for case in distinct(plan))]
    work += [(THEIRS, theirs, unit) for unit in foreign(plan)]
    status = 0
    for whose, run, unit in work[index::count]:
        try:
            run(unit)
        except Exception as error:  # the next one may still compile
            text = " | ".join(f"{type(error).__name__}: {error}".splitlines())[:500]
            print(f"\n{whose}{getattr(unit, 'id', unit)}: {text}", flush=True)
            status = FAILED
    return status
