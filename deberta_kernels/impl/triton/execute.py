"""Planned launches, compiled and run, with smaller tiles where a device lacks the memory for the planned ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from deberta_kernels import notices
from deberta_kernels.impl.attempts import Attempts, FailedError, LastingError, cause_of, is_passing
from deberta_kernels.impl.common import Needs, has_positions, inputs
from deberta_kernels.impl.triton import launch, repeated, tuning
from deberta_kernels.impl.triton.compiled_before import compiled_before
from deberta_kernels.impl.triton.plan import mask_kind
from deberta_kernels.impl.triton.tables import device_tables
from deberta_kernels.impl.triton.tensors import Tensors
from deberta_kernels.torch_state.captures import check_not_capturing
from deberta_kernels.types import AttentionProblem, Gradients, Masks, PositionSpec

__all__ = ["backward", "compile_refusal", "forward", "prepare", "variant"]

# By variant: whether its kernels are compiled and loaded.
_compiled: Attempts[tuple[Any, ...], bool] = Attempts()
# Seconds of a compilation before a user is told.
_PATIENCE = 3.0
# How Triton reports what a driver answered: the source has compiled by then.
_OF_DRIVER = "Triton Error ["


def compile_refusal(problem: AttentionProblem) -> str | None:
    """Compile and load the kernels of a call, once per variant; return why that is not possible, or None.

    A compiler that fails on a device is found out here, where another backend can still be chosen, and not in the
    middle of a forward. The kernels of the backward are compiled with those of the forward where a gradient is needed.
    """
    try:
        _compiled.get(variant(problem), _compile, problem)
    except FailedError as error:
        return str(error)
    return None


def variant(problem: AttentionProblem) -> tuple[Any, ...]:
    """Return what the kernels of a call are compiled for: calls of one variant run the same ones."""
    q = problem.q
    features = (mask_kind(problem), has_positions(problem), problem.dropout_p > 0)
    gradients = None
    if _differentiated(problem):
        gradients = _needs(problem), torch.are_deterministic_algorithms_enabled()
    return q.device, q.dtype, q.shape[-1], *features, gradients, _precision(q.dtype)


def _differentiated(problem: AttentionProblem) -> bool:
    # Whatever the mode: a compiled graph chooses without gradients what it will run with them.
    for x in inputs(problem):  # noqa: SIM110, a generator would be a frame for each tensor
        if x is not None and x.requires_grad:
            return True
    return False


def _needs(problem: AttentionProblem) -> Needs:
    """Return which gradients the kernels are compiled for: without those of the tables they are others."""
    tables = (problem.pos_key, problem.pos_query)
    wanted = any(x is not None and x.requires_grad for x in tables)
    return True, True, True, wanted, wanted


def _compile(problem: AttentionProblem) -> bool:
    check_not_capturing(problem.q.device, "compile and load the Triton kernels")
    q, shapes = problem.q, _without_values(problem)
    key, precision = tuning.device_key(q.device), _precision(q.dtype)

    def forward_plan() -> launch.Plan:
        return launch.forward_launches(shapes, key, precision=precision)

    def backward_plan() -> launch.Plan:
        dout = torch.empty_like(out)
        return launch.backward_launches(shapes, dout, None, out, lse, _needs(problem), key, precision=precision)

    try:
        first = forward_plan()
        out, lse = first.results
        launches = [*first.launches, *(backward_plan().launches if _differentiated(problem) else ())]
        with notices.slow(_PATIENCE, f"compiling Triton kernels for {key}: once, then they are kept"), _on(q.device):
            launch.build_side_by_side(launches)
        _fitted(q, key, "forward", forward_plan, launch.build)
        if _differentiated(problem):
            _fitted(q, key, "backward", backward_plan, launch.build)
    except _TooLargeError as error:
        raise LastingError(str(error)) from error
    except Exception as error:  # the compiler raises errors of many kinds
        cause = cause_of(error)
        if is_passing(error) or str(error).startswith(_OF_DRIVER):
            text = f"its kernels cannot be compiled and loaded for {key} now, which a later call tries again ({cause})"
            raise FailedError(text, passing=True) from error
        raise FailedError(f"its kernels do not compile for {key} ({cause})") from error
    return True


def _without_values(problem: AttentionProblem) -> AttentionProblem:
    """Return the same problem with tensors that have shapes and strides only."""

    def empty(x: Tensor | None) -> Any:
        return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    names = ("q", "k", "v", "pos_key", "pos_query", "seed", "cu_seqlens", "prepared")
    masks = Masks(*(empty(x) for x in (problem.masks.key, problem.masks.query, problem.masks.pair)))
    seed = torch.empty(1, dtype=torch.int64, device="meta")  # not drawn yet when a backend is chosen
    tensors = {name: empty(getattr(problem, name)) for name in names}
    return replace(problem, masks=masks, **{**tensors, "seed": seed})


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `deberta_kernels.impl.triton.forward`."""

    def plan(key: str, precision: str, given: Sequence[Tensor | None]) -> launch.Plan:
        same = problem.with_tensors(given)
        return launch.forward_launches(same, key, precision=precision, tensors=Tensors(given))

    out, lse = _run(problem, "forward", (), None, plan)
    return out, lse


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    """Compute the gradients asked for; see `deberta_kernels.impl.triton.backward`."""

    def plan(key: str, precision: str, given: Sequence[Any]) -> launch.Plan:
        same, (dout, dlse, out, lse) = problem.with_tensors(given), given[-4:]
        return launch.backward_launches(
            same, dout, dlse, out, lse, needs, key, precision=precision, tensors=Tensors(given)
        )

    gradients: Gradients = _run(problem, "backward", (dout, dlse, out, lse), needs, plan)
    return gradients


