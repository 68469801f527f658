"""What a run calls a failure: whatever was asked for and did not run, at every stage."""

import pytest
import torch

from benchmarks.gpu import cases, correctness, device, models, precompile, timings
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.table import problems, table
from deberta_kernels import dispatch
from deberta_kernels.testing.inputs import Case


def result(asked=("triton",), **stages):
    whole = {
        name: {"items": items, "seconds": 1.0, "complete": True, "broken": "", **more}
        for name, (items, more) in stages.items()
    }
    return {
        "stages": whole, "asked": list(asked), "device": {}, "commit": {"id": None, "modified": None}, "plan": {},
        "rates": {}, "seconds": 2.0, "figures": [],
    }  # fmt: skip


def ran(backend):
    return {"ok": True, "backend": backend}


LATE = {"complete": False, "broken": "stopped after 120 s"}
UNFINISHED = {"ok": True, "unfinished": True, "error": "the stage's time was up"}
SHAPE = {"batch": 1, "length": 8, "backward": False, "label": "1x8", "memory": {}, "floor": None}


def timed(*names, **reasons):
    samples = {name: {"median": 1.0} for name in ("bare", *names)}
    return {**SHAPE, "asked": [*samples, *reasons], "samples": samples, "reasons": reasons}


TIMED = timed("cuda")


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        (result(correctness=({"a": ran("triton")}, {})), []),
        (result(correctness=({"a": ran("triton"), "b": UNFINISHED}, LATE)), []),
        (result(core=({"a": TIMED}, {})), []),
        (result(core=({"a": TIMED, "b": timed(cuda="out of memory")}, {})), []),
        (result(core=({"a": timed(huggingface="out of memory")}, {})), []),
        (result(correctness=({"a": {"ok": False}}, {})), ["correctness: a failed", "correctness: backend triton"]),
        (result(rivals=({"a": {"ok": False}}, {})), ["rivals: a failed"]),
        (result(["triton", "cuda"], correctness=({"a": ran("triton")}, LATE)), ["correctness: backend cuda did not"]),
        (result(correctness=({"a": UNFINISHED}, LATE)), ["correctness: nothing of it ran", "correctness: backend"]),
        (result(models=({}, {"broken": "no time left"})), ["models: nothing of it ran: no time left"]),
        (result(models=({"a": {"ok": True}}, {"broken": "exit status 1"})), ["models: broke off: exit status 1"]),
        (result(core=({"a": timed(sdpa="failed: no kernel")}, {})), ["core: sdpa was never timed: failed: no kernel"]),
        (result(rivals=({"a": timed(flashdeberta="wrong: dq")}, {})), ["rivals: flashdeberta was never timed: wrong"]),
        (result(compiled=({"a": {**timed(), "asked": ["compiled"]}}, {})), ["compiled: compiled was never timed"]),
    ],
)
def test_what_was_asked_for_and_did_not_run_is_a_problem(whole, expected):
    found = problems(whole)
    assert len(found) == len(expected), found
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start)
    text = table({**whole, "problems": found})
    assert all(f"\n  {line}" in text for line in found)
    assert ("FAILED" in text.splitlines()[-1 - len(found)]) == bool(found)


def test_the_table_counts_what_did_not_run_as_not_fine():
    items = {"a": ran("triton"), "b": UNFINISHED, "c": {"ok": True, "skipped": "no tool"}}
    compiled = {"all": {"ok": True, "failed_of_others": ["sdpa: no"]}}
    text = table(result(correctness=(items, LATE), compile=(compiled, {})))
    assert "correctness: 1 of 3 fine; skipped: no tool; unfinished: b; not complete: stopped after 120 s" in text
    assert "compile: 1 of 1 fine; of others failed: sdpa: no" in text


@pytest.fixture
def hopper(monkeypatch):
    """The CUDA kernels asked for beside another backend, as on a device that they are made for, which is not here."""
    monkeypatch.setattr(cases, "_is_hopper", lambda device: True)
    return Plan(device="cpu", backend="torch", tokens=16, lengths=(16,), seconds=0.01)


