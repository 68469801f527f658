"""Give a module another class and back: a subclass of its own, so that it stays what it was in every other respect.

Parameters, buffers, hooks and everything else that lives on the instance are not touched, the class keeps its name,
and undoing is one assignment. No instance holds a closure, so deepcopy and pickle work; a pickled module is rebuilt
from its own class, the behaviour mixed into it, and the options.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from deberta_kernels.torch_state.onlookers import forward_below_accelerate

__all__ = [
    "ORIGINAL",
    "Swapped",
    "base_class",
    "forward_of",
    "is_swapped",
    "original_forward",
    "original_function",
    "swap",
    "undo",
]

# On a function that stands in for a class's forward: the function it replaced.
ORIGINAL = "__deberta_kernels_original__"


# One class for each (mixin, class from before, options), so that equal modules have equal types.
_classes: dict[tuple[Any, ...], type[nn.Module]] = {}


class Swapped:
    """What marks modules whose class was swapped; mixed in before the module's own class.

    A forward that is mixed in reads its class once, `cls = type(self)`, and takes the rest from there: another thread
    may give the module its own class back at any time.

    Attributes:
        swap_base: the class from before.
        swap_options: what the user chose, hashable and picklable.
    """

    swap_base: ClassVar[type[nn.Module]]
    swap_options: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as (mixin, class from before, options), since the class itself has no home in any module."""
        cls = type(self)
        reduced = super().__reduce_ex__(protocol)
        if not is_swapped(self):
            return reduced
        return (_rebuild, (cls.__mro__[1], cls.swap_base, self.swap_options), *reduced[2:])


def is_swapped(module: Any) -> bool:
    """Tell whether the module's very class is one that `swap` made, not a subclass of one."""
    return "swap_base" in vars(type(module))


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, or the one from before if it was swapped."""
    cls = type(module)
    before: type[nn.Module] = vars(cls).get("swap_base", cls)
    return before


def original_function(cls: type[nn.Module], name: str) -> Any:
    """Return a function of a class as it is now; where a stand-in of this package replaced it, the replaced one."""
    function = getattr(cls, name, None)
    return getattr(function, ORIGINAL, None) or function


def original_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward that a module of a class would run without this package, unbound, as it is now."""
    base: type[nn.Module] = getattr(cls, "swap_base", cls)
    forward: Callable[..., Any] = original_function(base, "forward")
    return forward


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the unbound forward that calling the module ends in; None if its instance hides the one of its class."""
    return forward_below_accelerate(module) if "forward" in module.__dict__ else type(module).forward


def swap(module: nn.Module, mixin: type[Swapped], options: Any) -> None:
    """Swap the module's class for a subclass that has `mixin` in front; swapping again only changes the options."""
    _assign(module, _swapped_class(mixin, base_class(module), options))


def undo(module: nn.Module) -> bool:
    """Give the module its class back; return whether it had been swapped.

    Raises:
        RuntimeError: something made a subclass of the swapped class since, which has to be undone first.
    """
    if not isinstance(module, Swapped):
        return False
    if not is_swapped(module):
        name = type(module).__name__
        raise RuntimeError(f"{name} is a subclass of a patched class, made after patching; undo that before unpatch().")
    _assign(module, base_class(module))
    return True


def _assign(module: nn.Module, cls: type[nn.Module]) -> None:
    before = type(module).forward
    module.__class__ = cls
    kept = module.__dict__.get("_old_forward")
    if isinstance(kept, types.MethodType) and kept.__self__ is module and kept.__func__ is before:
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)


def _swapped_class(mixin: type[Swapped], base: type[nn.Module], options: Any) -> type[nn.Module]:
    made = _classes.get((mixin, base, options))
    if made is not None:
        return made
    body = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "swap_base": base,
        # Among the attributes of a class, the exporter of torch 2.9 reads constants and properties only.
        "swap_options": property(lambda self: options),
    }
    return _classes.setdefault((mixin, base, options), type(base.__name__, (mixin, base), body))


def _rebuild(mixin: type[Swapped], base: type[nn.Module], options: Any) -> nn.Module:
    cls = _swapped_class(mixin, base, options)
    return cls.__new__(cls)
