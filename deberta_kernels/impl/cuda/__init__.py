"""Attention in the CUDA C++ kernels of csrc/cuda on a Hopper GPU, over the driver.

Their PTX is executed by `tests/ptx`; they have not run on a device. What the backward refuses, `dispatch` gives to
another backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deberta_kernels.impl.attempts import Attempts, FailedError, LastingError, is_passing
from deberta_kernels.impl.common import (
    Needs,
    device_refusal,
    dtype_refusal,
    empty_results,
    scale_refusal,
)
from deberta_kernels.impl.cuda import driver, image
from deberta_kernels.impl.cuda.arguments import Arguments, ForwardInfo, Info, expand, grid
from deberta_kernels.impl.cuda.backward_arguments import CONVERSION_THREADS, BackwardArguments, BackwardInfo, plan
from deberta_kernels.impl.cuda.modules import CAPABILITY, HEAD_DIMS
from deberta_kernels.torch_state.captures import check_not_capturing
from deberta_kernels.torch_state.modes import is_plain_tensor
from deberta_kernels.types import AttentionProblem, Gradients, PositionSpec

__all__ = ["backward", "backward_refusal", "forward", "prepare", "refusal", "status"]

_MOST = (1 << 31) - 1  # blocks of a grid; tokens
# Of the sums that a deterministic backward keeps apart by sample: beyond 1 GiB they would be most of what a step takes.
_MOST_SUM_BYTES = 1 << 30
_INFOS: dict[str, type[Info]] = {"forward": ForwardInfo, "backward": BackwardInfo}


class _Loaded(NamedTuple):
    """A module on a device, and what it says of itself."""

    module: driver.Module
    info: Any  # ForwardInfo or BackwardInfo


# By ("forward" or "backward", device, dtype, head size).
_loaded: Attempts[tuple[str, int, torch.dtype, int], _Loaded] = Attempts()


def refusal(problem: AttentionProblem) -> str | None:
    """Return why the CUDA kernels cannot run `problem`, or None when they can.

    The module of a call is loaded here, once per device, dtype and head size, and compiled if need be.
    """
    q = problem.q
    reason = device_refusal(q.device, "cuda") or dtype_refusal(q.dtype, image.DTYPES) or scale_refusal(problem.scale)
    if reason is not None:
        return reason
    reason, found = _refusal("forward", q)
    if found is None:
        return reason
    return _size_refusal(problem, grid(problem, found.info.rows)[0])


def backward_refusal(problem: AttentionProblem) -> str | None:
    """Return why the CUDA kernels cannot differentiate a problem that their forward runs, or None when they can.

    The module of the backward is loaded here, as that of the forward in `refusal`.
    """
    reason, found = _refusal("backward", problem.q)
    if found is None:
        return reason
    planned = plan(problem, found.info, torch.are_deterministic_algorithms_enabled())
    size = planned.table_bytes(problem.q.shape[3])
    if planned.copies != (1, 1) and size > _MOST_SUM_BYTES:
        return f"the sums of its deterministic backward would take {size >> 20} MiB, more than {_MOST_SUM_BYTES >> 20}"
    return _size_refusal(problem, planned.blocks)


def _refusal(which: str, q: Tensor) -> tuple[str | None, _Loaded | None]:
    """Return why there is no module, and the module; neither for tensors without values, perhaps without a device."""
    if q.shape[-1] not in HEAD_DIMS[which]:
        known = ", ".join(map(str, HEAD_DIMS[which]))
        return f"head_dim {q.shape[-1]} is not {'one of ' if ',' in known else ''}{known}", None
    if not is_plain_tensor(q):
        return None, None
    found = _load(which, q)
    return (found, None) if isinstance(found, str) else (None, found)


def _size_refusal(problem: AttentionProblem, blocks: int) -> str | None:
    nq, nk = problem.q.shape[2], problem.k.shape[2]
    if max(blocks, nq, nk) > _MOST:
        return f"{blocks} blocks, {nq} queries or {nk} keys are more than {_MOST}"
    return None


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `AttentionProblem`.

    Returns:
        out: (B, H, Nq, D) view of memory laid out (B, Nq, H, D), dtype of q.
        lse: (B, H, Nq) float32, natural log.
    """
    q = problem.q
    found = _need("forward", q)
    out, lse = empty_results(q)
    arguments = Arguments(problem, found.info, driver.driver().encode, out.transpose(1, 2), lse)
    name = image.spec_of("forward", q.dtype, q.shape[3]).kernel(problem.masks.pair is not None, problem.dropout_p > 0)
    found.module.launch(name, arguments, arguments.blocks, _stream(q.device))
    return out, lse


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs
) -> Gradients:
    """Compute the gradients asked for.

    Sums over keys and over queries are added in any order, unless `torch.use_deterministic_algorithms` asks for one.

    Args:
        problem: what forward got.
        dout: (B, H, Nq, D) dtype of q, any strides.
        dlse: (B, H, Nq) float32 or None.
        out: what forward returned.
        lse: what forward returned.
        needs: whether dq, dk, dv, dpos_key, dpos_query are wanted.
    """
    q = problem.q
    found = _need("backward", q)
    deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = BackwardArguments(
        problem, dout, dlse, out, lse, found.info, driver.driver().encode, deterministic=deterministic
    )
    spec, stream = image.spec_of("backward", q.dtype, q.shape[3]), _stream(q.device)
    name = spec.kernel(problem.masks.pair is not None, problem.dropout_p > 0)
    found.module.launch(name, arguments, arguments.blocks, stream)
    if needs[0]:
        found.module.launch(spec.conversion, arguments, arguments.convert_blocks, stream)
    return arguments.gradients(needs)


