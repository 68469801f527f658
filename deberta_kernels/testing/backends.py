"""List what the operator suite tests: one line per backend, with its limits, and one way to run any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from deberta_kernels import api
from deberta_kernels.types import AttentionProblem

__all__ = ["TARGETS", "Target", "available"]

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """Name one thing to test: a backend, perhaps pinned to one instruction set.

    Attributes:
        name: id in test reports.
        backend: what to pass as `backend=`.
        dtypes: the dtypes it promises.
        isa: instruction-set variant of the native library, or None for the best one.
        device: where its inputs live.
        thread_invariant: results are bit-equal for every number of threads.
    """

    name: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    isa: str | None = None
    device: str = "cpu"
    thread_invariant: bool = False

    def skip_reason(self) -> str | None:
        """Return why this target cannot be tested on this machine, or None."""
        return _cpu_skip_reason(self.isa) if self.backend == "cpu" else None

    def run(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """Run a problem through the public machinery, differentiably.

        The call draws its own dropout seed; `torch.manual_seed(case.seed)` before it gives that of the problem.
        """
        out, lse = api.run_attention(
            problem.q,
            problem.k,
            problem.v,
            problem.pos_key,
            problem.pos_query,
            masks=problem.masks,
            position=problem.position,
            scale=problem.scale,
            dropout_p=problem.dropout_p,
            cu_seqlens=problem.cu_seqlens,
            max_seqlen=problem.max_seqlen,
            return_lse=True,
            backend=self.backend,
            prepared=problem.prepared,
        )
        return out, lse

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Hold the instruction set of this target, for forwards and backwards alike."""
        if self.isa is None:
            yield
            return
        from deberta_kernels.impl import cpu

        with cpu.use_isa(self.isa):
            yield


# A new backend joins the whole operator suite by one line here.
TARGETS = (
    Target("torch", "torch", (torch.float32, *_LOW, torch.float64)),
    Target("cpu", "cpu", (torch.float32, *_LOW), thread_invariant=True),
    *(
        Target(f"cpu_{isa}", "cpu", (torch.float32, *_LOW), isa=isa, thread_invariant=True)
        for isa in ("generic", "avx2", "avx512", "avx512_bf16")
    ),
)


def available(dtype: torch.dtype | None = None) -> list[Target]:
    """Return the targets that this machine can run, all or those that promise a dtype."""
    return [t for t in TARGETS if t.skip_reason() is None and (dtype is None or dtype in t.dtypes)]


@cache
def _cpu_skip_reason(isa: str | None) -> str | None:
    try:
        from deberta_kernels.impl import cpu
    except ImportError as error:
        return f"the native backend does not import: {error}"
    status = cpu.library_status()
    if not status["loaded"]:
        return f"the native library is not loaded: {status['reason']}"
    if isa is not None and isa not in status["variants"]:
        return f"the native library has no {isa} variant for this processor, only {', '.join(status['variants'])}"
    return None
