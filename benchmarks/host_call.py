"""Time what the package does on the host around one attention call: its kernel is replaced by one that does nothing.

`run_attention_time` and `operator_time` return seconds, `frames_of_run_attention` the package's functions in between.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from deberta_kernels import api, dispatch, native
from deberta_kernels.position import reachable_rows
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

BATCH, HEADS, LENGTH, HEAD_DIM = 1, 12, 4, 64
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


def _least(call: Callable[[], Any]) -> float:
    """Return the least CPU time of a call, in seconds."""
    times = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        for _ in range(_CALLS):
            call()
        times.append(time.process_time() - start)
    return min(times) / _CALLS


def run_attention_time() -> float:
    """Return the seconds of `run_attention` in inference, beside a native call that does nothing."""
    problem = _problem()
    with torch.no_grad(), _idle_kernel():
        return _least(lambda: _call(problem))


def operator_time() -> float:
    """Return the same of the operator that compiled and exported programs call."""
    arguments = (*_problem().arguments(), "auto")
    with torch.no_grad(), _idle_kernel():
        return _least(lambda: torch.ops.deberta_kernels.attention(*arguments))


def training_time() -> float:
    """Return the same of a forward whose gradients will be asked for, without tables laid out before."""
    problem = _problem().changed(prepared=None)
    problem.q.requires_grad_()
    with _idle_kernel():
        return _least(lambda: _call(problem))


def frames_of_run_attention() -> list[str]:
    """Return the package's functions that one call enters, in their order."""
    problem, entered = _problem(), []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("deberta_kernels"):
            entered.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")

    with torch.no_grad():
        _call(problem)
        sys.setprofile(note)
        try:
            _call(problem)
        finally:
            sys.setprofile(None)
    return entered


def report() -> None:
    """Print all of it."""
    print(f"beside a native call that does nothing, (B, H, N, D) = {(BATCH, HEADS, LENGTH, HEAD_DIM)}:")
    for name, measure in (
        ("run_attention", run_attention_time),
        ("run_attention, differentiated", training_time),
        ("operator", operator_time),
    ):
        print(f"  {name:30} {measure() * 1e6:6.1f} µs")
    frames = frames_of_run_attention()
    print(f"  functions entered by run_attention: {len(frames)}")
    for frame in frames:
        print(f"    {frame}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    report()
