"""Inputs near the largest number: finite wherever Hugging Face's order of operations is, and right."""

import pytest
import torch

from deberta_kernels.impl import score_factor
from deberta_kernels.testing import eager
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

N, D = 70, 16


def problem(dtype, scale=0.25, *, q=1.0, k=1.0, v=1.0, tables=None):
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(1, 2, N, D)
    signs = torch.linspace(-1, 1, N)[:, None] if k > 1 else 1.0
    given = [ones * q, ones * k * signs, torch.rand(1, 2, N, D, generator=generator) * v]
    positions = [None, None] if tables is None else [torch.rand(2, 32, D, generator=generator) * tables] * 2
    x = [None if t is None else t.to(dtype) for t in (*given, *positions)]
    return AttentionProblem(*x, Masks(), PositionSpec(16, 64), scale, max_seqlen=N)


CASES = {
    "products of q and k": {"q": 6e18, "k": 6e18},
    "products of keys and their positions": {"q": 1e-3, "k": 1e20, "tables": 1e17},
    "products of queries and their positions": {"q": 1e20, "k": 1e-3, "tables": 1e17},
    "sums of values": {"v": 3e38},
    "a scale far below those of models": {"q": 1e19, "k": 1e21, "scale": 1e-5},
}


# GPU kernels multiply first, and scale after.
@pytest.mark.targets(lambda target: target.backend in ("cpu", "torch", "reference"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_eager_attention_computes_is_finite(target, name, dtype):
    given = problem(dtype, **CASES[name])
    assert torch.isfinite(eager.attention(given)[0]).all(), "nothing to compare with"
    out, lse = target.run(given)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    exact = eager.attention(
        AttentionProblem(
            *(None if x is None else x.double() for x in (given.q, given.k, given.v, given.pos_key, given.pos_query)),
            given.masks, given.position, given.scale, max_seqlen=N,
        )
    )[0]  # fmt: skip
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("scale", "factor"), [(0.25, 0.25), (0.3, 0.25), (0.0722, 0.0625), (1.0, 1.0), (7.0, 1.0), (1e-30, 2**-16)]
)
def test_score_factor_is_a_power_of_two(scale, factor):
    assert score_factor(scale) == factor
