"""Attention in Triton kernels on a GPU, or in Triton's interpreter; triton is imported at the first call."""

from __future__ import annotations

import importlib.metadata
from functools import lru_cache

import torch
from torch import Tensor

from deberta_kernels import env
from deberta_kernels.dtypes import KERNEL_FLOATS
from deberta_kernels.impl.common import (
    Needs,
    device_refusal,
    dtype_refusal,
    head_dim_refusal,
    scale_refusal,
)
from deberta_kernels.torch_state.modes import is_plain_tensor
from deberta_kernels.types import AttentionProblem, Gradients, PositionSpec

__all__ = ["backward", "forward", "prepare", "refusal"]

# Six tiles of 32 rows by 256 numbers (16 rows in float32) are 96 KiB, of the 99 that sm_86 and sm_120 have.
_MAX_HEAD_DIM = 256
# The oldest Triton that the kernels are compiled and tested with.
_OLDEST = (3, 6)
# What the kernels are compiled for and counted (`make kernels-offline`), by compute capability and by name.
_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
_ARCHITECTURES = ("gfx942",)


def refusal(problem: AttentionProblem) -> str | None:
    """Return why the Triton kernels cannot run `problem`, or None when they can."""
    q = problem.q
    return (
        dtype_refusal(q.dtype, KERNEL_FLOATS)
        or head_dim_refusal(q.shape[-1], _MAX_HEAD_DIM)
        or scale_refusal(problem.scale)
        or _device_refusal(q.device, q.dtype)
        or _triton_refusal()
        or _compile_refusal(problem)
    )


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `AttentionProblem`.

    Returns:
        out: (B, H, Nq, D) view of memory laid out (B, Nq, H, D), dtype of q.
        lse: (B, H, Nq) float32, natural log.
    """
    from deberta_kernels.impl.triton import execute

    return execute.forward(problem)


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    """Compute the gradients asked for.

    dq, dk and dv of the same call are the same bits; those of the tables under `torch.use_deterministic_algorithms`.

    Args:
        problem: what forward got.
        dout: (B, H, Nq, D) dtype of q, any strides.
        dlse: (B, H, Nq) float32 or None.
        out: what forward returned.
        lse: what forward returned.
        needs: whether dq, dk, dv, dpos_key, dpos_query are wanted.
    """
    from deberta_kernels.impl.triton import execute

    return execute.backward(problem, dout, dlse, out, lse, needs)


def prepare(pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec) -> Tensor | None:
    """Expand the tables by distance, for reuse while they do not change.

    Args:
        pos_key: (H, rows, D) or None.
        pos_query: (H, rows, D) or None.
        position: see `PositionSpec`.

    Returns:
        (2, H, distances, D padded) in the dtype of the tables; None when there is nothing worth keeping.
    """
    from deberta_kernels.impl.triton import execute

    return execute.prepare(pos_key, pos_query, position)


@lru_cache(maxsize=1)
def _triton_refusal() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:
            version = importlib.metadata.version("pytorch-triton-rocm")
        except importlib.metadata.PackageNotFoundError:
            return "triton is not installed (pip install 'triton>=3.6')"
    oldest = ".".join(map(str, _OLDEST))
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return None if numbers >= _OLDEST else f"triton {version} is older than {oldest}"


def _compile_refusal(problem: AttentionProblem) -> str | None:
    if env.triton_interpreted() or not is_plain_tensor(problem.q):
        return None
    if problem.q.numel() == 0:  # nothing is launched, and what that says must not stay with the variant
        return None
    try:
        from deberta_kernels.impl.triton import execute
    except (ImportError, OSError) as error:
        return f"triton does not import ({error})"
    return execute.compile_refusal(problem)


def _device_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if env.triton_interpreted():
        if device.type != "cpu":
            return f"TRITON_INTERPRET is set, so it runs on cpu tensors, not {device.type}"
        return "Triton's interpreter does not compute bfloat16" if dtype == torch.bfloat16 else None
    return device_refusal(device, "cuda") or _capability_refusal(device)


@lru_cache(maxsize=32)
def _capability_refusal(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        architecture = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
        return None if architecture in _ARCHITECTURES else f"{architecture} is not one of {', '.join(_ARCHITECTURES)}"
    capability = torch.cuda.get_device_capability(device)
    if capability in _CAPABILITIES:
        return None
    known = ", ".join(f"{major}.{minor}" for major, minor in _CAPABILITIES)
    return f"compute capability {capability[0]}.{capability[1]} is not one of {known}"
