"""What torch, the native library and the backends say of themselves; whatever fails is a line, never an error."""

from __future__ import annotations

from typing import Any

from deberta_kernels import native
from deberta_kernels.backends import BACKENDS
from deberta_kernels.native import absence

__all__ = ["backends", "gpus", "library", "torch_problem", "torch_threads"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_INSTALL_TORCH = "install it: `pip install torch`"


def torch_problem() -> str | None:
    """Return why torch cannot be used and what to do, or None when it can."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return f"torch is not installed; {_INSTALL_TORCH}"
        return f"torch does not import ({error}); {_INSTALL_TORCH}"
    except Exception as error:  # broken installations raise whatever they like
        return f"torch does not import ({type(error).__name__}: {error}); {_INSTALL_TORCH}"
    return None


def torch_threads(problem: str | None) -> dict[str, Any]:
    """Return "threads" and "torch_isa", the instruction set of PyTorch's own kernels; None without torch."""
    if problem is not None:
        return {"threads": None, "torch_isa": None}
    import torch

    return {"threads": torch.get_num_threads(), "torch_isa": torch.backends.cpu.get_cpu_capability()}


def library() -> dict[str, Any]:
    """Return `native.library_status`, and under "build" how the installed library was made."""
    try:
        status = native.library_status()
    except Exception as error:  # a broken installation is what this report is for
        status = native.status_without(f"{type(error).__name__}: {error}")
    record = absence.build_record()
    build = {name: record.get(name) for name in ("compiler", "compiler_version", "digest", "left_out", "not_built")}
    return {**status, "build": build}


def gpus(problem: str | None) -> list[str]:
    """Return how many GPUs torch counts; asking for their names would initialise them."""
    if problem is not None:
        return []
    import torch

    count = torch.cuda.device_count()
    return [f"{count} seen by torch"] if count else []


def backends(problem: str | None) -> dict[str, Any]:
    """Return "cuda", "self_test", "backends", "auto" and "chosen", see `info`; empty without torch."""
    if problem is not None:
        nothing: dict[str, Any] = {"driver": problem, "devices": [], "built": [], "sources": False, "nvrtc": ""}
        refused = dict.fromkeys(BACKENDS, problem)
        return {"cuda": nothing, "self_test": None, "backends": refused, "auto": None, "chosen": {}}
    from deberta_kernels.proof import self_test

    refusals = _refusals()
    chosen = _chosen()
    return {
        "cuda": _cuda(),
        "self_test": self_test.status(),
        "backends": refusals,
        "auto": chosen["float32"],
        "chosen": {"cpu": chosen},
    }


def _cuda() -> dict[str, Any]:
    from deberta_kernels.impl import cuda

    try:
        return cuda.status()
    except Exception as error:
        return {"driver": f"{type(error).__name__}: {error}", "devices": [], "built": [], "sources": False, "nvrtc": ""}


def _refusals() -> dict[str, str | None]:
    """Ask every backend about one plain call."""
    import torch

    from deberta_kernels import dispatch

    problem = dispatch.ordinary_call(torch.device("cpu"), torch.float32)
    refusals: dict[str, str | None] = {}
    for name in dispatch.BACKENDS:
        try:
            refusals[name] = dispatch.refusal(name, problem)
        except Exception as error:
            refusals[name] = f"{type(error).__name__}: {error}"
    return refusals


def _chosen() -> dict[str, str | None]:
    """Return which backend takes a plain call on the CPU, by dtype."""
    import torch

    from deberta_kernels import dispatch

    found: dict[str, str | None] = {}
    for dtype in _DTYPES:
        problem = dispatch.ordinary_call(torch.device("cpu"), getattr(torch, dtype))
        try:
            found[dtype] = dispatch.explain(problem).chosen
        except Exception:  # an unusable environment variable is shown under "environment"
            found[dtype] = None
    return found
