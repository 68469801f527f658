"""Counting what cannot be avoided, and programs in processes of their own."""

from __future__ import annotations

from benchmarks.core.memory import measure
from benchmarks.harness.process import run_alone
from benchmarks.harness.work import GEOMETRY, needed_flops, plain_flops
from benchmarks.registry import Shape


def test_needed_flops_are_those_of_distinct_pairs() -> None:
    # Two tokens: each query meets two rows, and each key does.
    assert needed_flops([2]) == 2 * 64 * (2 * 4 + 2 * 4) * 12
    assert needed_flops([5, 5, 7]) == 2 * needed_flops([5]) + needed_flops([7])
    # Far apart, many pairs share a row.
    assert needed_flops([1024]) < 1.7 * plain_flops(Shape(1, 1024))


def test_the_parts_of_a_model_are_counted_by_the_same_function() -> None:
    linear = needed_flops([10, 20], "linear")
    assert linear == 2 * 30 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert needed_flops([10, 20], "model") == GEOMETRY.layers * (linear + needed_flops([10, 20]))
    assert needed_flops([10], "step") == 3 * needed_flops([10], "model")
    assert needed_flops([64], "core backward") > 3.4 * needed_flops([64])


def test_sizes_are_those_of_v3_base() -> None:
    assert (GEOMETRY.heads, GEOMETRY.dim, GEOMETRY.layers) == (12, 64, 12)
    assert (GEOMETRY.position_buckets, GEOMETRY.max_relative_positions) == (256, 512)


def test_a_program_that_fails_is_an_error_with_its_last_line() -> None:
    error = run_alone(measure, 1, length=12, dtype="nonsense", backend="cpu", backward=False)["error"]
    assert "exit status 1: " in error
    assert "nonsense" in error
