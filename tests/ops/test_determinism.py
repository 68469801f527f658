"""The same call gives the same bits: again, among other work, and on any number of threads."""

import threading

import pytest
import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    {"batch": 3, "heads": 4, "nq": 61, "head_dim": 40, "mask": "holes"},
    {"batch": 1, "heads": 1, "nq": 530, "head_dim": 24},
    {"batch": 1, "heads": 2, "nq": 70, "nk": 300, "head_dim": 32, "dropout_p": 0.2},
    {"batch": 6, "heads": 2, "nq": 70, "head_dim": 32, "packed": True},
    {"batch": 1, "heads": 2, "nq": 1100, "head_dim": 8},
)
CASES = [Case(dtype=dtype, **shape) for shape in SHAPES for dtype in DTYPES]


pytestmark = pytest.mark.usefixtures("same_bits")


def bits(target, case):
    """Run a case from its seed."""
    case = target.fitted(case)
    problem = inputs.problem(case, target.device)
    torch.manual_seed(case.seed)
    return budget.evaluate(target.run, problem, inputs.dout(case, problem))


def assert_bit_equal(results, expected, what):
    for name, value in expected.items():
        assert torch.equal(results[name], value), f"{name} differs: {what}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_repeats_are_bit_equal(target, case):
    first = bits(target, case)
    for repeat in range(3 if target.most_tiles is None else 1):
        assert_bit_equal(bits(target, case), first, f"repeat {repeat}")


# The products of torch, which other targets compute with, depend on the number of threads.
@pytest.mark.targets(lambda target: target.thread_invariant)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_number_of_threads_does_not_change_a_bit(target, case):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = bits(target, case)
        for threads in (2, 4, 3):
            torch.set_num_threads(threads)
            for repeat in range(2):
                assert_bit_equal(bits(target, case), expected, f"{threads} threads, repeat {repeat}")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_calls_in_between_do_not_change_a_bit(target, dtype):
    """Caches and scratch memory that survive a call must not carry anything into the next."""
    cases = [Case(dtype=dtype, **shape) for shape in (*SHAPES, {"nq": 5, "head_dim": 256}, {"nq": 1, "terms": "none"})]
    cases = [c for c in cases if target.case_skip_reason(c.batch, c.heads, c.nq, c.keys) is None]
    assert len(cases) >= 4
    expected = [bits(target, case) for case in cases]
    for case, before in list(zip(cases, expected))[::-1]:
        assert_bit_equal(bits(target, case), before, f"{case.id} after others")


# Triton's interpreter runs in one thread.
@pytest.mark.targets(lambda target: target.most_tiles is None)
def test_calls_from_many_python_threads_at_once_are_bit_equal(target):
    cases = [Case(batch=2, heads=2, nq=nq, head_dim=32, mask="holes") for nq in (3, 33, 64, 130)]
    drawn = [
        (problem, inputs.dout(case, problem)) for case in cases for problem in [inputs.problem(case, target.device)]
    ]
    expected = [budget.evaluate(target.run, *call) for call in drawn]
    wrong, failures, compared = [], [], []

    def work(first):
        try:
            for turn in range(12):
                index = (first + turn) % len(drawn)
                results = budget.evaluate(target.run, *drawn[index])
                compared.append(index)
                wrong.extend(name for name in results if not torch.equal(results[name], expected[index][name]))
        except Exception as error:  # reported by the assertion below, in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not wrong
    assert len(compared) == 8 * 12
