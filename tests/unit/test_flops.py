"""FlopCounterMode counts attention as the products of matrices that eager attention multiplies."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deberta_kernels as dk
from deberta_kernels.testing import eager
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

B, H, N, D, SPAN = 2, 3, 20, 8, 8
SETTINGS = {"position_buckets": SPAN, "max_relative_positions": 16}
PAIRS, ROWS = 2 * B * H * N * N * D, 2 * B * H * N * 2 * SPAN * D  # operations of q.k, and of c2p or p2c


def leaves(keys=N):
    return [torch.randn(B, H, n, D, requires_grad=True) for n in (N, keys, keys)] + [
        torch.randn(H, 2 * SPAN, D, requires_grad=True) for _ in range(2)
    ]


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["torch", "reference", "auto"])
@pytest.mark.parametrize("terms", [0, 1, 2, 3])
def test_forward_and_backward(name, terms):
    q, k, v, pos_key, pos_query = leaves()
    tables = (pos_key if terms & 1 else None, pos_query if terms & 2 else None)
    terms = (terms & 1) + (terms >> 1)
    with torch.no_grad():
        assert count(lambda: dk.disentangled_attention(q, k, v, *tables, **SETTINGS, backend=name)) == (
            2 * PAIRS + terms * ROWS
        )
    whole = count(lambda: dk.disentangled_attention(q, k, v, *tables, **SETTINGS, backend=name).sum().backward())
    assert whole == 3 * (2 * PAIRS + terms * ROWS)


def test_only_gradients_that_are_needed_count():
    q, k, v, pos_key, pos_query = (x.detach() for x in leaves())
    forward = 2 * PAIRS + 2 * ROWS
    for leaf, products in ((v, PAIRS), (q, 2 * PAIRS + ROWS), (k, 2 * PAIRS + ROWS), (pos_key, PAIRS + ROWS)):
        leaf.requires_grad_()
        found = count(lambda: dk.disentangled_attention(q, k, v, pos_key, pos_query, **SETTINGS).sum().backward())
        assert found == forward + products
        leaf.requires_grad_(False)


@pytest.mark.parametrize("keys", [N, 3 * N])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_it_is_what_hugging_face_multiplies(keys, terms):
    *x, pos_key, pos_query = leaves(keys)
    x += [pos_key if terms & 1 else None, pos_query if terms & 2 else None]
    problem = AttentionProblem(*x, Masks(), PositionSpec(SPAN, 16), 0.2)
    found = count(lambda: dk.disentangled_attention(*x, **SETTINGS).sum().backward())
    assert found == count(lambda: eager.attention(problem)[0].sum().backward())


def test_packed_sequences_count_their_own_pairs():
    q, k, v = (torch.randn(N, H, D, requires_grad=True) for _ in range(3))
    table = torch.randn(H, 2 * SPAN, D)
    bounds = torch.tensor([0, 5, 5, N], dtype=torch.int32)
    call = lambda: dk.disentangled_attention_varlen(  # noqa: E731
        q, k, v, table, None, cu_seqlens=bounds, max_seqlen=10**6, **SETTINGS
    )
    pairs, rows = 2 * H * D * (5**2 + 15**2), 2 * H * D * N * 2 * SPAN
    with torch.no_grad():
        assert count(call) == 2 * pairs + rows
    assert count(lambda: call().sum().backward()) == 2 * pairs + rows + 4 * pairs + rows


def test_arguments_may_have_names_and_no_values():
    x = torch.randn(B, H, N, D, device="meta")
    call = {"max_seqlen": N, "position_buckets": 8, "max_relative_positions": 16, "first_row": 0, "prefix_length": 0}
    empty = dict.fromkeys(
        ("pos_key", "pos_query", "key_mask", "query_mask", "pair_mask", "cu_seqlens", "seed", "prepared")
    )
    operator = torch.ops.deberta_kernels.attention
    assert (
        count(lambda: operator(q=x, k=x, v=x, **empty, **call, scale=1.0, dropout_p=0.0, backend="auto")) == 2 * PAIRS
    )


PROGRAM = """
import sys, torch, deberta_kernels as dk
x = torch.randn(1, 2, 5, 8)
dk.disentangled_attention(x, x, x)
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    dk.disentangled_attention(x, x, x)
print(counter.get_total_flops())
"""


def test_a_counter_that_is_imported_later_counts_too():
    """It imports triton, so importing this package does not import it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 2 * 2 * 5 * 5 * 8
