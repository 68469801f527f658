"""Functions that are still their maker's own code: by where the code comes from, not by what was there at import.

Somebody may replace `nn.Linear.forward` or `nn.functional.linear`, before this package is imported or at any time
after. `__module__` says nothing then, since `functools.wraps` copies it; the code object of a function does.
"""

from __future__ import annotations

import os
import sys
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch

__all__ = ["Originals", "Place", "called", "described", "is_own"]

Place = tuple[Any, str, str, str]

# Function -> its code when it was found to be its maker's own, and as what. Only such are kept: a few for good.
_own: dict[FunctionType, tuple[CodeType, str, str]] = {}
_OPERATORS: Any = torch._C._VariableFunctions  # type: ignore[attr-defined]


def is_own(function: Any, home: str, qualname: str) -> bool:
    """Tell whether `function` is the code that a module defines, nothing wrapped around it or put in its place.

    Args:
        function: anything.
        home: name of the module, as "torch.nn.modules.linear"; of a builtin, the module or class it belongs to, which
            for torch.bmm and its like is "_VariableFunctionsClass", for tensors' methods "TensorBase".
        qualname: name inside of it, as "Linear.forward"; empty for the module itself.
    """
    if type(function) is torch.jit.ScriptFunction:
        function = getattr(function, "_torchdynamo_inline", None)  # what was scripted
    if type(function) is not FunctionType:
        return _is_own_builtin(function, home, qualname)
    code, known = function.__code__, _own.get(function)
    if known is not None and known[0] is code and known[1] == home and known[2] == qualname:
        return True
    # Python 3.10 has no name of a class in its code objects.
    name = getattr(code, "co_qualname", function.__qualname__)
    if name != qualname or function.__globals__.get("__name__") != home or not _is_file_of(code.co_filename, home):
        return False
    if "<locals>" not in qualname:  # of those there may be any number
        _own[function] = code, home, qualname
    return True


def _is_own_builtin(function: Any, home: str, name: str) -> bool:
    if type(function) is ModuleType:
        return not name and function is sys.modules.get(home)
    if type(function) is MethodDescriptorType:
        return (function.__objclass__.__name__, function.__name__) == (home, name)
    if type(function) is not BuiltinFunctionType or function.__name__ != name:
        return False
    owner = function.__self__
    if owner is None:  # PyTorch's operators, all of one class
        return home == _OPERATORS.__class__.__name__ and getattr(_OPERATORS, name, None) is function
    return getattr(owner, "__name__", "") == home


def _is_file_of(filename: str, home: str) -> bool:
    origin = str(getattr(getattr(sys.modules.get(home), "__spec__", None), "origin", None))
    if os.path.isabs(filename):
        return filename == origin
    # Bundled programs keep paths relative to what was bundled.
    inside, _ = os.path.splitext(filename)
    return bool(inside) and os.path.splitext(origin)[0].endswith(os.sep + inside)


def called(cls: Any, home: str, qualname: str) -> tuple[Place, ...]:
    """Return what runs when a module of a class is called, as places of `Originals`.

    Args:
        cls: the class.
        home: name of the module that defines its forward.
        qualname: name of the forward inside of it.
    """
    module = "torch.nn.modules.module"
    return (
        (cls, "__call__", module, "Module._wrapped_call_impl"),
        (cls, "_call_impl", module, "Module._call_impl"),
        (cls, "forward", home, qualname),
    )


class Originals:
    """Functions that a faster way replaces, looked at before every use.

    Args:
        places: (owner, name, home, qualname): owner.name must be what `is_own` says of the last two.
    """

    def __init__(self, *places: Place) -> None:
        self._places = places
        # (owner, name, function, its code), as last found to be right; what is still the same needs no second look.
        self._found: tuple[tuple[Any, str, Any, Any], ...] = ((self, "replaced", None, None),)

    def replaced(self) -> str | None:
        """Return which function is not its maker's own any more, as a clause of a message; None if all are."""
        for owner, name, function, code in self._found:
            now: Any = getattr(owner, name, None)
            if now is not function or (code is not None and now.__code__ is not code):
                return self._look()
        return None

    def _look(self) -> str | None:
        found = []
        for owner, name, home, qualname in self._places:
            function = getattr(owner, name, None)
            if not is_own(function, home, qualname):
                where = getattr(owner, "__name__", type(owner).__name__)
                return f"{where}.{name} was replaced by {described(function)}"
            found.append((owner, name, function, getattr(function, "__code__", None)))
        self._found = tuple(found)
        return None


def described(function: Any) -> str:
    """Return where a function comes from, for a message."""
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        return f"the {code.co_name} of {code.co_filename}:{code.co_firstlineno}"
    return f"a {type(function).__module__}.{type(function).__qualname__}"
