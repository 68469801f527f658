"""Time the attention core with pytest-benchmark, for people who compare runs with that plugin.

    pytest benchmarks --benchmark-group-by=group --benchmark-timer=time.process_time

One group per shape. The figures come from `python -m benchmarks core`, which interleaves; here candidates run one after
the other. In a run of all tests nothing is timed: every candidate is held to the error budget, and called once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.core.candidates import candidates
from benchmarks.core.checking import Check, check_candidates
from benchmarks.registry import CANDIDATES, CORE_FIGURES, Shape
from tests import needs

# Longer ones take minutes here, where candidates do not take turns.
MOST_TOKENS = 512
SHAPES = tuple(
    shape
    for shape in dict.fromkeys(figure.shape for figure in CORE_FIGURES)
    if shape.batch * shape.length <= MOST_TOKENS
)
BACKENDS, OURS = ("cpu", "torch"), ("bare", "prepared")


def _name(shape: Shape) -> str:
    return f"{shape.label}-{shape.dtype}-{'forward+backward' if shape.backward else 'forward'}"


@functools.cache
def _check(shape: Shape, name: str, backend: str) -> Check:
    return check_candidates(shape, [name], backend)[name]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _run(benchmark: Any, shape: Shape, name: str, backend: str) -> None:
    benchmark.group = _name(shape)
    if name != "sdpa":
        check = _check(shape, name, backend)
        assert check.ok, check.text
    call = candidates(shape, frozenset({name}), backend)[name]
    counter = itertools.count()
    benchmark.pedantic(lambda: call(next(counter)), rounds=10, iterations=max(1, 1024 // shape.length), warmup_rounds=1)


# Only the cpu backend prepares tables, and only without gradients.
@pytest.mark.parametrize(
    ("shape", "tables", "backend"),
    [
        pytest.param(shape, tables, backend, id=f"{_name(shape)}-{tables}-{backend}")
        for shape in SHAPES
        for tables in OURS
        for backend in BACKENDS
        if tables == "bare" or (backend == "cpu" and not shape.backward)
    ],
)
def test_ours(benchmark: Any, shape: Shape, tables: str, backend: str) -> None:
    if backend == "cpu":
        needs.native_library()
    _run(benchmark, shape, tables, backend)


# SDPA has no position tables to differentiate.
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param(shape, name, id=f"{_name(shape)}-{name}")
        for shape in SHAPES
        for name, candidate in CANDIDATES["core"].items()
        if name not in OURS and not candidate.missing and (name != "sdpa" or not shape.backward)
    ],
)
def test_baseline(benchmark: Any, shape: Shape, name: str) -> None:
    _run(benchmark, shape, name, "cpu")
