"""What the operator suite tests: one line per backend, with its limits, and one way to run any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from deberta_kernels import api, env, native
from deberta_kernels.dtypes import FLOATS, KERNEL_FLOATS
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem

__all__ = ["TARGETS", "Target", "available"]

_TILE = 64
_HOPPER = (9, 0)


@dataclass(frozen=True)
class Target:
    """One thing to test: a backend, perhaps pinned to one instruction set.

    Attributes:
        name: id in test reports.
        backend: what to pass as `backend=`.
        dtypes: the dtypes it promises.
        isa: instruction-set variant of the native library, or None for the best one.
        device: where its inputs live.
        thread_invariant: results are bit-equal for every number of threads.
        most_tiles: leave out cases of more tiles than this, 64 queries by 64 keys of one head; for a backend that takes
            a tenth of a second a tile. The random cases, thousands of them, leave such a backend out.
        head_dims: the head dimensions it computes; None for all that the suite has.
        repeats: the same call gives the same bits; otherwise only under `torch.use_deterministic_algorithms`.
    """

    name: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    isa: str | None = None
    device: str = "cpu"
    thread_invariant: bool = False
    most_tiles: int | None = None
    head_dims: tuple[int, ...] | None = None
    repeats: bool = True

    def skip_reason(self) -> str | None:
        """Return why this target cannot be tested on this machine, or None."""
        if self.backend in ("triton", "cuda"):
            return _gpu_skip_reason(self.backend, self.device)
        return _cpu_skip_reason(self.isa) if self.backend == "cpu" else None

    def gap(self, head_dim: int | None, dtype: torch.dtype | None) -> str | None:
        """Return why the target does not promise calls of this head dimension and dtype, as far as given, or None."""
        if dtype is not None and dtype not in self.dtypes:
            return f"{self.name} does not promise {dtype}"
        if head_dim is not None and self.head_dims is not None and head_dim not in self.head_dims:
            return f"{self.name} does not promise head_dim {head_dim}"
        return None

    def case_skip_reason(self, batch: int, heads: int, nq: int, nk: int) -> str | None:
        """Return why a case of this size is left out, or None."""
        tiles = batch * heads * -(-nq // _TILE) * -(-nk // _TILE)
        if self.most_tiles is None or tiles <= self.most_tiles:
            return None
        return f"{self.name} is slow: {tiles} tiles are more than {self.most_tiles}"

    def fitted(self, case: Case) -> Case:
        """Return the case, with a head dimension of this target's where it has another one."""
        if self.head_dims is None or case.head_dim in self.head_dims:
            return case
        return replace(case, head_dim=self.head_dims[0])

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
        with native.use_isa(self.isa):
            yield


# A new backend joins the whole operator suite by one line here.
TARGETS = (
    Target("torch", "torch", FLOATS),
    Target("cpu", "cpu", KERNEL_FLOATS, thread_invariant=True),
    *(Target(f"cpu_{isa}", "cpu", KERNEL_FLOATS, isa=isa, thread_invariant=True) for isa in reversed(env.CPU_ISAS)),
    Target("triton", "triton", KERNEL_FLOATS, device="cuda", repeats=False),
    Target("cuda", "cuda", (torch.bfloat16, torch.float16), device="cuda", head_dims=(64, 128), repeats=False),
    Target("triton_interpreted", "triton", (torch.float32, torch.float16), most_tiles=24),
)


def available(dtype: torch.dtype | None = None) -> list[Target]:
    """Return the targets that this machine can run many cases on, all or those that promise a dtype."""
    fast = [t for t in TARGETS if t.most_tiles is None and t.skip_reason() is None]
    return [t for t in fast if dtype is None or dtype in t.dtypes]


@cache
def _cpu_skip_reason(isa: str | None) -> str | None:
    status = native.library_status()
    if not status["loaded"]:
        return f"the native library is not loaded: {status['reason']}"
    if isa is not None and isa not in status["variants"]:
        return f"the native library has no {isa} variant for this processor, only {', '.join(status['variants'])}"
    return None


@cache
def _gpu_skip_reason(backend: str, device: str) -> str | None:
    """Go by facts about the machine, not by what the backend says: one that refuses every call must fail its tests."""
    if backend == "triton" and env.triton_interpreted() != (device == "cpu"):
        return f"TRITON_INTERPRET is {'' if env.triton_interpreted() else 'not '}set"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if backend == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    if backend == "cuda" and torch.cuda.get_device_capability() != _HOPPER:
        return "its kernels are for compute capability 9.0"
    return None
