"""Linear layers, GELUs and dropouts are taken over only while the code they would run is PyTorch's or transformers'."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.activations
from torch import nn

import deberta_kernels as dk
from deberta_kernels import dispatch, native
from deberta_kernels.linear import products
from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from tests.integrations.linears import record_products, states_of

GELU = transformers.activations.GELUActivation
STATUS = native.library_status()
pytestmark = pytest.mark.skipif(STATUS["isa"] in (None, "generic"), reason="no vector variant of the native library")


def halved(original: Any) -> Any:
    """Return a function that looks like the original and halves its result."""

    @functools.wraps(original)
    def replacement(*args: Any, **named: Any) -> Any:
        return original(*args, **named) / 2

    return replacement


class Functional:
    """What a module knows as F, with one function replaced."""

    def __init__(self, name: str) -> None:
        setattr(self, name, halved(getattr(nn.functional, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(nn.functional, name)


def called(cls: type[nn.Module], name: str) -> Any:
    original = getattr(nn.Module, name)

    def replacement(self: Any, *args: Any, **named: Any) -> Any:
        result = original(self, *args, **named)
        return result / 2 if isinstance(self, cls) else result

    return replacement


LINEAR = {
    "forward": (nn.Linear, "forward", halved(nn.Linear.forward)),
    "partial": (nn.Linear, "forward", functools.partialmethod(halved(nn.Linear.forward))),
    "function": (nn.functional, "linear", halved(nn.functional.linear)),
    "namespace": (nn.modules.linear, "F", Functional("linear")),
    "call": (nn.Module, "__call__", called(nn.Linear, "__call__")),
    "call of the class": (nn.Linear, "__call__", called(nn.Linear, "__call__")),
    "call_impl": (nn.Module, "_call_impl", called(nn.Linear, "_call_impl")),
    "code": (nn.Linear.forward, "__code__", (lambda self, x: x @ self.weight.t() / 2).__code__),
}
GELUS = {
    "forward": (GELU, "forward", halved(GELU.forward)),
    "call": (nn.Module, "__call__", called(GELU, "__call__")),
    "call_impl": (nn.Module, "_call_impl", called(GELU, "_call_impl")),
}
PYTORCHS_GELUS = {
    "forward": (nn.GELU, "forward", halved(nn.GELU.forward)),
    "function": (nn.functional, "gelu", halved(nn.functional.gelu)),
    "namespace": (nn.modules.activation, "F", Functional("gelu")),
    "call": (nn.Module, "__call__", called(nn.GELU, "__call__")),
}
DROPOUTS = {
    "forward": (nn.Dropout, "forward", lambda self, x: x / 2),
    "function": (nn.functional, "dropout", lambda x, *rest: x / 2),
    "operator": (torch._VF, "dropout", lambda x, *rest: x / 2),
    "namespace": (nn.modules.dropout, "F", type("F", (), {"dropout": staticmethod(lambda x, *rest: x / 2)})),
    "call": (nn.Module, "__call__", lambda self, *args: args[0] / 2),
}


def each(places: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("place", list(places.values()), ids=list(places))


@each(LINEAR)
@pytest.mark.parametrize("fast_linears", ["auto", True])
def test_a_replaced_linear_takes_part(place, fast_linears, build, batch, monkeypatch):
    """After a first call too, which kept position tables; and everything is as before when it is undone."""
    monkeypatch.setattr(products, "_native_wanted", lambda: True)
    model, inputs = build(), batch(4, 41)
    plain = copy.deepcopy(model)
    dk.patch(model, fast_linears=fast_linears)
    before = states_of(model, inputs)
    with monkeypatch.context() as changes:
        changes.setattr(*place)
        expected = states_of(plain, inputs)
        with pytest.warns(
            dispatch.DebertaKernelsWarning, match="a linear layer is called as a module: .* was replaced"
        ):
            found = states_of(model, inputs)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)
        assert (found[-1] - before[-1]).abs().max() > 0.1
        dk.patch(model, fast_linears=fast_linears, strict=True)
        with pytest.raises(NotImplementedError, match=r"was replaced by .*; undo that"):
            states_of(model, inputs)
        dk.patch(model, fast_linears=False, strict="call" not in place[1])  # calls of modules concern the attention too
        torch.testing.assert_close(states_of(model, inputs), expected, atol=5e-5, rtol=1e-5)
    dk.patch(model, fast_linears=fast_linears, strict=True)
    assert all(map(torch.equal, states_of(model, inputs), before))


@each(GELUS)
def test_a_replaced_activation_takes_part(place, build, batch, monkeypatch):
    model, inputs = build(), batch(4, 41)
    plain = copy.deepcopy(model)
    dk.patch(model, fast_linears=True)
    seen = record_products(monkeypatch)
    with monkeypatch.context() as changes:
        changes.setattr(*place)
        with pytest.warns(dispatch.DebertaKernelsWarning, match="a GELU is called as a module: GELUActivation"):
            found = states_of(model, inputs)
        torch.testing.assert_close(found, states_of(plain, inputs), atol=5e-5, rtol=1e-5)
        assert "gelu" not in seen
        dk.patch(model, fast_linears=True, strict=True)
        with pytest.raises(NotImplementedError, match=r"\w+\.\w+ was replaced by"):
            states_of(model, inputs)


@each(PYTORCHS_GELUS)
def test_a_replaced_gelu_of_pytorch_takes_part(place, monkeypatch):
    layer, activation, x = nn.Linear(16, 32).eval(), nn.GELU(), torch.randn(9, 16)
    monkeypatch.setattr(*place)
    layer.requires_grad_(False)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="a GELU is called as a module"):
        found = apply_linear_gelu(layer, activation, x, everywhere=True)
    torch.testing.assert_close(found, activation(layer(x)))
    with pytest.raises(NotImplementedError, match="a GELU is called as a module"):
        apply_linear_gelu(layer, activation, x, everywhere=True, strict=True)


def test_an_activation_keeps_the_function_it_was_made_with(monkeypatch):
    layer, x = nn.Linear(16, 32).eval(), torch.randn(9, 16)
    early = GELU()
    monkeypatch.setattr(nn.functional, "gelu", halved(nn.functional.gelu))
    late = GELU()
    seen = record_products(monkeypatch)
    with torch.no_grad():
        for activation in (early, late):
            found = apply_linear_gelu(layer, activation, x, everywhere=True)
            torch.testing.assert_close(found, activation(layer(x)))
    assert seen == ["gelu", "none"]


@each(DROPOUTS)
def test_a_replaced_dropout_takes_part(place, monkeypatch):
    x, dropout = torch.randn(3, 5), nn.Dropout(0.5)
    monkeypatch.setattr(*place)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="a dropout is called as a module: .* was replaced"):
        assert torch.equal(drop_and_add(dropout, x, x), x / 2 + x)
    with pytest.raises(NotImplementedError, match="a dropout is called as a module"):
        drop_and_add(dropout, x, strict=True)


def test_a_compiled_layer_is_called():
    layer, x = nn.Linear(16, 32).eval(), torch.randn(9, 16)
    layer.compile()  # does nothing before the first call
    layer._compiled_call_impl = lambda x: x.new_zeros(9, 32)
    with torch.no_grad():
        assert not apply_linear(layer, x, everywhere=True).any()


def test_what_is_no_module_is_called_too():
    x = torch.randn(9, 16)
    assert torch.equal(apply_linear(torch.neg, x, everywhere=True), -x)


EARLY = """
import torch
from torch import nn
original = nn.{cls}.forward
nn.{cls}.forward = lambda self, x: original(self, x) / 2
import deberta_kernels as dk
from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.linear.layers import apply_linear_gelu
layer, x = nn.Linear(16, 32).eval(), torch.ones(9, 16)
with torch.no_grad():
    for strict in (False, True):
        try:
            if "{cls}" == "Dropout":
                kept = drop_and_add(nn.Dropout(0.5), x, strict=strict)
                assert set(kept.flatten().tolist()) == {{0.0, 1.0}}
            else:
                found = apply_linear_gelu(layer, nn.GELU(), x, everywhere=True, strict=strict)
                torch.testing.assert_close(found, nn.GELU()(layer(x)))
        except NotImplementedError:
            assert strict
        else:
            assert not strict
"""


@pytest.mark.parametrize("cls", ["Linear", "GELU", "Dropout"])
def test_what_was_replaced_before_the_package_was_imported_takes_part(cls):
    root = str(Path(dk.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EARLY.format(cls=cls)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", [apply_linear, lambda layer, x: apply_linear_gelu(layer, nn.GELU(), x)])
def test_what_is_no_tensor_is_refused_as_pytorch_does(call):
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        call(nn.Linear(16, 32), [[1.0] * 16])
