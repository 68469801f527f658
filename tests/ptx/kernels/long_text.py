"""65,536 tokens, nearly all of them padding, so that few tiles of the 2^32 pairs have anything to compute.

The truth and the yardstick are computed of the real tokens alone, at the distances that they have in the text.
"""

from functools import partial

import torch

from deberta_kernels import disentangled_attention
from deberta_kernels.position import position_index
from deberta_kernels.testing import budget
from deberta_kernels.types import PositionSpec

__all__ = ["check_long"]

LENGTH, DIM, ROWS = 65_536, 64, 512
SPEC = PositionSpec()
# Both ends, a group in which every zone is, tokens on both sides of 2^15, and neighbours in different tiles.
REAL = torch.tensor([0, 1, 63, 64, 511, 700, 32_767, 32_768, 65_000, 65_471, 65_472, 65_535])
NAMES = ("q", "k", "v", "pos_key", "pos_query")


def eager(q, k, v, pos_key, pos_query):
    """Attend as eager code does, of the real tokens; (R, D) each and (rows, D)."""
    rows = position_index(LENGTH, SPEC).rows(REAL[:, None] - REAL).long()
    scale = (3 * DIM) ** -0.5
    to_position = (q @ (pos_key * scale).T).gather(1, rows)
    to_content = (pos_query @ (k * scale).T).gather(0, rows)
    return (q @ (k * scale).T + to_position + to_content).softmax(-1) @ v


def drawn(dtype):
    """Return the five inputs of the real tokens and the gradient of the results."""
    generator = torch.Generator().manual_seed(0)
    sizes = (len(REAL),) * 3 + (ROWS,) * 2 + (len(REAL),)
    return [torch.randn(size, DIM, generator=generator).to(dtype) for size in sizes]


def results(compute, inputs, dout):
    """Return the results and the five gradients, float64."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = compute(*inputs)
    out.backward(dout.to(out.dtype))
    return [x.detach().double() for x in (out, *(x.grad for x in inputs))]


def placed(backend, q, k, v, pos_key, pos_query):
    """Attend with the package, the real tokens at their places in the text."""
    mask = torch.zeros(1, LENGTH, dtype=torch.bool)
    mask[:, REAL] = True
    q, k, v = (x.new_zeros(LENGTH, DIM).index_copy(0, REAL, x)[None, None] for x in (q, k, v))
    out = disentangled_attention(q, k, v, pos_key[None], pos_query[None], attention_mask=mask, backend=backend)
    return out[0, 0, REAL]


def check_long(backend, dtype):
    """Hold the results and gradients of a text of 65,536 tokens to twice the errors of eager code."""
    *inputs, dout = drawn(dtype)
    oracle = results(eager, [x.double() for x in inputs], dout)
    yardstick = results(eager, inputs, dout)
    found = results(partial(placed, backend), inputs, dout)
    for name, ours, theirs, truth in zip(("out", *NAMES), found, yardstick, oracle, strict=True):
        error, allowed = (ours - truth).abs().max(), budget.allowance(dtype, float((theirs - truth).abs().max()))
        assert error <= allowed, f"{name}: {error:.3e} of {allowed:.3e}"
