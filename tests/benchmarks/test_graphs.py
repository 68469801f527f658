"""The checks of `torch.compile` and CUDA graphs: what holds results, and what a first call inside a capture must do."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from benchmarks.gpu import graphs, run
from benchmarks.gpu.plan import Plan
from deberta_kernels.testing.inputs import Case
from deberta_kernels.torch_state.captures import CaptureError

SMALL = Plan(device="cpu", backend="torch")
CASE = Case(nq=20, heads=2, head_dim=32, dtype=torch.bfloat16, mask="right_tokens")


@pytest.fixture
def compiler(monkeypatch):
    """Let `torch.compile` return what it is given; what it was told is recorded."""
    compiler = mock.Mock(side_effect=lambda function, **_: function)
    monkeypatch.setattr(torch, "compile", compiler)
    return compiler


@pytest.fixture
def no_device(monkeypatch):
    """Let captures do nothing, on a device that is the CPU."""
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    monkeypatch.setattr(graphs, "captured", lambda call: (mock.Mock(), call()))


def wrong(monkeypatch, error=None):
    """Let the first attention call raise an error, or every one give a wrong answer."""
    attention, calls = graphs._attention, []

    def changed(*arguments):
        calls.append(arguments)
        if error is not None and len(calls) == 1:
            raise error
        out, lse = attention(*arguments)
        return (out if error is not None else out * 1.5), lse

    monkeypatch.setattr(graphs, "_attention", changed)


@pytest.mark.parametrize("mode", graphs.MODES)
def test_a_compiled_operator_is_held_to_the_budget(compiler, monkeypatch, mode):
    assert graphs._operator(SMALL, mode, CASE)["ok"]
    assert compiler.call_args.kwargs == ({} if mode == "default" else {"mode": mode})
    wrong(monkeypatch)
    result = graphs._operator(SMALL, mode, CASE)
    assert not result["ok"]
    assert "OVER BUDGET" in result["text"]


def test_a_compiled_model_is_held_to_the_error_of_the_unpatched_one(compiler, monkeypatch):
    assert graphs._model(SMALL, "default")["ok"]
    step = graphs._step

    def another(model, *batch):
        found = step(model, *batch)
        if compiler.call_args.args[0] is model:
            found["states"] = found["states"] * 1.1
        return found

    monkeypatch.setattr(graphs, "_step", another)
    result = graphs._model(SMALL, "default")
    assert not result["ok"]
    assert "states" in result["text"]


def test_a_graph_that_the_compiler_leaves_out_is_a_failure(monkeypatch):
    monkeypatch.setattr(graphs.shutil, "which", lambda name: name)
    counted = torch._dynamo.utils.counters["inductor"]

    def check(skips):
        counted["cudagraph_skips"] += skips
        return {"ok": True}

    assert graphs._compilable(check, 0) == {"ok": True}
    assert graphs._compilable(check, 1) == {"ok": False, "text": " torch.compile left CUDA graphs out"}


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(graphs.shutil, "which", lambda name: None)
    assert graphs._compilable(lambda: {"ok": False}) == {"ok": True, "skipped": "torch.compile needs a C++ compiler"}


def test_a_first_call_inside_a_capture_must_be_refused_by_name(no_device, monkeypatch):
    result = graphs._first_call(SMALL)
    assert result == {"ok": False, "text": "the capture went on: something was loaded before, or inside it"}
    with monkeypatch.context() as patched:
        wrong(patched, CaptureError("call once before"))
        result = graphs._first_call(SMALL)
    assert result == {"ok": True, "refused": "call once before", "text": ""}


def test_a_captured_step_of_a_model_is_held_to_the_same(no_device, monkeypatch):
    assert not graphs._graph(SMALL)["ok"]  # nothing is replayed here: the first text's answer is wrong for the others
    monkeypatch.setattr(graphs, "CALLS", 1)
    assert graphs._graph(SMALL)["ok"]


@pytest.mark.parametrize("plan", [SMALL, Plan()])
def test_items_have_names_of_their_own(plan):
    names = [item.name for item in run.stage_items("graphs", plan, {})]
    assert len(set(names)) == len(names)
    assert ("a first call inside a capture" in names) is not plan.small
