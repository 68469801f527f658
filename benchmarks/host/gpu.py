"""Host time of attention in Triton kernels: from the call to the driver, which launches nothing.

Kernels are compiled for a Hopper GPU, as on one; a stand-in for the driver takes the launches, on tensors of the CPU.
Beside it stands the attention layer of Hugging Face on meta tensors: what PyTorch takes to dispatch its operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from benchmarks.harness.clock import least_cpu_time
from benchmarks.harness.process import ROOT
from deberta_kernels import api
from deberta_kernels.testing import geometries, inputs
from deberta_kernels.testing.inputs import Case

__all__ = ["LENGTH", "absence", "measure"]

LENGTH = 128  # of the layer on meta tensors; ours has less, so that the tensors of the CPU take no time
_TOKENS = 16
_CALLS = 20  # in a row, so that reading the clock is no part of it
_ROUNDS = 40  # of which the fastest counts: others were interrupted


def absence() -> str | None:
    """Return why nothing can be measured here, or None."""
    return None if find_spec("triton") else "triton is not installed"


def _attention(case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a forward, and a forward with its backward."""
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    tensors = (problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query)
    leaves = [x.detach().requires_grad_() for x in tensors if x is not None]

    def attend(tensors: Any) -> Tensor:
        out: Tensor = api.run_attention(
            *tensors, masks=problem.masks, position=problem.position, scale=problem.scale,
            dropout_p=problem.dropout_p, backend="triton",
        )  # fmt: skip
        return out

    def forward() -> None:
        with torch.no_grad():
            attend(tensors)

    return forward, lambda: torch.autograd.grad(attend(leaves), leaves, dout)


def _eager() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the same of Hugging Face's layer, v3-base, on meta tensors."""
    with torch.device("meta"):
        layer = DisentangledSelfAttention(DebertaV2Config(**geometries.settings("v3-base"))).to(torch.bfloat16).eval()
        states = torch.empty(1, LENGTH, 768, dtype=torch.bfloat16, requires_grad=True)
        embeddings = torch.empty(512, 768, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
        positions = torch.zeros(1, LENGTH, LENGTH, dtype=torch.long)

    def attend() -> Tensor:
        found: Tensor = layer(states, mask, relative_pos=positions, rel_embeddings=embeddings)[0]
        return found

    def forward() -> None:
        with torch.no_grad():
            attend()

    def both() -> None:
        out = attend()
        torch.autograd.grad(out, [states, *layer.parameters()], torch.empty_like(out), allow_unused=True)

    return forward, both


def measure(rounds: int = _ROUNDS) -> dict[str, dict[str, float]]:
    """Return the CPU time of a call by candidate: "forward" and "forward + backward" in seconds, "launches" of both."""
    sys.path[:0] = [str(ROOT / "tools")]
    from ptx.drivers import triton_driver

    class Idle(triton_driver.Device):
        """A device that counts launches."""

        launches = 0

        def launch(self, key: str, grid: Any, arguments: list[Any]) -> None:
            self.launches += 1

    base = Case(batch=1, heads=1, nq=_TOKENS, dtype=torch.bfloat16)
    cases = {"triton": base, "triton, padding, dropout": Case(**{**vars(base), "mask": "right", "dropout_p": 0.1})}
    found = {}
    with triton_driver.standing_in(Idle(90)) as device:
        for name, case in cases.items():
            forward, both = _attention(case)
            forward(), both()  # compile
            before = device.launches
            forward()
            between = device.launches
            both()
            launches = {"launches": between - before, "launches, both": device.launches - between}
            found[name] = {**_times(forward, both, rounds), **launches}
    return {**found, "Hugging Face, on meta tensors": _times(*_eager(), rounds)}


def _times(forward: Callable[[], Any], both: Callable[[], Any], rounds: int) -> dict[str, float]:
    calls = {"forward": forward, "forward + backward": both}
    return {name: least_cpu_time(call, rounds, _CALLS) for name, call in calls.items()}
