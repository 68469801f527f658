"""Time the attention core with pytest-benchmark, for people who compare runs with that plugin.

    pytest benchmarks/test_bench_core.py --benchmark-group-by=group --benchmark-timer=time.process_time

One group per shape. The figures come from `bench_cpu.py`, which interleaves; here candidates run one after the other.
In a run of all tests nothing is timed: every candidate is held to the error budget, and called once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from baselines import candidates
from checking import Check, check_candidates
from shapes import Shape

from tests import needs

SHAPES = (
    Shape(1, 128),
    Shape(8, 128),
    Shape(1, 512),
    Shape(1, 128, "bfloat16"),
    Shape(1, 512, "bfloat16"),
    Shape(1, 512, backward=True),
)
BACKENDS = ("cpu", "torch")


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
        for tables in ("bare", "prepared")
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
        for name in ("sdpa", "huggingface", "eager")
        if name != "sdpa" or not shape.backward
    ],
)
def test_baseline(benchmark: Any, shape: Shape, name: str) -> None:
    _run(benchmark, shape, name, "cpu")
