"""What `make gpu` compiles beforehand, against what its checks launch."""

import pytest
import torch

from benchmarks.gpu import precompile
from benchmarks.gpu.cases import cases, long_cases
from benchmarks.gpu.plan import Plan
from deberta_kernels.impl.triton import execute, launch
from deberta_kernels.testing import inputs

KEY = "sm_90"


def kernels(case):
    """Every kernel that a case launches, with all it is compiled for."""
    problem = execute._without_values(inputs.problem(case, "cpu"))
    forward = launch.forward_launches(problem, KEY)
    out, lse = forward.results
    backward = launch.backward_launches(problem, torch.empty_like(out), None, out, lse, (True,) * 5, KEY)
    return {
        (x.kernel.fn.__name__, tuple(sorted((name, str(value)) for name, value in x.constants.items())), x.num_warps,
         x.num_stages)
        for x in (*forward.launches, *backward.launches)
    }  # fmt: skip


@pytest.mark.parametrize("smoke", [True, False], ids=["smoke", "whole"])
def test_every_kernel_of_every_case_is_compiled_beforehand(smoke):
    plan = Plan(smoke=smoke)
    needed = set().union(*map(kernels, (*cases(plan), *long_cases(plan))))
    compiled = set().union(*map(kernels, precompile.distinct(plan)))
    assert needed - compiled == set()


def test_a_variant_is_compiled_once():
    chosen = precompile.distinct(Plan())
    variants = [execute.variant(inputs.problem(case, "cpu")) for case in chosen]
    assert len(set(variants)) == len(variants) == 33