def test_the_cuda_kernels_are_asked_for_on_their_device_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cases.asked(Plan()) == ("triton", "cuda")
    assert cases.asked(Plan(backend="cuda")) == ("cuda",)
    assert cases.asked(Plan(device="cpu")) == ("triton",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert cases.asked(Plan()) == ("triton",)


def test_the_run_records_what_was_asked_for(hopper):
    assert device.items(hopper)[0].run()["asked"] == ["torch", "cuda"]


def test_cases_of_other_dtypes_and_head_sizes_are_not_asked_of_the_cuda_kernels():
    for dtype, head_dim, expected in (
        (torch.bfloat16, 64, True),
        (torch.float32, 64, False),
        (torch.float16, 32, False),
    ):
        assert cases.is_for("cuda", Case(dtype=dtype, head_dim=head_dim)) is expected
        assert cases.is_for("triton", Case(dtype=dtype, head_dim=head_dim))
    assert not cases.has_own_backward("cuda", Case(dtype=torch.bfloat16, head_dim=128))


def test_cuda_kernels_that_do_not_run_fail_every_check(hopper, monkeypatch):
    found = [Case(batch=1, heads=1, nq=n, dtype=torch.bfloat16) for n in (7, 8, 9, 10, 11)]
    monkeypatch.setattr(correctness, "cases", lambda plan: found)
    items = [item for item in correctness.items(hopper) if item.name.startswith("cuda ")]
    assert len(items) == 7
    for item in items:
        with pytest.raises(NotImplementedError, match="backend='cuda' cannot run this call"):
            item.run()


def test_gradients_of_another_backend_are_a_failure_where_there_are_own_ones(monkeypatch):
    monkeypatch.setattr(
        correctness, "_gradients_elsewhere", lambda *_: "backend 'triton' would compute them: no memory"
    )
    case = Case(batch=1, heads=1, nq=8, dtype=torch.bfloat16)
    result = correctness._check(Plan(device="cpu", backend="torch"), case)
    assert not result["ok"]
    assert "its own backward did not run: backend 'triton'" in result["text"]


def test_cuda_kernels_that_do_not_run_are_red_among_the_timings(hopper):
    (record,) = (item.run() for item in timings.core_items(hopper, {})[:1])
    assert not record["ok"]
    assert "cuda" in record["asked"]
    assert "backend='cuda' cannot run this call" in record["reasons"]["cuda"]


def test_a_rival_that_was_carried_here_and_cannot_be_called_is_a_failure(monkeypatch):
    monkeypatch.setattr(timings.rivals, "available", lambda name: "version 1 is installed, 2 was read")
    assert all(not item.run()["ok"] for item in timings.rival_items(Plan(device="cpu", backend="torch"), {}))
    monkeypatch.setattr(timings.rivals, "available", lambda name: timings.rivals.ABSENT)
    for item in timings.rival_items(Plan(device="cpu", backend="torch"), {}):
        assert item.run()["ok"]
        assert item.run()["skipped"] == "not installed"


def test_what_did_not_compile_is_told():
    lines = [f"a compiler's noise\n\n{precompile.OURS}B2-N300: RuntimeError: no\n{precompile.THEIRS}sdpa: no\n", ""]
    found = precompile.summed([precompile.FAILED, 0], lines)
    assert (found["ok"], found["failed"], found["failed_of_others"]) == (
        False,
        ["B2-N300: RuntimeError: no"],
        ["sdpa: no"],
    )
    assert precompile.summed([precompile.FAILED], [f"{precompile.THEIRS}sdpa: no\n"])["ok"]
    found = precompile.summed([-9, 0], ["", ""])
    assert not found["ok"]
    assert found["text"].startswith("a process ended with status -9")


def test_a_share_says_which_module_and_which_case_failed(hopper, monkeypatch, capsys):
    monkeypatch.setattr(precompile, "distinct", lambda plan: [Case(batch=1, heads=1, nq=8)])
    monkeypatch.setattr(precompile.budget, "evaluate", lambda *_: 1 / 0)
    assert precompile.run_share(hopper, "0/1") == precompile.FAILED
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == 5
    assert all(line.startswith(precompile.OURS) for line in lines)
    assert sum("backend='cuda' cannot run this call" in line for line in lines) == 4
    assert "ZeroDivisionError" in lines[-1]


def test_a_model_whose_calls_another_backend_ran_is_a_failure(monkeypatch):
    plan = Plan(device="cpu", backend="torch", seconds=0.01)
    training = next(item for item in models.items(plan) if "training" in item.name)
    monkeypatch.setattr(models, "_timed", lambda *_: {})
    assert training.run()["ok"]
    monkeypatch.setattr(dispatch, "choose", lambda problem, backend, **_: "cpu")
    found = training.run()
    assert not found["ok"]
    assert "backend torch did not run every call: calls {" in found["text"]
