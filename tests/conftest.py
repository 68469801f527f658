"""Give every operator test all backends through one fixture, and make random cases the same on every run."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import hypothesis
import pytest
import torch

from deberta_kernels import env, native
from deberta_kernels.testing import backends, budget, inputs, interpreter
from tests import fast, needs, progress, selection

# Cases of one test that a slow target runs.
_SAMPLE = 6

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


@pytest.fixture(scope="session", autouse=True)
def kernels_as_they_are():
    """Let GPU kernels answer: these tests are to tell whether they are right, and a self-test would refuse them."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available():
            patch.setenv(env.SELF_TEST, "0")
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Run Triton's interpreter at its best, where it is what runs."""
    if env.triton_interpreted():
        interpreter.quicken()


def pytest_addoption(parser):
    parser.addoption(
        "--write-tables",
        action="store_true",
        help="write what the tests see into the tables of docs/ecosystem.md and support.md",
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help="run slow targets on every case of their size, and the whole grid of adapters, not on samples of them",
    )
    parser.addoption(
        "--fast", action="store_true", help="run a sample that tries each area of the package in a few seconds"
    )
    parser.addoption(
        "--require",
        default="",
        metavar="NAME,NAME",
        help="packages that this environment was made for: a test that would be skipped for lack of one fails",
    )


def pytest_configure(config):
    needs.required.update(filter(None, config.getoption("--require").split(",")))
    for option in ("--write-tables", "--fast"):
        if config.getoption(option) and config.getoption("numprocesses", None):
            raise pytest.UsageError(f"{option} is about one process; add -n 0")
    progress.register(config)
    if config.getoption("--fast"):
        config.pluginmanager.register(fast.Fast(config, _targets_here()))


def pytest_collection_modifyitems(config, items):
    """Leave out what this machine cannot run; of what is left, slow targets run a sample of each test."""
    kept = [item for item in items if selection.able(item)]
    if not config.getoption("--every-case"):
        kept = [item for item in kept if item.get_closest_marker("every_case") is None]
        kept = selection.sampled(kept, _slow_test, _SAMPLE)
    selection.keep(config, items, kept)


def _slow_test(item):
    target = selection.target_of(item)
    return None if target is None or target.most_tiles is None else item.function


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """Make the targets the inner loop, after every other parameter, so that they share the oracle of a case."""
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _targets_here(), ids=lambda target: target.name, indirect=True)


def _targets_here():
    return [target for target in backends.TARGETS if _absence(target) is None]


def _absence(target):
    """Return why a machine like this one cannot have a target; one that it should have is collected, and fails."""
    if target.backend == "cpu" and not native.library_status()["loaded"]:
        return needs.library_absence()
    return target.skip_reason()


def pytest_report_header(config):
    """Say in one line for each reason what is not tested here."""
    reasons = {}
    for target in backends.TARGETS:
        reasons.setdefault(_absence(target), []).append(target.name)
    here = ", ".join(reasons.pop(None))
    if not config.getoption("--sanitized", False):
        reasons["--sanitized is not set (make test-sanitized)"] = ["planted faults"]
    if not config.getoption("--emulated", False):
        reasons["--emulated is not set (make test-aarch64)"] = ["the native library for aarch64"]
    if absence := needs.machine_absence():
        count = len(list((Path(__file__).parent / "ptx").rglob("test_*.py")))
        reasons.setdefault(absence, []).append(f"the machine for PTX ({count} files of tests/ptx)")
    elif absence := needs.cuda_absence():
        count = len(list((Path(__file__).parent / "ptx/kernels").glob("test_cuda*.py")))
        reasons.setdefault(absence, []).append(f"the CUDA kernels' PTX ({count} files of tests/ptx/kernels)")
    for package, target in needs.PACKAGES.items():
        if needs.missing(package):
            reasons.setdefault(f"not installed (make {target})", []).append(package)
    return [f"targets: {here}", *(f"not here: {', '.join(names)}: {reason}" for reason, names in reasons.items())]


@pytest.fixture
def target(request):
    """One backend, or one instruction-set variant of it; skipped with the reason where the machine lacks it."""
    if request.param.backend == "cpu":
        needs.native_library()
    reason = request.param.skip_reason()
    if reason is not None:
        pytest.skip(reason)
    reason = selection.promised_gap(request.param, request.node.callspec.params)
    if reason is not None:
        pytest.skip(reason)
    with request.param.pinned():
        yield PromisedTarget(**{field.name: getattr(request.param, field.name) for field in fields(request.param)})


class PromisedTarget(backends.Target):
    """A target that skips a test of what it does not promise, and must refuse it; what it promises, it must run."""

    def run(self, problem):
        self.need(problem.q, lambda: super(PromisedTarget, self).run(problem))
        return super().run(problem)

    def need(self, q, call=None):
        """Skip a test whose own head dimension or dtype is not promised, once `call` was refused."""
        gap = self.gap(q.shape[-1], q.dtype)
        if gap is None:
            return
        if call is not None:
            with pytest.raises(NotImplementedError):
                call()
        pytest.skip(gap)


@pytest.fixture
def run_case(target):
    """Run a case on the target, seeded, and return its results by name."""

    def run(case, problem=None, dout=None, dlse=None):
        case = target.fitted(case)
        _need_able(target, case)
        torch.manual_seed(case.seed)
        problem = inputs.problem(case, target.device) if problem is None else problem
        return budget.evaluate(target.run, problem, dout, dlse)

    return run


@pytest.fixture
def check_case(target, run_case):
    """Hold every result and gradient of a case to the error budget."""

    def check(case, with_dlse=False):
        case = target.fitted(case)
        _need_able(target, case)
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


def _need_able(target, case):
    reason = selection.promised_gap(target, {"case": case})
    if reason is not None:
        pytest.skip(reason)
