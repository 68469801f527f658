"""Calls of a form that was planned before: the same results, by the tensors of the call, without a plan."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from ptx.drivers import triton_driver

from benchmarks.host.frames import entered, package_name
from deberta_kernels.impl.triton import execute, plan, repeated, tuning
from deberta_kernels.impl.triton.tuning import TileConfig
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import Masks
from tests.ptx.kernels.problems import BF16, SHORT

CASE = Case(batch=1, heads=1, nq=65, dtype=BF16, **SHORT)
PLANNED = mock.Mock(side_effect=AssertionError("planned"))
CASES = {
    "plain": CASE,
    "padding, dropout": replace(CASE, batch=2, mask="right_tokens", dropout_p=0.2),
    "pairs": replace(CASE, mask="blocks"),
    "prefix": replace(CASE, nk=80, prefix_length=15),
    "without positions": replace(CASE, terms="none", mask="right"),
    "float32": replace(CASE, dtype=torch.float32, nq=33),
}


@pytest.fixture
def device():
    with (
        mock.patch.object(repeated, "_known", {}),
        triton_driver.installed(triton_driver.Device(90)) as device,
    ):
        yield device


@pytest.fixture
def deterministic():
    """Sums of one order, so that repeats have the same bits."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(problem, dout, dlse=None, needs=(True,) * 5):
    """Return out, lse and the five gradients."""
    out, lse = execute.forward(problem)
    return [out, lse, *execute.backward(problem, dout, dlse, out, lse, needs)]


def problem_of(case, seed=0):
    problem = inputs.problem(replace(case, seed=seed))
    return problem, inputs.dout(case, problem)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or (torch.equal(a, b) and a.stride() == b.stride())


def unplanned():
    return mock.patch.object(plan.Call, "__init__", PLANNED)


def other_values(problem):
    """Return a problem of the same form with other numbers in other memory."""
    changed = [None if x is None else x.clone() for x in problem.tensors()]
    for x in changed[:5]:
        if x is not None:
            x.mul_(-0.5)
    for number, (x, y) in enumerate(zip(changed, problem.tensors(), strict=True)):
        if x is not None:
            changed[number] = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).copy_(x)
    return problem.with_tensors(changed)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_of_a_known_form_is_not_planned_and_gives_what_its_plan_would(device, deterministic, case):
    problem, dout = problem_of(case)
    dlse = torch.randn(problem.q.shape[:3])
    expected_first = results(problem, dout, dlse)
    second = other_values(problem)
    with mock.patch.object(repeated, "_known", {}):
        expected = results(second, dout, dlse)
    with unplanned():
        assert_equal(results(second, dout, dlse), expected)
        assert_equal(results(problem, dout, dlse), expected_first)
    assert not torch.equal(expected[0], expected_first[0])


def test_one_tensor_in_two_places_says_nothing_of_the_next_call(device, deterministic):
    problem, dout = problem_of(CASE)
    results(problem.changed(k=problem.q, v=problem.q, pos_query=problem.pos_key), problem.q)
    layout = [torch.empty_strided(x.shape, problem.q.stride(), dtype=x.dtype).copy_(x) for x in (problem.k, problem.v)]
    apart = problem.changed(k=layout[0], v=layout[1])
    with mock.patch.object(repeated, "_known", {}):
        expected = results(apart, dout)
    with unplanned():
        out, lse = execute.forward(apart)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert_equal(results(apart, dout), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.changed(scale=p.scale * 2),
        lambda p: p.changed(position=replace(p.position, first_row=1)),
        lambda p: p.changed(q=p.q.contiguous()),
        lambda p: p.changed(q=torch.empty(p.q.numel() + 1, dtype=BF16)[1:].as_strided(p.q.shape, p.q.stride(), 1)),
        lambda p: p.changed(q=p.q[:, :, :64]),
        lambda p: p.changed(pos_query=None),
        lambda p: p.changed(dropout_p=0.1, seed=torch.ones(1, dtype=torch.int64)),
        lambda p: p.changed(masks=Masks(torch.ones(1, 65, dtype=torch.bool))),
        lambda p: p.changed(q=torch._neg_view(p.q)),
    ],
    ids=["scale", "rows", "strides", "alignment", "length", "tables", "dropout", "mask", "negative"],
)
def test_whatever_a_plan_looks_at_is_part_of_the_form(device, change):
    problem, _ = problem_of(replace(CASE, heads=2))
    execute.forward(problem)
    with unplanned():
        execute.forward(problem)
        with pytest.raises(AssertionError, match="planned"):
            execute.forward(change(problem))


def test_other_tiles_other_gradients_and_an_order_of_sums_are_planned_anew(device, monkeypatch):
    problem, dout = problem_of(CASE)
    out, lse, *_ = results(problem, dout)
    with unplanned():
        for needs in ((True,) * 3 + (False,) * 2, (False,) * 3 + (True,) * 2):
            with pytest.raises(AssertionError, match="planned"):
                execute.backward(problem, dout, None, out, lse, needs)
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(AssertionError, match="planned"):
                execute.backward(problem, dout, None, out, lse, (True,) * 5)
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(tuning, "_shrunk", {("sm_90", BF16, 64, "forward"): TileConfig(32, 4, 1)})
        with pytest.raises(AssertionError, match="planned"):
            execute.forward(problem)


def test_no_tensor_of_a_call_outlives_it(device):
    problem, dout = problem_of(replace(CASE, mask="right_tokens", dropout_p=0.1))
    found = results(problem, dout)
    assert len(repeated._known) == 2
    references = [weakref.ref(x) for x in (*problem.tensors(), dout, *found) if x is not None]
    del problem, dout, found
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_results_of_two_calls_share_no_memory(device):
    problem, _ = problem_of(CASE)
    found = [execute.forward(problem) for _ in range(3)]
    assert len({out.data_ptr() for out, _ in found}) == 3


def test_threads_repeat_side_by_side(device, deterministic):
    calls = [problem_of(CASE, seed) for seed in range(4)]
    expected = [execute.forward(problem) for problem, _ in calls]
    start, one = device.launch, threading.Lock()  # the machine runs one launch at a time

    def launch(*given):
        with one:
            start(*given)

    with mock.patch.object(device, "launch", launch), unplanned(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: execute.forward(call[0]), calls * 3))
    for (out, lse), (other, others_lse) in zip(found, expected * 3, strict=True):
        assert torch.equal(out, other)
        assert torch.equal(lse, others_lse)


def test_forms_have_an_end(device, monkeypatch):
    monkeypatch.setattr(repeated, "_MOST_FORMS", 2)
    for length in (16, 17, 18):
        execute.forward(problem_of(replace(CASE, nq=length, nk=length))[0])
    assert len(repeated._known) == 2


# Python functions of the package that a repeated call enters, which is what its host time grows with.
@pytest.mark.parametrize(("direction", "most"), [("forward", 23), ("backward", 30)])
def test_a_repeated_call_enters_few_functions(device, direction, most):
    problem, dout = problem_of(replace(CASE, mask="right_tokens", dropout_p=0.1))
    out, lse, *_ = results(problem, dout)
    with entered() as found:
        if direction == "forward":
            execute.forward(problem)
        else:
            execute.backward(problem, dout, None, out, lse, (True,) * 5)
    names = [name for code in found if (name := package_name(code)) is not None]
    assert len(names) <= most, names