def prepare(pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec) -> Tensor | None:
    """Expand the tables by distance; see `deberta_kernels.impl.triton.prepare`."""
    table = pos_key if pos_key is not None else pos_query
    if table is None:
        return None
    tables = device_tables(1, position, table.device)
    covered = tables.full_window()
    if covered is None:
        return None
    planned, expanded = launch.expand_launch(pos_key, pos_query, position, tables, covered, Tensors())
    with _on(table.device), compiled_before(table.device):
        launch.run(planned)
    return expanded


class _TooLargeError(RuntimeError):
    """A device lacks the memory for the smallest tiles."""


def _run(
    problem: AttentionProblem, direction: str, others: tuple[Tensor | None, ...], needs: Needs | None,
    plan: Callable[[str, str, Sequence[Tensor | None]], launch.Plan],
) -> Any:  # fmt: skip
    """Plan and run, or repeat what was planned for a call of the same form; return the results.

    Args:
        problem: the call.
        direction: as in `tuning`.
        others: what a backward is given besides.
        needs: which gradients.
        plan: plans for a device and a precision, of the tensors of `problem` and `others`, no object twice.
    """
    q = problem.q
    key, precision = tuning.device_key(q.device), _precision(q.dtype)
    given = (*problem.tensors(), *others)
    with _on(q.device):
        known = repeated.known(_form_of(problem, given, direction, needs, key, precision))
        if known is not None:
            return known.run(given)
    compiled: list[Any] = []
    apart = repeated.told_apart(given)

    def planned() -> launch.Plan:
        compiled.clear()
        return plan(key, precision, apart)

    try:
        with compiled_before(q.device):
            done = _fitted(q, key, direction, planned, lambda step: compiled.append(launch.run(step)))
        with _on(q.device):  # tiles may have shrunk, and the first launch adds a hook to the compiler
            repeated.keep(_form_of(problem, given, direction, needs, key, precision), done, compiled)
        return done.results
    except _TooLargeError as error:
        raise RuntimeError(f"{error}; pass backend='torch'.") from error


def _form_of(
    problem: AttentionProblem, given: Sequence[Tensor | None], direction: str, needs: Needs | None, key: str,
    precision: str,
) -> Hashable | None:  # fmt: skip
    config = tuning.config(key, problem.q.dtype, problem.q.shape[-1], direction)
    return repeated.form_of(problem, given, direction, needs, config, precision)


def _fitted(
    q: Tensor, key: str, direction: str, plan: Callable[[], launch.Plan], each: Callable[[launch.Launch], None]
) -> launch.Plan:
    """Plan, and run or build each launch; where a device lacks the memory, plan smaller tiles and remember them."""
    dtype, head_dim = q.dtype, q.shape[-1]
    while True:
        config = tuning.config(key, dtype, head_dim, direction)
        planned = plan()
        try:
            with _on(q.device):
                for step in planned.launches:
                    each(step)
            return planned
        except OutOfResources as error:
            if tuning.shrunk(key, dtype, head_dim, direction, config) is None:
                raise _TooLargeError(
                    f"the {direction} kernel for head_dim {head_dim} in {dtype} does not fit this device even with "
                    f"its smallest tiles ({error})"
                ) from error


def _on(device: torch.device) -> torch.cuda.device:
    """Make the tensors' device the current one: Triton launches on that."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 products are computed: as torch computes its own, whichever of its settings says so."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
