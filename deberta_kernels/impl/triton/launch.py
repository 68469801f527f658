"""Kernel launches made of an attention problem, each compiled or run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import Any

import torch
import triton
from torch import Tensor

from deberta_kernels.impl.common import Needs, empty_tokens, masked, mean_value
from deberta_kernels.impl.triton import direct, fences, tuning
from deberta_kernels.impl.triton.backward_plan import Backward
from deberta_kernels.impl.triton.kernels.forward_kernels import _disentangled_fwd_kernel
from deberta_kernels.impl.triton.plan import Call, Launch, Plan, expand_launch
from deberta_kernels.impl.triton.tensors import Tensors
from deberta_kernels.types import AttentionProblem

__all__ = [
    "Launch",
    "Plan",
    "backward_launches",
    "build",
    "build_side_by_side",
    "expand_launch",
    "forward_launches",
    "options",
    "run",
]


def run(launch: Launch) -> Any:
    """Run one launch on the current stream; return the compiled kernel, None in the interpreter."""
    form = direct.form_of(launch)
    if form is not None and (known := direct.launched(launch, form)) is not None:
        return known
    try:
        compiled = launch.kernel[launch.grid](**launch.arguments, **launch.constants, **options(launch))
        if form is not None:
            direct.remember(form, compiled)
        return compiled
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            _forget_failed_loading(_compiled(launch))
        raise


def build(launch: Launch) -> None:
    """Compile the kernel of a launch for the current device and load it, without running it.

    Raises:
        triton.runtime.errors.OutOfResources: the device has less memory than its tiles need.
    """
    compiled = _compiled(launch)
    if compiled is None:  # the interpreter compiles nothing
        return
    try:
        _ = compiled.run  # the property loads the kernel
    finally:
        _forget_failed_loading(compiled)


def build_side_by_side(launches: list[Launch]) -> None:
    """Compile the kernels of some launches for the current device, as many at once as there are cores.

    Most of a compilation is outside of Python: of several threads each has a core to itself. What fails here is left to
    `build`, which says why: Python before 3.12 may also fail to parse a source while another thread does
    (SystemError: AST constructor recursion depth mismatch).
    """
    distinct = {
        (x.kernel.__name__, x.num_warps, x.num_stages, *x.constants.values(), *map(_dtype, x.arguments.values())): x
        for x in launches
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def compile_all() -> None:
        with ThreadPoolExecutor(min(cores, len(distinct))) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for launch in distinct.values():
                _compiled(launch)

    # A context of its own: the caller may have one of Triton's modes active, of which there can be one.
    Context().run(compile_all)


def _dtype(x: Any) -> torch.dtype | None:
    return x.dtype if isinstance(x, Tensor) else None


def _compiled(launch: Launch) -> Any:
    return launch.kernel.warmup(**launch.arguments, **launch.constants, grid=launch.grid, **options(launch))


def _forget_failed_loading(compiled: Any) -> None:
    """Have Triton load a kernel again: it takes one for loaded as soon as it has tried to, and would launch nothing."""
    if compiled is not None and compiled.module is None:
        compiled._run = None


def options(launch: Launch) -> dict[str, Any]:
    """Return what to compile a kernel with; call it first."""
    if launch.constants.get("FENCED"):
        fences.let_triton_add()
    # Triton's default for fusing products and sums depends on its version; the bounds on the code hold with fusion.
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}


def forward_launches(
    problem: AttentionProblem, device_key: str, config: tuning.TileConfig | None = None, precision: str = "ieee",
    tensors: Tensors | None = None,
) -> Plan:  # fmt: skip
    """Plan a forward.

    Args:
        problem: the call; tensors may be on the `meta` device.
        device_key: of the device that will run it, see `tuning.device_key`.
        config: tiles to use instead of the table's.
        precision: of float32 products: "ieee" or "tf32".
        tensors: those of the problem, where it shall be noted how others are made of them.

    Returns:
        a plan whose results are out: (B, H, Nq, D), a view of (B, Nq, H, D) memory, and lse: (B, H, Nq) float32.
    """
    config = config or tuning.config(device_key, problem.q.dtype, problem.q.shape[-1], "forward")
    call = Call(problem, config, precision, device_key, tensors)
    q = problem.q
    out = call.tensors.made(empty_tokens, (q,))
    lse = call.tensors.empty(*q.shape[:3], dtype=torch.float32, device=q.device)
    mean = call.tensors.made(mean_value, (problem.v,)) if masked(problem) else call.nothing(torch.float32)
    tables = call.tables()
    call.add(
        _disentangled_fwd_kernel,
        (call.batch * call.heads * call.row_tiles,),
        {
            **call.tokens("q", "k", "v"), **call.key_masks(), **call.query_mask(), **tables,
            "out_ptr": out, "lse_ptr": lse, "mean_ptr": mean, "row_tiles": call.row_tiles,
        },
    )  # fmt: skip
    return Plan(call.launches, (out, lse), call.tensors)


def backward_launches(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs,
    device_key: str, config: tuning.TileConfig | None = None, precision: str = "ieee", tensors: Tensors | None = None,
) -> Plan:  # fmt: skip
    """Plan a backward.

    Args:
        problem: what the forward got.
        dout: (B, H, Nq, D), any strides.
        dlse: (B, H, Nq) float32 or None.
        out: what the forward returned.
        lse: what the forward returned.
        needs: whether q, k, v, pos_key and pos_query need a gradient.
        device_key: as in `forward_launches`.
        config: as there.
        precision: as there.
        tensors: those of the problem, then dout, dlse, out and lse; as there.

    Returns:
        a plan whose results are `Gradients`.
    """
    config = config or tuning.config(device_key, problem.q.dtype, problem.q.shape[-1], "backward")
    return Backward(problem, config, precision, device_key, tensors, dout, needs).plan(out, lse, dlse)
