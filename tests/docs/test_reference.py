"""The docstrings of the public names say what a caller has to know: each argument, shapes of tensors, errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import deberta_kernels as dk


def described(function: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says of each argument, and of what is returned and raised, by name."""
    text = inspect.cleandoc(function.__doc__ or "")
    found = {}
    for section, lines in re.findall(r"^(Args|Returns|Raises):\n((?:(?: +.*)?\n?)*)", text, re.M):
        found[section] = lines
        if section == "Args":
            found |= dict(re.findall(r"^ {4}(\w+): ((?:.*\n?(?: {6,}.*\n?)*))", lines, re.M))
    return found


def callables() -> dict[str, Callable[..., Any]]:
    """The public functions, and the methods that users call of public modules."""
    found = {name: getattr(dk, name) for name in dk.__all__ if inspect.isfunction(getattr(dk, name))}
    for cls in (dk.DisentangledSelfAttention, dk.EnhancedMaskDecoder):
        methods = [(name, x) for name, x in vars(cls).items() if inspect.isfunction(x) and not name.startswith("_")]
        found |= {f"{cls.__name__}.{name}": method for name, method in methods}
    return found


@pytest.mark.parametrize("name", callables())
def test_every_argument_is_described(name):
    function = callables()[name]
    words = described(function)
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument == "self":
            continue
        assert argument in words, f"{name}: nothing is said of {argument}"
        if "Tensor" in str(parameter.annotation):
            assert re.search(r"\(.*\)|as in|as there", words[argument]), f"{name}: {argument} has no shape"


@pytest.mark.parametrize("name", [name for name, x in callables().items() if inspect.signature(x).parameters])
def test_results_and_errors_are_described(name):
    function = callables()[name]
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert "Returns" in described(function)
    assert "Raises" in described(function)


@pytest.mark.parametrize("name", [name for name in dk.__all__ if inspect.isclass(getattr(dk, name))])
def test_classes_describe_what_they_take(name):
    cls = getattr(dk, name)
    text = inspect.getdoc(cls)
    assert text
    own = {key for key, value in vars(cls).items() if key == "__init__"} and not hasattr(cls, "__dataclass_fields__")
    arguments = list(inspect.signature(cls).parameters) if own else list(getattr(cls, "__dataclass_fields__", ()))
    assert [argument for argument in arguments if f"{argument}:" not in text] == []
