"""Give every operator test all backends through one fixture, and make random cases the same on every run."""

from __future__ import annotations

from functools import lru_cache

import hypothesis
import pytest
import torch

from deberta_kernels.testing import backends, budget, inputs

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=400,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# Another 3,500 cases per dtype on every run: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("ci"), derandomize=False, max_examples=4000, print_blob=True
)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Compute on one thread unless a test asks for more: small shapes gain nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """Make the targets the inner loop, after every other parameter, so that they share the oracle of a case."""
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", backends.TARGETS, ids=lambda target: target.name, indirect=True)


@pytest.fixture
def target(request):
    """One backend, or one instruction-set variant of it; skipped with the reason where the machine lacks it."""
    reason = request.param.skip_reason()
    if reason is not None:
        pytest.skip(reason)
    with request.param.pinned():
        yield request.param


@pytest.fixture
def run_case(target):
    """Run a case on the target, seeded, and return its results by name."""

    def run(case, problem=None, dout=None, dlse=None):
        _need_dtype(target, case.dtype)
        torch.manual_seed(case.seed)
        problem = inputs.problem(case, target.device) if problem is None else problem
        return budget.evaluate(target.run, problem, dout, dlse)

    return run


@pytest.fixture
def check_case(target, run_case):
    """Hold every result and gradient of a case to the error budget."""

    def check(case, with_dlse=False):
        _need_dtype(target, case.dtype)
        against = _truth(case, target.device, with_dlse)
        results = run_case(case, against.problem, against.dout, against.dlse)
        report = budget.measure(results, against, f"{target.name} {case.id}")
        if not report.ok:
            pytest.fail(str(report), pytrace=False)
        return results

    return check


@lru_cache(maxsize=4)
def _truth(case, device, with_dlse):
    problem = inputs.problem(case, device)
    dlse = None
    if with_dlse:
        dlse = torch.randn(problem.q.shape[:3], generator=torch.Generator().manual_seed(case.seed + 3)).to(device)
    return budget.truth(problem, inputs.dout(case, problem), dlse)


def _need_dtype(target, dtype):
    if dtype not in target.dtypes:
        pytest.skip(f"{target.name} does not promise {dtype}")
