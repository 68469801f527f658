"""The self-test as `make gpu` tries it, and what a run of that program proves."""

import os

import pytest
import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.plan import Plan
from benchmarks.harness import proving
from deberta_kernels import env
from deberta_kernels.proof import self_test
from tests.unit import new_device

IDENTITY = {"backend": "triton", "device": "x", "capability": "9.0", "triton": "3", "kernels": "abc"}
RIGHT = {"ok": True}


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The backend "triton" of a machine whose only device is new to everybody."""
    return new_device.installed(monkeypatch, tmp_path / "cache")


def test_the_item_times_every_variant_and_leaves_no_trace(kernels, tmp_path, monkeypatch):
    monkeypatch.setenv(env.SELF_TEST, "0")
    found = proving.measured("triton", "cpu", True)
    assert found["ok"]
    assert len(found["seconds_by_variant"]) == kernels.backwards == 16
    assert found["identity"] == {name: new_device.IDENTITY[name] for name in proving.DEPENDS_ON["triton"]}
    assert self_test._found == {}
    assert not (tmp_path / "cache").exists()
    assert os.environ[env.SELF_TEST] == "0"


def test_a_wrong_variant_fails_the_item(kernels):
    kernels.out = new_device.spoiled
    found = proving.measured("triton", "cpu", True)
    assert not found["ok"]
    assert "self-test on this device failed" in found["text"]


def test_a_backend_that_was_asked_for_and_does_not_run_fails_the_item(kernels):
    kernels.refusal = lambda problem: "triton is not installed"
    assert proving.measured("triton", "cpu", True) == {"ok": False, "skipped": "triton is not installed"}
    assert proving.measured("triton", "cpu", False)["ok"]


def test_both_kinds_of_kernels_are_tried():
    def tried(plan):
        return [item.name for item in correctness.items(plan) if item.name.startswith(proving.NAMED)]

    assert tried(Plan()) == ["self-test of triton", "self-test of cuda"]
    assert tried(Plan(backend="cuda")) == ["self-test of cuda"]
    assert tried(Plan(device="cpu", backend="torch")) == []


def result(smoke=False, complete=True, **items):
    own = {"self-test of triton": {**RIGHT, "identity": IDENTITY}, "a case": RIGHT, "cuda a case": RIGHT}
    stage = {"items": {**own, **items}, "complete": complete}
    return {"plan": {"smoke": smoke, "backend": "triton"}, "stages": {"correctness": stage}}


def test_a_run_proves_the_backends_that_were_right_in_everything():
    assert proving.proven(result()) == [IDENTITY]
    other = {**IDENTITY, "backend": "cuda"}
    tested = {"self-test of cuda": {**RIGHT, "identity": other}}
    assert proving.proven(result(**tested)) == [IDENTITY, other]
    assert proving.proven(result(**tested, **{"cuda a case": {"ok": False}})) == [IDENTITY]


@pytest.mark.parametrize(
    "lacking", [result(smoke=True), result(complete=False), {"plan": {"smoke": False}, "stages": {}},
                result(**{"a case": {"ok": False}}), result(**{"self-test of triton": {"ok": False}})],
    ids=["smoke", "incomplete", "not begun", "wrong", "self-test wrong"],
)  # fmt: skip
def test_less_proves_nothing(lacking):
    assert proving.proven(lacking) == []


def test_the_stages_run_without_self_tests(monkeypatch, tmp_path):
    from benchmarks.gpu import run

    monkeypatch.delenv(env.SELF_TEST, raising=False)
    monkeypatch.setattr(run, "stage_items", lambda *arguments: [])
    threads = torch.get_num_threads()
    options = run.parse(["--worker", "core", "--plan", Plan(device="cpu").as_text(), "--lines", str(tmp_path / "x")])
    assert run.worker(options) == 0
    torch.set_num_threads(threads)
    assert os.environ.pop(env.SELF_TEST) == "0"
