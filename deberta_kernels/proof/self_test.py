"""The self-test of a GPU backend: the first use of a variant on a device that no committed result covers.

A small problem of the variant runs on the device and is held to the error budget; its truth and its yardstick are
computed on the CPU, where the device cannot spoil them. What is right is kept for later processes (`record`), what is
wrong is refused for the rest of this one, and then another backend answers.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deberta_kernels import env
from deberta_kernels.impl.attempts import Attempts, FailedError
from deberta_kernels.proof import record
from deberta_kernels.proof.variants import Variant, drawn, on_device, variant_of
from deberta_kernels.torch_state import captures
from deberta_kernels.torch_state.apart import ThreadError, apart
from deberta_kernels.torch_state.modes import is_plain_tensor
from deberta_kernels.types import AttentionProblem

__all__ = ["refusal", "status"]

_TESTED_DEVICES = "cuda"
_GRADIENTS = ("dq", "dk", "dv", "dpos_key", "dpos_query")

# By device and variant: None where it is right, else why it is refused.
_found: dict[tuple[torch.device, Variant], str | None] = {}
# What is wrong with an answer, or "". A test that could not run is not repeated with every call.
_attempts: Attempts[tuple[torch.device, Variant], str] = Attempts()
# A finalizer may call attention in the thread that tests.
_lock = threading.RLock()


def _renew_lock() -> None:
    """Forget the lock in a forked child: a thread that does not exist there may have held it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


def refusal(name: str, backend: ModuleType, problem: AttentionProblem, backward: bool) -> str | None:
    """Return why a backend must not answer a call on this device, or None when it is known to be right.

    Args:
        name: of the backend.
        backend: its module; it does not refuse the call itself.
        problem: the call.
        backward: whether the backend computes its gradients as well.

    Raises:
        ValueError: the environment variable that turns self-tests off has an unknown value.
        CaptureError: a CUDA graph is being captured, and the variant has not been tested.
    """
    device = problem.q.device
    if device.type != _TESTED_DEVICES or not is_plain_tensor(problem.q):
        return None  # a tensor without values may have no device either, and nothing will run
    variant = variant_of(name, problem, backward)
    found = _found.get((device, variant), "")
    if found is None or not env.self_tests():
        return None
    return found or _tested(backend, variant, device)


def status() -> dict[str, Any]:
    """Describe the self-tests.

    Returns:
        "on": whether they run, or what is wrong with the variable that says so; "covered": how many devices and
        backends committed results prove; "kept": how many proofs are kept in the cache folder; "refused": what this
        process refuses.
    """
    try:
        on: bool | str = env.self_tests()
    except ValueError as error:
        on = str(error)
    refused = sorted({reason for reason in _found.values() if reason is not None})
    return {"on": on, "covered": len(record.covered()), "kept": record.kept(), "refused": refused}


def _tested(backend: ModuleType, variant: Variant, device: torch.device) -> str | None:
    """Look a variant up or test it, one at a time; return why it is refused."""
    with _lock:
        key = device, variant
        if key in _found:
            return _found[key]
        identity = record.identity(variant.backend, device)
        if record.known(variant, identity):
            _found[key] = None
            return None
        if (unknown := _attempts.believed(key)) is not None:
            return _untold(unknown)
        captures.check_not_capturing(device, f"test itself ({env.SELF_TEST}=0 turns that off)")
        _settle(device)
        try:
            _found[key] = _tell(_attempts.get(key, _test_apart, backend, variant, device), variant, identity)
        except FailedError as error:
            return _untold(str(error))
        if _found[key] is None:
            record.keep(variant, identity)
        return _found[key]


def _untold(reason: str) -> str:
    """Return the reason for a refusal until a test can run."""
    return f"its self-test on this device could not run now ({reason}); {env.SELF_TEST}=0 turns it off"


def _tell(wrong: str, variant: Variant, identity: record.Identity) -> str | None:
    """Return the reason for a refusal, with all that a report needs; None when nothing is wrong."""
    if not wrong:
        return None
    return (
        f"its self-test on this device failed: {wrong} ({variant}; {record.described(identity)}); please report this "
        f"sentence to the maintainers; {env.SELF_TEST}=0 turns the test off"
    )


def _test_apart(backend: ModuleType, variant: Variant, device: torch.device) -> str:
    """Test as `_test` does, but with nothing that the caller has set for its thread."""
    try:
        return apart(_test, backend, variant, device)
    except ThreadError as error:
        raise FailedError(str(error), passing=True) from error


def _test(backend: ModuleType, variant: Variant, device: torch.device) -> str:
    """Run the problem of a variant; return what is wrong with the answer, or "".

    Raises:
        FailedError: it says nothing of the kernels, the next one may.
    """
    from deberta_kernels.proof import budget

    with ExitStack() as stack:
        try:
            problem, dout = drawn(variant)
            truth = budget.truth(problem, dout if variant.backward else None)
            if device.type == "cuda":
                # On a stream of its own: what is allocated on the caller's may come from the pool of a graph.
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            given = on_device(problem, variant.dtype, device)
            upstream = dout.to(device=device, dtype=variant.dtype)
        except Exception as error:  # nothing of the backend has run
            raise FailedError(_shown(error), passing=True) from error
        try:
            results = _answer(backend, given, upstream, variant)
        except Exception as error:
            if _lies_around(error):
                raise FailedError(_shown(error), passing=True) from error
            return f"it raised {_shown(error)}"
    # As float16 for TF32: see `drawn`.
    results = {name: x if name == "lse" else x.to(problem.q.dtype) for name, x in results.items()}
    wrong = [row for row in budget.measure(results, truth).rows if not row.ok]
    return ", ".join(
        f"{row.name} {row.problem or f'is off by {row.max_error:.1e} where {row.max_allowed:.1e} is allowed'}"
        for row in wrong
    )


def _answer(backend: ModuleType, problem: AttentionProblem, dout: Tensor, variant: Variant) -> dict[str, Tensor]:
    """Return the results and gradients by name, copied to the CPU: errors of the device show while it waits."""
    with torch.no_grad():
        out, lse = backend.forward(problem)
        found = {"out": out, "lse": lse}
        if variant.backward:
            needs = (True, True, True, variant.positions, variant.positions)
            gradients = backend.backward(problem, dout, None, out, lse, needs)
            found.update(zip(_GRADIENTS, gradients, strict=True))
        return {name: x.cpu() for name, x in found.items() if x is not None}


def _settle(device: torch.device) -> None:
    """Wait for what the caller has launched: its errors are raised here, and not taken for those of the test."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _lies_around(error: BaseException) -> bool:
    """Tell whether an error is about memory, a file or the moment, and not about the answer."""
    of_the_moment = isinstance(error, MemoryError | OSError | torch.OutOfMemoryError) or getattr(
        error, "passing", False
    )
    return bool(of_the_moment) or "out of memory" in str(error)


def _shown(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
