"""Run the CUDA C++ forward of csrc/cuda on a Hopper GPU, over the driver; it has no backward of its own.

Proven in emulation (`tests/cuda_emulation`), not yet run on a device.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deberta_kernels.impl.cuda import driver, image
from deberta_kernels.impl.cuda.arguments import Arguments, ForwardInfo, expand, grid
from deberta_kernels.types import AttentionProblem, PositionSpec

__all__ = ["NAME", "forward", "prepare", "refusal", "status"]

NAME = "cuda"

# The kernels use instructions that exist in sm_90a only.
_CAPABILITY = (9, 0)
_MOST = (1 << 31) - 1  # blocks of a grid; tokens


class _Loaded(NamedTuple):
    module: driver.Module
    info: ForwardInfo


# (device, dtype, head size): the module, or why none could be loaded.
_loaded: dict[tuple[int, torch.dtype, int], _Loaded | str] = {}
_lock = threading.Lock()


def refusal(problem: AttentionProblem) -> str | None:
    """Return why the CUDA kernels cannot run `problem`, or None when they can.

    The module of a call is loaded here, once per device, dtype and head size, and compiled if need be.
    """
    q = problem.q
    if q.device.type != "cuda":
        return f"it runs on cuda tensors, not {q.device.type}"
    if q.dtype not in image.DTYPES:
        return f"it computes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in image.HEAD_DIMS:
        return f"head_dim {q.shape[-1]} is not one of {', '.join(map(str, image.HEAD_DIMS))}"
    if problem.scale <= 0:
        return "the scale is not positive"
    if type(q) not in (Tensor, torch.nn.Parameter):
        return None  # without values there is perhaps no device either
    found = _load(q)
    if isinstance(found, str):
        return found
    blocks = grid(problem, found.info.rows)[0]
    if max(blocks, q.shape[2], problem.k.shape[2]) > _MOST:
        return f"{blocks} blocks, {q.shape[2]} queries or {problem.k.shape[2]} keys are more than {_MOST}"
    return None


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `AttentionProblem`.

    Returns:
        out: (B, H, Nq, D) view of memory laid out (B, Nq, H, D), dtype of q.
        lse: (B, H, Nq) float32, natural log.
    """
    q = problem.q
    found = _need(q)
    batch, heads, nq, head_dim = q.shape
    out = torch.empty(batch, nq, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, nq, dtype=torch.float32, device=q.device)
    arguments = Arguments(problem, found.info, driver.driver().encode, out, lse)
    name = image.kernel(q.dtype, head_dim, problem.masks.pair is not None, problem.dropout_p > 0)
    found.module.launch(name, arguments, _stream(q.device))
    return out.transpose(1, 2), lse


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
    return expand(pos_key, pos_query, position, _need(table).info.table_margin)


def status() -> dict[str, Any]:
    """Describe what there is: "driver": version of CUDA, or why there is none; "devices"; and `image.status`."""
    reason = driver.unavailable()
    if reason is not None:
        return {"driver": reason, "devices": [], **image.status()}
    found = driver.driver()
    capabilities = [".".join(map(str, found.capability(i))) for i in range(found.devices)]
    return {"driver": ".".join(map(str, found.version())), "devices": capabilities, **image.status()}


def _need(x: Tensor) -> _Loaded:
    found = _load(x)
    if isinstance(found, str):
        raise RuntimeError(f"the CUDA kernels cannot be loaded: {found}")
    return found


def _load(x: Tensor) -> _Loaded | str:
    """Return the module for tensors like this one, (..., D), or why there is none; the answer is remembered."""
    key = _ordinal(x.device), x.dtype, x.shape[-1]
    if key not in _loaded:
        with _lock:
            if key not in _loaded:
                try:
                    _loaded[key] = _loaded_module(*key)
                except driver.DriverError as error:
                    _loaded[key] = str(error)
    return _loaded[key]


def _loaded_module(device: int, dtype: torch.dtype, head_dim: int) -> _Loaded | str:
    opened = driver.driver()
    found = opened.capability(device)
    if found != _CAPABILITY:
        return "the GPU has compute capability {}.{}, it needs {}.{}".format(*found, *_CAPABILITY)
    names = tuple(image.kernel(dtype, head_dim, pair, dropout) for pair in (False, True) for dropout in (False, True))
    reasons = []
    for cubin in image.images(dtype, head_dim):
        try:
            if isinstance(cubin, image.ImageError):
                raise cubin
            info = image.forward_info(cubin)
            return _Loaded(driver.Module(opened, device, cubin, names, info.shared_bytes), info)
        except (image.ImageError, driver.DriverError) as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    """Return the address of the stream that torch computes on."""
    found: int = torch.cuda.current_stream(device).cuda_stream
    return found
