"""The tensors of one call: those it is given, and how its plan makes others of them.

A plan notes each step, so that a later call of the same form makes its own tensors by the same steps. Notes hold sizes,
dtypes and devices, and no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NOTHING", "Step", "Tensors"]

# The place of a tensor that stands for a pointer which is never followed.
NOTHING = -1


class Step(NamedTuple):
    """How one object is made: function(*objects at places, *constants)."""

    function: Callable[..., Any]
    places: tuple[int, ...]
    constants: tuple[Any, ...]


class Tensors:
    """The objects of one call, each at a place: first what it was given, then what its steps made.

    Attributes:
        steps: how the others were made, in their order.
        is_complete: every step is of objects that have a place.
    """

    def __init__(self, given: Sequence[Tensor | None] = ()) -> None:
        """Take the tensors of a call, no object twice: the next call may have two in its place."""
        self.steps: list[Step] = []
        self.is_complete = True
        self._count = len(given)
        self._places = {id(x): place for place, x in enumerate(given) if x is not None}
        self._alive: list[Any] = list(given)  # else another object might get the id of one

    def made(self, function: Callable[..., Any], parents: Sequence[Any] = (), *constants: Any) -> Any:
        """Make something by a step; a function that does not look at values, and does the same for the same sizes."""
        places = tuple(self._places.get(id(x), NOTHING) for x in parents)
        self.is_complete &= NOTHING not in places
        found = function(*parents, *constants)
        self.steps.append(Step(function, places, constants))
        self._note(found, self._count + len(self.steps) - 1)
        return found

    def readable(self, function: Callable[..., Tensor], x: Tensor, *constants: Any) -> Tensor:
        """Return function(x, ...), of functions that return x itself where it is as they want it."""
        found = function(x, *constants)
        return found if found is x else self.made(function, (x,), *constants)  # type: ignore[no-any-return]

    def same_start(self, view: Tensor, x: Tensor) -> Tensor:
        """Return a view of x that starts where x does: a kernel is given nothing else of it."""
        if id(x) in self._places:
            self._note(view, self._places[id(x)])
        return view

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised memory."""
        return self.made(_empty, (), size, dtype, device)  # type: ignore[no-any-return]

    def zeros(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros."""
        return self.made(_zeros, (), size, dtype, device)  # type: ignore[no-any-return]

    def nothing(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an empty tensor to stand for a pointer that is never followed."""
        found = torch.empty(0, dtype=dtype, device=device)
        self._note(found, NOTHING)
        return found

    def place_of(self, x: Any) -> int | None:
        """Return the place of an object; None where nobody noted how it is made."""
        return self._places.get(id(x))

    def _note(self, found: Any, place: int) -> None:
        self._places[id(found)] = place
        self._alive.append(found)


def _empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)
