"""Choose the backend of a call: the ordered candidates per device, why each was refused, and what has run so far."""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
import warnings
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from deberta_kernels import env
from deberta_kernels.types import AttentionProblem

__all__ = [
    "BACKENDS",
    "DebertaKernelsWarning",
    "Explanation",
    "backward_of",
    "check_backend",
    "choose",
    "count_call",
    "explain",
    "fallback",
    "load",
    "record_fallback",
    "refusal",
    "reset_stats",
    "stats",
]

# A new backend is one line here.
_MODULES = {
    "reference": "deberta_kernels.impl.reference",
    "torch": "deberta_kernels.impl.torch_tiled",
    "cpu": "deberta_kernels.impl.cpu",
    "triton": "deberta_kernels.impl.triton",
    "cuda": "deberta_kernels.impl.cuda",
}
BACKENDS = tuple(_MODULES)

# A backend whose backward may refuse what its forward runs: whose gradients such calls get. Both keep to one meaning of
# out and lse, all that a backward takes from a forward.
_BACKWARD = {"cuda": "triton"}

# What backend="auto" tries per device type, best first. The reference runs only when asked for by name.
# The CUDA kernels join the order, before Triton's, where a committed measurement shows them right and ahead: on those
# devices, dtypes and lengths. There is none yet, so they run when asked for by name.
_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
_ORDER_ELSEWHERE = ("torch",)


class DebertaKernelsWarning(UserWarning):
    """Warn about something the user can change: a slower path than the machine could run, with cause and remedy."""


_loaded: dict[str, ModuleType] = {}
_lock = threading.Lock()
_calls: dict[str, int] = dict.fromkeys(BACKENDS, 0)
_fallbacks: dict[str, int] = {}
_warned: set[str] = set()


def _renew_lock() -> None:
    """Forget the lock in a forked child: a thread that does not exist there may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)

_MAX_WARNED = 256
# A warning points at the nearest caller outside these packages.
_INSIDE = ("deberta_kernels", "torch", "transformers")


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
    """Import the module of one backend (`forward`, `backward`, `refusal`, perhaps `backward_refusal` and `prepare`).

    Raises:
        RuntimeError: its module does not import.
    """
    module = _loaded.get(name)
    if module is None:
        try:
            module = importlib.import_module(_MODULES[name])
        except (ImportError, OSError) as error:
            raise RuntimeError(f"the module of backend {name!r} does not load ({error})") from error
        _loaded[name] = module
    return module


def refusal(name: str, problem: AttentionProblem) -> str | None:
    """Return why backend `name` cannot run `problem`, or None when it can."""
    try:
        module = load(name)
    except RuntimeError as error:
        return str(error)
    reason: str | None = module.refusal(problem)
    if reason is None and _differentiated(problem) and (own := _backward_refusal(name, problem)) is not None:
        other = _BACKWARD[name]
        reason = refusal(other, problem)
        return None if reason is None else _neither(own, other, reason)
    return reason


def backward_of(name: str, problem: AttentionProblem) -> tuple[Any, AttentionProblem]:
    """Return the function that computes the gradients of backend `name`, and the problem to hand to it.

    Raises:
        NotImplementedError: its own backward cannot run this call, and neither can that of the other backend.
    """
    own = _backward_refusal(name, problem)
    if own is None:
        return load(name).backward, problem
    other = _BACKWARD[name]
    reason = refusal(other, problem)
    if reason is not None:
        raise NotImplementedError(f"backend {name!r}: {_neither(own, other, reason)}; pass backend='torch'.")
    return load(other).backward, replace(problem, prepared=None)  # that layout is of the forward's own


def _backward_refusal(name: str, problem: AttentionProblem) -> str | None:
    """Return why backend `name` leaves the gradients to that of `_BACKWARD`, or None when they are its own."""
    found: str | None = load(name).backward_refusal(problem) if name in _BACKWARD else None
    return found


def _neither(own: str, other: str, reason: str) -> str:
    return f"it cannot compute the gradients ({own}), and backend {other!r}, which would, cannot run: {reason}"


def _differentiated(problem: AttentionProblem) -> bool:
    inputs = (problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def choose(problem: AttentionProblem, backend: str = "auto", *, strict: bool = False) -> str:
    """Return the name of the backend that runs `problem`.

    Args:
        problem: the call; only shapes, dtypes and devices are looked at.
        backend: "auto" takes the first of the device's order that can run it and warns once about a faster one that
            was refused; a name takes that backend or raises.
        strict: raise instead of that warning.

    Raises:
        ValueError: `backend`, or the environment variable that forces one, is unknown.
        NotImplementedError: the backend asked for cannot run this call, and nothing else runs in its place; or strict,
            and a faster backend was refused.
    """
    asked_by = "backend"
    if backend == "auto":
        forced = env.forced_backend()
        if forced is None:
            return _automatic(problem, strict)
        backend, asked_by = forced, env.BACKEND
        if backend not in BACKENDS:
            raise ValueError(f"{env.BACKEND} must be one of {', '.join(BACKENDS)}, got {backend!r}; unset it.")
    else:
        check_backend(backend)
    if problem.q.is_meta:
        return backend  # shapes only: nothing will run
    reason = refusal(backend, problem)
    if reason is not None:
        raise NotImplementedError(
            f"{asked_by}={backend!r} cannot run this call: {reason}; "
            f"{'unset it' if asked_by == env.BACKEND else 'pass backend=' + repr('auto')} for the best one that can."
        )
    return backend


def _automatic(problem: AttentionProblem, strict: bool) -> str:
    skipped = ""
    device_type = problem.q.device.type
    for name in _ORDER.get(device_type, _ORDER_ELSEWHERE):
        reason = refusal(name, problem)
        if reason is None:
            if skipped:
                message = (
                    f"disentangled attention on {device_type} runs backend {name!r}, a slower one, because {skipped}; "
                    f"see `python -m deberta_kernels info` for what is active; backend={name!r} silences this."
                )
                if strict:
                    raise NotImplementedError(message)
                _warn_once(message)
            return name
        skipped += f"{', and ' if skipped else ''}backend {name!r}: {reason}"
    raise NotImplementedError(f"no backend can run this call on {device_type}: {skipped}.")


@dataclass(frozen=True)
class Explanation:
    """Say which backend would run a call, and why each other one would not.

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
    """Explain what `choose` would do with `problem`, without running, warning or counting anything.

    Args:
        problem: the call.
        backend: as in `choose`.

    Raises:
        ValueError: `backend`, or the environment variable that forces one, is unknown.
    """
    refusals = {name: refusal(name, problem) for name in BACKENDS}
    device_type = problem.q.device.type
    order = _ORDER.get(device_type, _ORDER_ELSEWHERE)
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
        chosen = next((name for name in order if refusals[name] is None), None)
        other = f"can run it, but {chosen!r} comes first on {device_type}"
    reasons = {}
    for name in BACKENDS:
        if name != chosen:
            idle = other if forced or name in order else f"runs on {device_type} only when asked for by name"
            reasons[name] = refusals[name] or idle
    return Explanation(chosen, reasons, _gradients_elsewhere(chosen, problem))


