"""Whether a function is its maker's own code is told by where the code comes from."""

import functools
import types

import pytest
from torch import nn

from deberta_kernels.torch_state.originals import Originals, is_own

HOME, NAME = "torch.nn.modules.linear", "Linear.forward"
ORIGINAL = nn.Linear.forward


@functools.wraps(ORIGINAL)
def wrapped(self, x):
    return ORIGINAL(self, x)


class Callable:
    __module__, __qualname__, __name__, __code__ = HOME, NAME, "forward", ORIGINAL.__code__

    def __call__(self, module, x):
        return ORIGINAL(module, x)


def elsewhere():
    """Return the same code in another module's name space, where F may be anything."""
    copy = types.FunctionType(ORIGINAL.__code__, {"F": None, "__name__": "elsewhere"}, "forward")
    copy.__module__, copy.__qualname__ = HOME, NAME
    return copy


def nested():
    def forward(self, x):
        return ORIGINAL(self, x)

    forward.__module__, forward.__qualname__ = HOME, NAME
    return forward


@pytest.mark.parametrize(
    "function",
    [wrapped, functools.partial(ORIGINAL), Callable(), elsewhere(), nested(), nn.Bilinear.forward, len, None],
    ids=["wraps", "partial", "callable", "elsewhere", "nested", "sibling", "builtin", "None"],
)
def test_a_replaced_function_is_seen(function, monkeypatch):
    originals = Originals((nn.Linear, "forward", HOME, NAME))
    assert originals.replaced() is None
    monkeypatch.setattr(nn.Linear, "forward", function)
    assert not is_own(function, HOME, NAME)
    assert "Linear.forward was replaced by " in originals.replaced()
    assert "Linear.forward was replaced by " in Originals((nn.Linear, "forward", HOME, NAME)).replaced()
    monkeypatch.undo()
    assert originals.replaced() is None


def test_code_exchanged_inside_a_function_is_seen(monkeypatch):
    originals = Originals((nn.Linear, "forward", HOME, NAME))
    assert originals.replaced() is None
    monkeypatch.setattr(ORIGINAL, "__code__", (lambda self, x: x).__code__)
    assert "<lambda>" in originals.replaced()
    assert not is_own(nn.Linear.forward, HOME, NAME)


def test_builtins_are_known_by_their_owner(monkeypatch):
    linear, gelu = nn.functional.linear, nn.functional.gelu
    assert is_own(linear, "torch._C._nn", "linear")
    assert not is_own(gelu, "torch._C._nn", "linear")
    assert not is_own(lambda *args: linear(*args), "torch._C._nn", "linear")


@pytest.mark.parametrize(("filename", "own"), [("torch/nn/modules/linear.py", True), ("my/linear.py", False)])
def test_bundled_programs_keep_relative_paths(filename, own):
    code = ORIGINAL.__code__.replace(co_filename=filename)
    function = types.FunctionType(code, ORIGINAL.__globals__, "forward")
    function.__qualname__ = NAME
    assert is_own(function, HOME, NAME) == own
