"""Modules with a patched class: a subclass of their own, so that they stay what they were in every other respect.

Parameters, buffers, hooks and everything else that lives on the instance are not touched, the class keeps its name,
and undoing is one assignment. No instance holds a closure, so deepcopy and pickle work; a pickled module is rebuilt
from its own class, the behaviour mixed into it, and the options.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from deberta_kernels.torch_state.onlookers import forward_below_accelerate, own_forward_bound

__all__ = [
    "ORIGINAL",
    "Patched",
    "base_class",
    "forward_of",
    "has_patched_class",
    "original_forward",
    "original_function",
    "patch_class",
    "restore_class",
]

# On a function that replaces a class's forward: the function it replaced.
ORIGINAL = "__deberta_kernels_original__"


# One class for each (mixin, class from before, options), so that equal modules have equal types.
_classes: dict[tuple[Any, ...], type[nn.Module]] = {}


class Patched:
    """A forward to be mixed in before a module's own class.

    A forward that is mixed in reads its class once, `cls = type(self)`, and takes the rest from there: another thread
    may give the module its own class back at any time.

    Attributes:
        patched_from: the class from before.
        patch_options: what the user chose, hashable and picklable.
    """

    patched_from: ClassVar[type[nn.Module]]
    patch_options: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as (mixin, class from before, options), since the class itself has no home in any module."""
        cls = type(self)
        reduced = super().__reduce_ex__(protocol)
        if not has_patched_class(self):
            return reduced
        return (_rebuild, (cls.__mro__[1], cls.patched_from, self.patch_options), *reduced[2:])


def has_patched_class(module: Any) -> bool:
    """Tell whether the module's very class is one that `patch_class` made, not a subclass of one."""
    return "patched_from" in vars(type(module))


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, or the one from before if that was patched."""
    cls = type(module)
    before: type[nn.Module] = vars(cls).get("patched_from", cls)
    return before


def original_function(cls: type[nn.Module], name: str) -> Any:
    """Return a function of a class as it is now; where this package replaced it, the replaced one."""
    function = getattr(cls, name, None)
    return getattr(function, ORIGINAL, None) or function


def original_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward that a module of a class would run without this package, unbound, as it is now."""
    base: type[nn.Module] = getattr(cls, "patched_from", cls)
    forward: Callable[..., Any] = original_function(base, "forward")
    return forward


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the unbound forward that calling the module ends in; None if its instance hides the one of its class."""
    if "forward" not in module.__dict__ or own_forward_bound(module) is not None:
        return type(module).forward
    return forward_below_accelerate(module)


def patch_class(module: nn.Module, mixin: type[Patched], options: Any) -> None:
    """Patch the module's class by a subclass that has `mixin` in front; again: only change the options."""
    _assign(module, _patched_class(mixin, base_class(module), options))


def restore_class(module: nn.Module) -> bool:
    """Give the module its class back; return whether it had been patched.

    Raises:
        RuntimeError: something made a subclass of the patched class since, which has to be undone first.
    """
    if not isinstance(module, Patched):
        return False
    if not has_patched_class(module):
        name = type(module).__name__
        raise RuntimeError(f"{name} is a subclass of a patched class, made after patching; undo that before unpatch().")
    _assign(module, base_class(module))
    return True


def _assign(module: nn.Module, cls: type[nn.Module]) -> None:
    before = type(module).forward
    module.__class__ = cls
    for name in ("_old_forward", "forward"):  # accelerate's; that of `kernels` where it has no layer to put there
        kept = module.__dict__.get(name)
        if isinstance(kept, types.MethodType) and kept.__self__ is module and kept.__func__ is before:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _patched_class(mixin: type[Patched], base: type[nn.Module], options: Any) -> type[nn.Module]:
    made = _classes.get((mixin, base, options))
    if made is not None:
        return made
    body = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "patched_from": base,
        # Among the attributes of a class, the exporter of torch 2.9 reads constants and properties only.
        "patch_options": property(lambda self: options),
    }
    return _classes.setdefault((mixin, base, options), type(base.__name__, (mixin, base), body))


def _rebuild(mixin: type[Patched], base: type[nn.Module], options: Any) -> nn.Module:
    cls = _patched_class(mixin, base, options)
    return cls.__new__(cls)
