"""The self-test of the package on the device: whether it passes and how long it takes; and what a whole run proves."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from deberta_kernels import dispatch, env
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.proof import record, self_test
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case

__all__ = ["DEPENDS_ON", "NAMED", "measured", "proven"]

# What the item of a backend is called: this and the name of the backend.
NAMED = "self-test of "
# What a proof by a committed result depends on; see docs/gpu.md.
DEPENDS_ON = {
    "triton": ("backend", "device", "capability", "triton", "kernels"),
    "cuda": ("backend", "device", "capability", "cuda", "kernels"),
}


def measured(backend: str, device: str, needed: bool) -> dict[str, Any]:
    """Test variants as the first calls of a user would; return the seconds of each, beyond compilation.

    Args:
        backend: which.
        device: where.
        needed: it is wrong if the backend does not run here.
    """
    seconds: dict[str, float] = {}
    with _as_at_first():
        for case in _cases():
            problem = inputs.problem(case, device)
            problem = replace(problem, q=problem.q.requires_grad_())
            os.environ[env.SELF_TEST] = "0"
            refused = dispatch.refusal(backend, problem)  # compiles
            if refused is not None:
                return {"ok": not needed, "skipped": refused}
            os.environ[env.SELF_TEST] = "1"
            start = time.perf_counter()
            refused = dispatch.refusal(backend, problem)
            seconds[case.id] = round(time.perf_counter() - start, 4)
            if refused is not None:
                return {"ok": False, "text": refused, "seconds_by_variant": seconds}
        found = record.identity(backend, problem.q.device)
    identity = {name: found[name] for name in DEPENDS_ON[backend]}
    return {"ok": True, "seconds_by_variant": seconds, "identity": identity}


def _cases() -> list[Case]:
    forms: tuple[dict[str, Any], ...] = ({}, {"mask": "right_tokens"}, {"mask": "blocks"}, {"packed": True})
    return [
        Case(batch=2, heads=2, nq=70, dtype=dtype, dropout_p=p, **form)
        for dtype in (torch.bfloat16, torch.float16)
        for form in forms
        for p in (0.0, 0.1)
    ]


@contextmanager
def _as_at_first() -> Iterator[None]:
    """Put everything that knows of self-tests back to a first use, and leave no trace of what is done inside."""
    before = {name: os.environ.get(name) for name in (env.SELF_TEST, env.CACHE)}
    known = self_test._found, self_test._attempts
    self_test._found, self_test._attempts = {}, Attempts()
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[env.CACHE] = folder
            yield
    finally:
        self_test._found, self_test._attempts = known
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def proven(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows for `deberta_kernels/proof/covered.json`: the backends that were right in every problem."""
    stage = result["stages"].get("correctness", {})
    if not stage.get("complete") or result["plan"]["smoke"]:
        return []
    rows = []
    for name in DEPENDS_ON:
        own = {item: x for item, x in stage["items"].items() if _backend_of(item, result["plan"]["backend"]) == name}
        identity = own.get(NAMED + name, {}).get("identity")
        if identity and all(x.get("ok") for x in own.values()):
            rows.append(identity)
    return rows


def _backend_of(item: str, ours: str) -> str:
    """Return the backend that an item of the stage is about."""
    if item.startswith(NAMED):
        return item.removeprefix(NAMED)
    return "cuda" if item.startswith("cuda ") else ours
