"""Run planned launches, with smaller tiles where a device lacks the memory for the planned ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from deberta_kernels.impl.triton import launch, tuning
from deberta_kernels.impl.triton.tables import device_tables, full_window
from deberta_kernels.types import AttentionProblem, Gradients, PositionSpec

__all__ = ["backward", "forward", "prepare"]


def forward(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Compute attention; see `deberta_kernels.impl.triton.forward`."""
    key, precision = tuning.device_key(problem.q.device), _precision(problem.q)
    out, lse = _run(problem, key, "forward", lambda: launch.forward_launches(problem, key, precision=precision)).results
    return out, lse


def backward(
    problem: AttentionProblem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    needs: tuple[bool, bool, bool, bool, bool],
) -> Gradients:  # fmt: skip
    """Compute the gradients asked for; see `deberta_kernels.impl.triton.backward`."""
    key, precision = tuning.device_key(problem.q.device), _precision(problem.q)

    def plan() -> launch.Plan:
        return launch.backward_launches(problem, dout, dlse, out, lse, needs, key, precision=precision)

    gradients: Gradients = _run(problem, key, "backward", plan).results
    return gradients


def prepare(pos_key: Tensor | None, pos_query: Tensor | None, position: PositionSpec) -> Tensor | None:
    """Expand the tables by distance; see `deberta_kernels.impl.triton.prepare`."""
    table = pos_key if pos_key is not None else pos_query
    if table is None:
        return None
    tables = device_tables(1, position, table.device)
    covered = full_window(tables)
    if covered is None:
        return None
    planned, expanded = launch.expand_launch(pos_key, pos_query, position, tables, covered)
    with _on(table.device):
        launch.run(planned)
    return expanded


def _run(problem: AttentionProblem, key: str, direction: str, plan: Callable[[], launch.Plan]) -> launch.Plan:
    """Plan and run; on a device with too little memory for the tiles, plan smaller ones and remember them."""
    dtype, head_dim = problem.q.dtype, problem.q.shape[-1]
    while True:
        config = tuning.config(key, dtype, head_dim, direction)
        planned = plan()
        try:
            with _on(problem.q.device):
                for step in planned.launches:
                    launch.run(step)
            return planned
        except OutOfResources as error:
            if tuning.shrunk(key, dtype, head_dim, direction, config) is None:
                raise RuntimeError(
                    f"the {direction} kernel for head_dim {head_dim} in {dtype} does not fit this device even with "
                    f"its smallest tiles ({error}); pass backend='torch'."
                ) from error


def _on(device: torch.device) -> torch.cuda.device:
    """Make the tensors' device the current one: Triton launches on that."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _precision(q: Tensor) -> str:
    """Return how float32 products are computed, as torch's own setting says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
