"""Host time of one attention call around its kernel, which is replaced by one that does nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.harness.clock import least_cpu_time
from benchmarks.host.frames import entered, package_name
from deberta_kernels import api, dispatch, native
from deberta_kernels.position import reachable_rows
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = ["MEASURES", "SIZES", "functions_entered"]

BATCH, HEADS, LENGTH, HEAD_DIM = SIZES = 1, 12, 4, 64
_CALLS = 200  # in a row, so that reading the clock is no part of it
_ROUNDS = 60  # of which the fastest counts: others were interrupted


def _problem() -> AttentionProblem:
    """Return a call as a layer of a patched model makes it: masks, reachable rows of both tables, laid out before."""
    q, k, v = (torch.randn(BATCH, LENGTH, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3))
    start, stop = reachable_rows(LENGTH, LENGTH, PositionSpec())
    pos_key, pos_query = (torch.randn(HEADS, stop - start, HEAD_DIM) for _ in range(2))
    tokens, position = torch.ones(BATCH, LENGTH, dtype=torch.bool), PositionSpec(first_row=start)
    problem = AttentionProblem(
        q, k, v, pos_key, pos_query, Masks(tokens, tokens), position, 0.1, max_seqlen=LENGTH
    )  # fmt: skip
    return problem.changed(prepared=dispatch.prepare(problem, "cpu"))


def _call(problem: AttentionProblem) -> Any:
    return api.run_attention(
        problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query, masks=problem.masks,
        position=problem.position, scale=problem.scale, prepared=problem.prepared,
    )  # fmt: skip


@contextmanager
def _idle_kernel() -> Iterator[None]:
    """Let the native forward do nothing: a function of the library that returns 0, for there is no such variant."""
    library = native.need()
    idle = ctypes.CDLL(library.path).dk_variant_runs
    idle.argtypes = library.handle.dk_cpu_forward.argtypes
    kernel, library.handle.dk_cpu_forward = library.handle.dk_cpu_forward, idle
    try:
        yield
    finally:
        library.handle.dk_cpu_forward = kernel


def run_attention_time(rounds: int = _ROUNDS) -> float:
    """Return the seconds of `run_attention` in inference, beside a native call that does nothing."""
    problem = _problem()
    with torch.no_grad(), _idle_kernel():
        return least_cpu_time(lambda: _call(problem), rounds, _CALLS)


def operator_time(rounds: int = _ROUNDS) -> float:
    """Return the same of the operator that compiled and exported programs call."""
    arguments = (*_problem().arguments(), "auto")
    with torch.no_grad(), _idle_kernel():
        return least_cpu_time(lambda: torch.ops.deberta_kernels.attention(*arguments), rounds, _CALLS)


def training_time(rounds: int = _ROUNDS) -> float:
    """Return the same of a forward whose gradients will be asked for, without tables laid out before."""
    problem = _problem().changed(prepared=None)
    problem.q.requires_grad_()
    with _idle_kernel():
        return least_cpu_time(lambda: _call(problem), rounds, _CALLS)


MEASURES = {
    "run_attention": run_attention_time,
    "run_attention, differentiated": training_time,
    "operator": operator_time,
}


def functions_entered() -> list[str]:
    """Return the package's functions that one call of `run_attention` enters, in their order."""
    problem = _problem()
    with torch.no_grad():
        _call(problem)
        with entered() as found:
            _call(problem)
    return [name for code in found if (name := package_name(code)) is not None]
