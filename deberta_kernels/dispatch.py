"""The choice of a backend for one call, and why each other one was refused."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels import dtypes, env, native
from deberta_kernels.backends import BACKENDS, REGISTRY, order
from deberta_kernels.notices import DebertaKernelsWarning, warn_once
from deberta_kernels.proof import self_test
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = [
    "BACKENDS",
    "DebertaKernelsWarning",
    "Explanation",
    "backward_of",
    "check_backend",
    "choose",
    "explain",
    "load",
    "ordinary_call",
    "outlook",
    "prepare",
    "refusal",
]

_loaded: dict[str, ModuleType] = {}


def check_backend(backend: str) -> None:
    """Check that `backend` is a name this package knows.

    Raises:
        TypeError: backend is not a string.
        ValueError: backend is neither "auto" nor one of `BACKENDS`.
    """
    if backend in BACKENDS or backend == "auto":
        return
    expected = ", ".join(("auto", *BACKENDS))
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, one of {expected}, got {backend!r}; pass backend='auto'.")
    raise ValueError(f"backend must be one of {expected}, got {backend!r}; check the spelling.")


def load(name: str) -> ModuleType:
    """Import the module of one backend, see `Backend`.

    Raises:
        RuntimeError: its module does not import.
    """
    module = _loaded.get(name)
    if module is None:
        try:
            module = importlib.import_module(REGISTRY[name].module, PACKAGE)
        except (ImportError, OSError) as error:
            raise RuntimeError(f"the module of backend {name!r} does not load ({error})") from error
        _loaded[name] = module
    return module


def refusal(name: str, problem: AttentionProblem, *, backward: bool = False) -> str | None:
    """Return why backend `name` cannot run `problem`, or None when it can.

    Args:
        name: of the backend.
        problem: the call.
        backward: its gradients are wanted, even where no tensor says so.
    """
    module = _loaded.get(name)
    if module is None:
        try:
            module = load(name)
        except RuntimeError as error:
            return str(error)
    reason: str | None = module.refusal(problem)
    other = REGISTRY[name].gradients
    if reason is not None:
        return reason
    if other is not None and _differentiated(problem) and (own := _backward_refusal(name, problem)) is not None:
        reason = refusal(other, problem)
        if reason is not None:
            return _neither(own, other, reason)
    return _untested(name, problem, backward) if REGISTRY[name].self_tested else None


def _untested(name: str, problem: AttentionProblem, backward: bool) -> str | None:
    """Return why a backend must not answer on this device, see `self_test`."""
    # Whatever the mode: a compiled graph chooses without gradients what it will run with them.
    backward = backward or any(x is not None and x.requires_grad for x in _inputs(problem))
    own_gradients = backward and _backward_refusal(name, problem) is None
    return self_test.refusal(name, load(name), problem, own_gradients)


def backward_of(name: str, problem: AttentionProblem) -> tuple[Any, AttentionProblem]:
    """Return the function that computes the gradients of backend `name`, and the problem to hand to it.

    Raises:
        NotImplementedError: its own backward cannot run this call, and neither can that of the other backend.
    """
    own = _backward_refusal(name, problem)
    if own is None:
        return load(name).backward, problem
    other = str(REGISTRY[name].gradients)
    reason = refusal(other, problem, backward=True)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r}: {_neither(own, other, reason)}; pass backend='torch'.")
    return load(other).backward, problem.changed(prepared=None)  # that layout is of the forward's own


def _backward_refusal(name: str, problem: AttentionProblem) -> str | None:
    """Return why backend `name` leaves the gradients to another one, or None when they are its own."""
    if REGISTRY[name].gradients is None:
        return None
    found: str | None = load(name).backward_refusal(problem)
    return found


def _neither(own: str, other: str, reason: str) -> str:
    return f"it cannot compute the gradients ({own}), and backend {other!r}, which would, cannot run: {reason}"


def _differentiated(problem: AttentionProblem) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in _inputs(problem))


def _inputs(problem: AttentionProblem) -> tuple[torch.Tensor | None, ...]:
    return problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query


def choose(problem: AttentionProblem, backend: str = "auto", *, strict: bool = False, backward: bool = False) -> str:
    """Return the name of the backend that runs `problem`: the one place where that is decided.

    Args:
        problem: the call; only shapes, dtypes and devices are looked at.
        backend: "auto" takes the first of the device's order that can run it and warns once about a faster one that
            was refused; a name takes that backend or raises.
        strict: raise instead of that warning.
        backward: the gradients are about to be computed, even where no tensor says so.

    Raises:
        ValueError: `backend`, or the environment variable that forces one, is unknown.
        NotImplementedError: the backend asked for cannot run this call, and nothing else runs in its place; or strict,
            and a faster backend was refused.
    """
    asked_by = "backend"
    if backend == "auto":
        forced = env.forced_backend()
        if forced is None:
            return _automatic(problem, strict, backward)
        backend, asked_by = forced, env.BACKEND
        if backend not in BACKENDS:
            raise ValueError(f"{env.BACKEND} must be one of {', '.join(BACKENDS)}, got {backend!r}; unset it.")
    else:
        check_backend(backend)
    if problem.q.is_meta:
        return backend  # shapes only: nothing will run
    reason = refusal(backend, problem, backward=backward)
    if reason is not None:
        raise NotImplementedError(
            f"{asked_by}={backend!r} cannot run this call: {reason}; "
            f"{'unset it' if asked_by == env.BACKEND else 'pass backend=' + repr('auto')} for the best one that can."
        )
    return backend


def _automatic(problem: AttentionProblem, strict: bool, backward: bool) -> str:
    skipped = ""
    device_type = "cpu" if problem.q.is_cpu else problem.q.device.type  # which takes longer to ask
    for name in order(device_type):
        reason = refusal(name, problem, backward=backward)
        if reason is None:
            if skipped:
                costs = f"{REGISTRY[name].costs}; " if REGISTRY[name].costs else ""
                message = (
                    f"disentangled attention on {device_type} runs backend {name!r}, a slower one, because {skipped}; "
                    f"{costs}see `python -m deberta_kernels info` for what is active; backend={name!r} silences this."
                )
                if strict:
                    raise NotImplementedError(message)
                warn_once(message)
            return name
        skipped += f"{', and ' if skipped else ''}backend {name!r}: {reason}"
    raise NotImplementedError(f"no backend can run this call on {device_type}: {skipped}.")


def prepare(problem: AttentionProblem, backend: str = "auto", *, strict: bool = False) -> torch.Tensor | None:
    """Lay the position tables of `problem` out as the backend that will run it reads them, for many calls like it.

    Args:
        problem: one such call.
        backend: as in `choose`.
        strict: as in `choose`.

    Returns:
        for `AttentionProblem.prepared`; None where the backend reads tables as they are.

    Raises:
        ValueError: as in `choose`.
        NotImplementedError: as in `choose`.
    """
    name = choose(problem, backend, strict=strict)
    if not REGISTRY[name].prepares:
        return None
    prepared: torch.Tensor | None = load(name).prepare(problem.pos_key, problem.pos_query, problem.position)
    return prepared


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why each other one would not.

    Attributes:
        chosen: name of the backend that would run; None when the call would raise NotImplementedError.
        reasons: for every other backend, why it would not run.
        gradients: which other backend would compute the gradients, and why; None when the chosen one does so itself, or
            none are needed.
    """

    chosen: str | None
    reasons: dict[str, str]
    gradients: str | None = None

    def __str__(self) -> str:
        head = f"{self.chosen} would run" if self.chosen else "no backend would run: this call raises"
        head += f"; {self.gradients}" if self.gradients else ""
        return "\n".join([head, *(f"  not {name}: {reason}" for name, reason in self.reasons.items())])


