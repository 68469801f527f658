"""Calls like one before: its launches again, with the tensors of this call, and no plan.

Planning a call and asking for the form of each launch takes several times as long as the launches. Everything that a
plan looks at is the form of the call; calls of one form differ by the addresses and values of their tensors alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deberta_kernels.impl.common import Needs
from deberta_kernels.impl.triton.direct import is_watched
from deberta_kernels.impl.triton.kernels.forward_kernels import _disentangled_fwd_kernel
from deberta_kernels.impl.triton.plan import Launch, Plan
from deberta_kernels.impl.triton.tensors import NOTHING, Step
from deberta_kernels.impl.triton.tuning import TileConfig
from deberta_kernels.types import AttentionProblem

__all__ = ["form_of", "keep", "known", "told_apart"]

# Each length of a batch is a form of its own, and all layers of a model share it. One takes some 10 KB.
_MOST_FORMS = 512
_INTERPRETED = not isinstance(_disentangled_fwd_kernel, JITFunction)


class _Ready(NamedTuple):
    """A launch but for its tensors.

    Attributes:
        run: launches the compiled kernel.
        grid: programs per dimension, three.
        handles: what the driver is told of the compiled kernel.
        arguments: of the kernel in their order, 0 for a tensor.
        tensors: (number of the argument, place in `Tensors`) of those.
    """

    run: Any
    grid: tuple[int, int, int]
    handles: tuple[Any, ...]
    arguments: list[Any]
    tensors: tuple[tuple[int, int], ...]


class _Repeated(NamedTuple):
    """What a call of one form does.

    Attributes:
        steps: how the tensors are made that it is not given.
        launches: what is launched then.
        kernels: the jitted functions of these.
        kind: of the results, a tuple.
        results: their places; None for None.
    """

    steps: list[Step]
    launches: list[_Ready]
    kernels: list[Any]
    kind: Any
    results: list[int | None]

    def run(self, given: Sequence[Tensor | None]) -> Any:
        """Launch everything on the current device and stream; return the results."""
        values: list[Any] = list(given)
        for function, places, constants in self.steps:
            parents = map(values.__getitem__, places) if places else ()
            values.append(function(*parents, *constants))
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        for run, grid, handles, template, tensors in self.launches:
            arguments = template.copy()
            for number, place in tensors:
                arguments[number] = values[place]
            run(*grid, stream, *handles, None, None, None, *arguments)  # nobody watches: no metadata, no hooks
        return self.kind([None if place is None else values[place] for place in self.results])


_known: dict[Hashable, _Repeated] = {}


def form_of(
    problem: AttentionProblem, given: Sequence[Tensor | None], direction: str, needs: Needs | None, config: TileConfig,
    precision: str,
) -> Hashable | None:  # fmt: skip
    """Return everything that the plan of a call on the current device looks at; None in the interpreter.

    Args:
        problem: the call.
        given: its tensors, and those that a backward takes besides.
        direction: as in `tuning`.
        needs: which gradients, of a backward.
        config: the tiles.
        precision: of float32 products.
    """
    if _INTERPRETED:
        return None
    return (
        direction, driver.active.get_current_device(), None if needs is None else tuple(needs), config, precision,
        torch.are_deterministic_algorithms_enabled(), knobs.runtime.debug, knobs.runtime.add_stages_inspection_hook,
        problem.position, problem.scale, problem.dropout_p, problem.max_seqlen,
        *[
            None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.is_neg())
            for x in given
        ],
    )  # fmt: skip


def known(form: Hashable | None) -> _Repeated | None:
    """Return what calls of this form do; None where one must be planned, or is watched."""
    found = None if form is None else _known.get(form)
    return None if found is None or is_watched(*found.kernels) else found


def told_apart(given: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the same tensors, no object twice: another call of the form may have two in its place."""
    found: list[Tensor | None] = []
    for x in given:
        found.append(x.detach() if x is not None and any(x is other for other in found) else x)
    return found


def keep(form: Hashable | None, plan: Plan, compiled: Sequence[Any]) -> None:
    """Keep a plan that was run for calls of the same form.

    Args:
        form: what `form_of` returned.
        plan: its tensors were told apart.
        compiled: the kernel of each launch; None in the interpreter.
    """
    if form is None:
        return
    tensors = plan.tensors
    results = [None if x is None else tensors.place_of(x) for x in plan.results]
    ready = [_ready(launch, kernel, plan) for launch, kernel in zip(plan.launches, compiled, strict=True)]
    launches = [x for x in ready if x is not None]
    complete = tensors.is_complete and len(launches) == len(ready) and results.count(None) == plan.results.count(None)
    kernels = [launch.kernel for launch in plan.launches]
    # AMD's kernels are compiled for the size of what a tensor is a part of, which is not in the form.
    if not complete or torch.version.hip is not None or is_watched(*kernels):
        return
    while len(_known) >= _MOST_FORMS:
        _known.pop(next(iter(_known)), None)
    kind = getattr(type(plan.results), "_make", tuple)
    _known[form] = _Repeated(tensors.steps, launches, kernels, kind, results)


def _ready(launch: Launch, compiled: Any, plan: Plan) -> _Ready | None:
    """Return a launch without its tensors; None where nobody noted how one of these was made."""
    if compiled is None:
        return None
    given, arguments, tensors = {**launch.arguments, **launch.constants}, [], []
    for number, name in enumerate(launch.kernel.arg_names):
        value = given[name]
        if isinstance(value, Tensor):
            place = plan.tensors.place_of(value)
            if place is None:
                return None
            if place != NOTHING:
                tensors.append((number, place))
            value = 0
        arguments.append(value)
    x, y, z = (*launch.grid, 1, 1)[:3]
    handles = compiled.function, compiled.packed_metadata
    return _Ready(compiled.run, (x, y, z), handles, arguments, tuple(tensors))
