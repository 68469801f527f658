"""Which backends a run is asked to prove, and what each is made for: whatever of that does not run is a failure."""

from __future__ import annotations

import torch

from benchmarks.gpu.plan import Plan
from deberta_kernels.dtypes import SHORT_NAMES
from deberta_kernels.impl.cuda import modules
from deberta_kernels.testing.inputs import Case

__all__ = ["asked", "has_own_backward", "is_for"]


def asked(plan: Plan) -> tuple[str, ...]:
    """Return the backends of a run: the one it names, and the CUDA kernels on every device that they are made for."""
    others = ("cuda",) if _is_hopper(plan.device) and plan.backend != "cuda" else ()
    return (plan.backend, *others)


def _is_hopper(device: str) -> bool:
    if device == "cpu" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == modules.CAPABILITY


def is_for(backend: str, case: Case) -> bool:
    """Tell whether a backend computes problems of this dtype and head size, as its documentation says."""
    return backend != "cuda" or (
        SHORT_NAMES[case.dtype] in modules.DTYPES and case.head_dim in modules.HEAD_DIMS["forward"]
    )


def has_own_backward(backend: str, case: Case) -> bool:
    """Tell whether the gradients of a problem that `is_for` a backend are its own."""
    return backend != "cuda" or case.head_dim in modules.HEAD_DIMS["backward"]
