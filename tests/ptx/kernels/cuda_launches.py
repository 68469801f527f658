"""Launches of the CUDA kernels in which every instruction that orders something has its use, kept to be run again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from ptx.drivers import cuda_driver

from deberta_kernels.impl import cuda
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem
from tests.ptx.kernels.cuda_mutants import Launch, recorded
from tests.ptx.kernels.problems import SHORT

__all__ = ["launches", "with_gaps", "without_queries"]

# The variants that are compiled apart: a mask of pairs, dropout.
VARIANTS: dict[str, dict[str, object]] = {
    "": {},
    "_pair": {"mask": "blocks"},
    "_dropout": {"dropout_p": 0.2},
    "_pair_dropout": {"mask": "blocks", "dropout_p": 0.2},
}


def with_gaps(case: Case, *gaps: tuple[int, int]) -> AttentionProblem:
    """Return a problem whose keys in each gap, first and behind the last, are masked: near tiles in several runs."""
    problem = inputs.problem(case)
    keep = torch.ones(problem.k.shape[0], problem.k.shape[2], dtype=torch.bool)
    for first, stop in gaps:
        keep[:, first:stop] = False
    return replace(problem, masks=replace(problem.masks, key=keep))


def without_queries(case: Case, *gaps: tuple[int, int]) -> AttentionProblem:
    """Return a problem whose queries in each gap are padding: the backward's near tiles in several runs."""
    problem = inputs.problem(case)
    keep = torch.ones(problem.q.shape[0], problem.q.shape[2], dtype=torch.bool)
    for first, stop in gaps:
        keep[:, first:stop] = False
    return replace(problem, masks=replace(problem.masks, query=keep))


def _problems(which: str, dtype: torch.dtype, head_dim: int, variant: str) -> Iterator[AttentionProblem]:
    case = Case(batch=1, heads=1, nq=128, nk=320, dtype=dtype, head_dim=head_dim, **VARIANTS[variant])
    far = replace(case, nq=200, nk=520, **SHORT)
    if which == "forward":
        yield with_gaps(replace(case, nk=512), (192, 256), (320, 384))
        yield with_gaps(replace(far, nk=260), (40, 50), (200, 210))
    else:
        yield with_gaps(replace(case, nq=150, nk=290), (40, 50))
        yield without_queries(replace(case, nq=290, nk=150), (64, 128), (192, 256))
        yield inputs.problem(replace(far, nk=700, prefix_length=500))
    yield inputs.problem(far)


@contextmanager
def launches(which: str, dtype: torch.dtype, head_dim: int, variant: str) -> Iterator[dict[str, list[Launch]]]:
    """Run one variant of the "forward" or "backward", and give its launches by the kernel's name."""
    found: dict[str, list[Launch]] = {}
    with cuda_driver.installed(cuda_driver.Device()) as device, recorded(device) as every:
        for problem in _problems(which, dtype, head_dim, variant):
            out, lse = cuda.forward(problem)
            if which == "forward":
                continue
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            for deterministic in (True, False):
                torch.use_deterministic_algorithms(deterministic)
                try:
                    cuda.backward(problem, dout, None, out, lse, (True,) * 5)
                finally:
                    torch.use_deterministic_algorithms(False)
        for launch in every:
            if which in launch.machine.name:
                found.setdefault(launch.machine.name, []).append(launch)
        yield found