def explain(problem: AttentionProblem, backend: str = "auto") -> Explanation:
    """Explain what `choose` would do with `problem`, without running it, warning or counting anything.

    Args:
        problem: the call.
        backend: as in `choose`.

    Raises:
        ValueError: `backend`, or the environment variable that forces one, is unknown.
    """
    refusals = {name: refusal(name, problem) for name in BACKENDS}
    device_type = problem.q.device.type
    automatic = order(device_type)
    forced = env.forced_backend() if backend == "auto" else backend
    if forced is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                chosen: str | None = choose(problem, backend)
            except NotImplementedError:
                chosen = None
        other = f"can run it, but {env.BACKEND + '=' if backend == 'auto' else 'backend='}{forced!r} was asked for"
    else:
        chosen = next((name for name in automatic if refusals[name] is None), None)
        other = f"can run it, but {chosen!r} comes first on {device_type}"
    reasons = {}
    for name in BACKENDS:
        if name != chosen:
            idle = other if forced or name in automatic else f"runs on {device_type} only when asked for by name"
            reasons[name] = refusals[name] or idle
    return Explanation(chosen, reasons, _gradients_elsewhere(chosen, problem))


def ordinary_call(device: torch.device, dtype: torch.dtype, heads: int = 12, head_dim: int = 64) -> AttentionProblem:
    """Return a call as models of this dtype and size make them, to ask backends about."""
    q = torch.zeros(1, heads, 8, head_dim, dtype=dtype, device=device)
    table = torch.zeros(heads, 512, head_dim, dtype=dtype, device=device)
    return AttentionProblem(q, q, q, table, table, Masks(), PositionSpec(), 1.0, max_seqlen=8)


def outlook(problem: AttentionProblem, backend: str = "auto") -> str:
    """Say which backend would run a call like this one, what that costs, and what keeps a faster one from it.

    Args:
        problem: the call.
        backend: as in `choose`.

    Returns:
        Text of one line, and one more for each faster backend of the device that cannot run.
    """
    call = f"{dtypes.name(problem.q.dtype)} on {problem.q.device}"
    try:
        found = explain(problem, backend)
    except ValueError as error:  # the environment variable
        return f"{call}: no backend: {error}"
    chosen, forced = found.chosen, env.forced_backend() if backend == "auto" else backend
    if chosen is None:
        return f"{call}: no backend" + (f": {forced!r} was asked for: {found.reasons[forced]}" if forced else "")
    variant = _variant() if chosen == "cpu" else ""
    asked = ", which was asked for" if forced else ""
    automatic = order(problem.q.device.type)
    faster = () if forced or chosen not in automatic else automatic[: automatic.index(chosen)]
    costs = f"; {REGISTRY[chosen].costs}" if faster and REGISTRY[chosen].costs else ""
    head = f"{call}: backend {chosen!r}{variant}{asked}{costs}"
    return "\n".join([head, *(f"  not {name!r}: {found.reasons[name]}" for name in faster)])


def _variant() -> str:
    status = native.library_status()
    return f", instruction set {status['isa']}" + (f" ({status['slower']})" if status["slower"] else "")


def _gradients_elsewhere(chosen: str | None, problem: AttentionProblem) -> str | None:
    own = _backward_refusal(chosen, problem) if chosen and _differentiated(problem) else None
    return None if own is None else f"backend {REGISTRY[str(chosen)].gradients!r} would compute its gradients: {own}"
