"""Dispatch: the automatic order, explicit backends that never fall back, explain, and what is warned of."""

import dataclasses
import sys
import types
import warnings

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import backends, dispatch, env, notices
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec


def stand_in(reason=None):
    """A backend whose refusal is `reason`."""
    return types.SimpleNamespace(refusal=lambda problem: reason)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    monkeypatch.setattr(dispatch, "_loaded", {name: stand_in() for name in ("reference", "torch", "cpu")})
    monkeypatch.delenv(env.BACKEND, raising=False)
    notices.reset_stats()
    yield
    notices.reset_stats()


def problem(device="cpu"):
    q = torch.zeros(1, 2, 4, 8, device=device)
    return AttentionProblem(q, q, q, None, None, Masks(), PositionSpec(), 1.0, max_seqlen=4)


def test_auto_takes_the_first_of_the_order_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(problem()) == "cpu"


def test_auto_on_a_device_without_kernels_takes_torch():
    assert dispatch.choose(problem("meta")) == "torch"


def test_auto_warns_once_with_cause_and_remedy_when_it_skips_a_faster_backend(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", stand_in("head_dim 300 is more than 256"))
    with pytest.warns(dk.DebertaKernelsWarning, match=r"runs backend 'torch'.*'cpu': head_dim 300.*info.*silences"):
        assert dispatch.choose(problem()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(problem()) == "torch"


def test_strict_raises_where_a_faster_backend_was_refused(monkeypatch):
    assert dispatch.choose(problem(), strict=True) == "cpu"
    monkeypatch.setitem(dispatch._loaded, "cpu", stand_in("head_dim 300 is more than 256"))
    with pytest.raises(
        NotImplementedError, match=r"runs backend 'torch', a slower one, because backend 'cpu': head_dim"
    ):
        dispatch.choose(problem(), strict=True)
    assert dispatch.choose(problem(), "torch", strict=True) == "torch"


def test_auto_on_a_gpu_names_what_triton_lacks(monkeypatch):
    monkeypatch.setattr(dispatch, "order", lambda device_type: backends.order("cuda"))
    monkeypatch.setitem(dispatch._loaded, "triton", stand_in(None))
    assert dispatch.choose(problem("meta")) == "triton"
    monkeypatch.setitem(dispatch._loaded, "triton", stand_in("triton is not installed (pip install 'triton>=3.6')"))
    with pytest.warns(dk.DebertaKernelsWarning, match=r"runs backend 'torch'.*'triton': triton is not installed"):
        assert dispatch.choose(problem("meta")) == "torch"


def test_auto_raises_when_nothing_can_run(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", stand_in("no"))
    monkeypatch.setitem(dispatch._loaded, "torch", stand_in("neither"))
    with pytest.raises(
        NotImplementedError, match=r"no backend can run this call on cpu: .*'cpu': no.*'torch': neither"
    ):
        dispatch.choose(problem())


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", stand_in("head_dim 300 is more than 256"))
    with pytest.raises(
        NotImplementedError, match=r"backend='cpu' cannot run this call: head_dim 300.*; pass backend='auto'"
    ):
        dispatch.choose(problem(), "cpu")
    assert dispatch.choose(problem(), "torch") == "torch"


def differentiable():
    q = torch.zeros(1, 2, 4, 8, requires_grad=True)
    return AttentionProblem(q, q, q, None, None, Masks(), PositionSpec(), 1.0, max_seqlen=4)


def cuda_stand_in(own=None):
    """The backend "cuda", whose backward refuses for the reason `own`."""
    return types.SimpleNamespace(
        refusal=lambda problem: None, backward_refusal=lambda problem: own, backward="own backward"
    )


WIDE = "head_dim 128 is not 64"
NEITHER = (
    "it cannot compute the gradients (head_dim 128 is not 64), and backend 'triton', which would, cannot run: "
    "triton is not installed"
)


def test_gradients_are_the_backends_own_where_its_backward_runs(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cuda", cuda_stand_in())
    monkeypatch.setitem(dispatch._loaded, "triton", stand_in("triton is not installed"))
    assert dispatch.refusal("cuda", differentiable()) is None
    prepared = dataclasses.replace(problem(), prepared=torch.zeros(1))
    assert dispatch.backward_of("cuda", prepared) == ("own backward", prepared)


def test_a_backward_that_refuses_leaves_gradients_only_where_the_other_one_can_run(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cuda", cuda_stand_in(WIDE))
    monkeypatch.setitem(dispatch._loaded, "triton", stand_in("triton is not installed"))
    assert dispatch.refusal("cuda", problem()) is None
    with torch.no_grad():
        assert dispatch.refusal("cuda", differentiable()) is None
    assert dispatch.refusal("cuda", differentiable()) == NEITHER
    with pytest.raises(NotImplementedError) as raised:
        dispatch.backward_of("cuda", problem())
    assert str(raised.value) == f"backend 'cuda': {NEITHER}; pass backend='torch'."


def test_the_other_backend_gets_the_call_without_a_layout_that_is_not_its_own(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cuda", cuda_stand_in(WIDE))
    monkeypatch.setitem(dispatch._loaded, "triton", types.SimpleNamespace(refusal=lambda p: None, backward="theirs"))
    monkeypatch.setitem(dispatch._loaded, "cpu", types.SimpleNamespace(refusal=lambda p: None, backward="own"))
    assert dispatch.refusal("cuda", differentiable()) is None
    prepared = dataclasses.replace(problem(), prepared=torch.zeros(1))
    function, handed_on = dispatch.backward_of("cuda", prepared)
    assert (function, handed_on.prepared) == ("theirs", None)
    assert dispatch.backward_of("cpu", prepared) == ("own", prepared)


def test_explain_says_whose_gradients_a_call_gets_and_why(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cuda", cuda_stand_in(WIDE))
    monkeypatch.setitem(dispatch._loaded, "triton", stand_in())
    explanation = dispatch.explain(differentiable(), "cuda")
    assert explanation.gradients == f"backend 'triton' would compute its gradients: {WIDE}"
    assert str(explanation).splitlines()[0] == f"cuda would run; {explanation.gradients}"
    assert dispatch.explain(problem(), "cuda").gradients is None
    assert dispatch.explain(differentiable(), "torch").gradients is None
    monkeypatch.setitem(dispatch._loaded, "cuda", cuda_stand_in())
    assert dispatch.explain(differentiable(), "cuda").gradients is None


def test_the_cuda_kernels_are_not_chosen_without_being_named():
    """Until a committed measurement shows them ahead."""
    assert backends.order("cuda") == ("triton", "torch")


def test_unknown_backend_is_named():
    known = ", ".join(("auto", *dispatch.BACKENDS))
    with pytest.raises(ValueError, match=rf"backend must be one of {known}, got 'gpu'; check the spelling"):
        dispatch.choose(problem(), "gpu")
    with pytest.raises(TypeError, match=r"backend must be a string, .* got None; pass backend='auto'"):
        dispatch.check_backend(None)


def test_module_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setitem(dispatch.REGISTRY, "cpu", backends.Backend("deberta_kernels.impl.missing"))
    assert "the module of backend 'cpu' does not load (No module named" in dispatch.refusal("cpu", problem())
    with pytest.raises(RuntimeError, match=r"does not load"):
        dispatch.load("cpu")


def test_environment_forces_the_automatic_choice_only(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "reference")
    assert dispatch.choose(problem()) == "reference"
    assert dispatch.choose(problem(), "torch") == "torch"


def test_forced_backend_that_refuses_raises_and_names_the_variable(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "cuda")
    with pytest.raises(NotImplementedError, match=r"DEBERTA_KERNELS_BACKEND='cuda' cannot run this call: .*; unset it"):
        dispatch.choose(problem())
    explanation = dispatch.explain(problem())
    assert explanation.chosen is None
    assert "this call raises" in str(explanation)


def test_unknown_forced_backend_is_named(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "tpu")
    with pytest.raises(ValueError, match=r"DEBERTA_KERNELS_BACKEND must be one of .*, got 'tpu'; unset it"):
        dispatch.choose(problem())


def test_explain_gives_a_reason_for_every_other_backend():
    explanation = dispatch.explain(problem())
    assert explanation.chosen == "cpu"
    assert set(explanation.reasons) == set(dispatch.BACKENDS) - {"cpu"}
    assert "'cpu' comes first on cpu" in explanation.reasons["torch"]
    assert "only when asked for by name" in explanation.reasons["reference"]
    assert explanation.reasons["cuda"] == "it runs on cuda tensors, not cpu"
    assert str(explanation).splitlines()[0] == "cpu would run"
    assert len(str(explanation).splitlines()) == len(dispatch.BACKENDS)


def test_explain_agrees_with_choose_and_neither_warns_nor_counts(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", stand_in("the library is missing"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = dispatch.explain(problem())
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == "the library is missing"
    assert not any(notices.stats()["calls"].values())
    with pytest.warns(dk.DebertaKernelsWarning):
        assert dispatch.choose(problem()) == "torch"


def test_explain_of_an_explicit_backend():
    explanation = dispatch.explain(problem(), "torch")
    assert explanation.chosen == "torch"
    assert "backend='torch' was asked for" in explanation.reasons["cpu"]
    assert dispatch.explain(problem(), "cuda").chosen is None
    with pytest.raises(ValueError, match="backend must be one of"):
        dispatch.explain(problem(), "gpu")


def test_sizes_do_not_make_new_warnings(monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for head_dim in range(300, 310):
            monkeypatch.setitem(dispatch._loaded, "cpu", stand_in(f"head_dim {head_dim} is more than 256"))
            dispatch.choose(problem())
    assert len(caught) == 1
    assert len(notices._warned) == 1


def test_warnings_point_at_the_code_that_uses_the_package(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cpu", stand_in("no"))
    calls = {
        "user_code": lambda: dispatch.choose(problem()),
        "transformers.user": lambda: notices.fallback("one", "remedy", False),
    }
    for name, call in calls.items():
        inner = types.FunctionType(call.__code__, {**globals(), "__name__": name}, closure=call.__closure__)
        with pytest.warns(dk.DebertaKernelsWarning) as caught:
            inner()
        line = sys._getframe().f_lineno - 1
        expected = call.__code__.co_firstlineno if name == "user_code" else line
        assert (caught[0].filename, caught[0].lineno) == (__file__, expected)