def _gradients_elsewhere(chosen: str | None, problem: AttentionProblem) -> str | None:
    own = _backward_refusal(chosen, problem) if chosen and _differentiated(problem) else None
    return None if own is None else f"backend {_BACKWARD[str(chosen)]!r} would compute its gradients: {own}"


def count_call(name: str) -> None:
    """Count one forward call that backend `name` computed."""
    with _lock:
        _calls[name] += 1


def record_fallback(reason: str) -> None:
    """Count one call that ran the original code instead of a kernel, for `reason`."""
    with _lock:
        _fallbacks[reason] = _fallbacks.get(reason, 0) + 1


def fallback(reason: str, remedy: str, strict: bool) -> None:
    """Note that a call is about to run the original code: count it, and warn once per reason.

    Args:
        reason: why no kernel runs, a clause without a full stop.
        remedy: what the user can change, a clause without a full stop.
        strict: raise instead.

    Raises:
        NotImplementedError: strict is True; nothing is counted.
    """
    message = f"{reason}; {remedy}."
    if strict:
        raise NotImplementedError(message)
    record_fallback(reason)
    _warn_once(f"deberta_kernels runs the original attention code: {message}")


def stats() -> dict[str, dict[str, int]]:
    """Return what has run since import, or since `reset_stats`.

    Returns:
        {"calls": {backend: forward calls it computed}, "fallbacks": {reason: calls that ran the original code}}.
        Calls are counted where they are computed: tracing a call counts nothing, recomputing one in a checkpoint does.
    """
    with _lock:
        return {"calls": dict(_calls), "fallbacks": dict(_fallbacks)}


def reset_stats() -> None:
    """Set every count of `stats` back to zero; warnings already given stay given."""
    with _lock:
        for name in _calls:
            _calls[name] = 0
        _fallbacks.clear()


def _warn_once(message: str) -> None:
    """Warn once per kind of message: numbers do not count, since sizes vary without end; nor is the memory endless."""
    kind = re.sub(r"\d+", "#", message)
    with _lock:
        if kind in _warned or len(_warned) >= _MAX_WARNED:
            return
        _warned.add(kind)
    warnings.warn(message, DebertaKernelsWarning, stacklevel=_caller_level())


def _caller_level() -> int:
    """Return the stacklevel at which the caller of this function warns at the code that uses the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    return level