def prepare(pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec) -> Tensor | None:
    """Expand the tables by distance, for reuse while they do not change.

    Args:
        pos_key: (H, rows, D) or None.
        pos_query: (H, rows, D) or None.
        position: see `PositionSpec`.

    Returns:
        (2, H, distances, D) in the dtype of the tables; None when there is nothing worth keeping.
    """
    table = pos_key if pos_key is not None else pos_query
    if table is None:
        return None
    return expand(pos_key, pos_query, position, _need("forward", table).info.table_margin)


def status() -> dict[str, Any]:
    """Describe what there is: "driver": version of CUDA, or why there is none; "devices"; and `image.status`."""
    reason = driver.unavailable()
    if reason is not None:
        return {"driver": reason, "devices": [], **image.status()}
    found = driver.driver()
    capabilities = [".".join(map(str, found.capability(i))) for i in range(found.devices)]
    return {"driver": ".".join(map(str, found.version())), "devices": capabilities, **image.status()}


def _need(which: str, x: Tensor) -> _Loaded:
    found = _load(which, x)
    if isinstance(found, str):
        raise RuntimeError(f"the CUDA kernels cannot be loaded: {found}")
    return found


def _load(which: str, x: Tensor) -> _Loaded | str:
    """Return the module for tensors like this one, (..., D), or why there is none."""
    key = which, _ordinal(x.device), x.dtype, x.shape[-1]
    try:
        return _loaded.get(key, _loaded_module, *key)
    except FailedError as error:
        return str(error)


def _loaded_module(which: str, device: int, dtype: torch.dtype, head_dim: int) -> _Loaded:
    check_not_capturing(torch.device("cuda", device), "load the CUDA kernels")
    opened = driver.driver()
    capability = opened.capability(device)
    if capability != CAPABILITY:
        text = "the GPU has compute capability {}.{}, it needs {}.{}"
        raise LastingError(text.format(*capability, *CAPABILITY))
    reasons, passing = [], False
    for cubin in image.images(which, dtype, head_dim):
        try:
            if isinstance(cubin, image.ImageError):
                raise cubin
            info: Any = image.info_of(cubin, _INFOS[which])
            kernels = _kernels(which, dtype, head_dim, info)
            return _Loaded(driver.Module(opened, device, cubin, kernels), info)
        except (image.ImageError, driver.DriverError) as error:
            if isinstance(error, driver.DriverError) and error.passing:
                raise
            reasons.append(str(error))
            passing = passing or is_passing(error)
    raise FailedError("; ".join(reasons), passing)


def _kernels(which: str, dtype: torch.dtype, head_dim: int, info: Any) -> dict[str, tuple[int, int]]:
    """Return the kernels of a module: threads of a block, bytes of dynamic shared memory."""
    spec = image.spec_of(which, dtype, head_dim)
    found = dict.fromkeys(spec.kernels, (info.threads, info.shared_bytes))
    if which == "backward":
        found[spec.conversion] = (CONVERSION_THREADS, 0)
    return found


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    """Return the address of the stream that torch computes on."""
    found: int = torch.cuda.current_stream(device).cuda_stream
    return found
