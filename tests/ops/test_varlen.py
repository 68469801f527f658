"""Packed sequences behave as if each were alone: nothing crosses a boundary, positions start again at each."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("case", [
    Case(batch=batch, heads=2, nq=longest, head_dim=32, dtype=dtype, terms=terms, dropout_p=p, packed=True, dout=dout)
    for batch, longest in ((1, 40), (4, 70), (9, 17))
    for dtype in DTYPES
    for terms, p, dout in (("c2p+p2c", 0.0, "randn"), ("c2p", 0.2, "sum"), ("p2c", 0.0, "transposed"))
], ids=lambda case: case.id)  # fmt: skip
def test_packed_sequences_stay_within_the_budget(check_case, case):
    check_case(case)


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_packed_strides_are_honoured(check_case, layout):
    check_case(Case(batch=3, heads=2, nq=50, head_dim=24, packed=True, layout=layout, reachable=True))


@pytest.mark.parametrize(("buckets", "furthest"), [(16, 40), (0, 30), (64, 20)])
def test_packed_sequences_with_other_position_settings(check_case, buckets, furthest):
    check_case(Case(batch=3, heads=1, nq=150, packed=True, position_buckets=buckets, max_relative_positions=furthest))


def packed(target, lengths, dtype=torch.float32, heads=2, head_dim=16):
    """Return a packed problem of given lengths."""
    total = sum(lengths)
    case = Case(batch=1, heads=heads, nq=total, head_dim=head_dim, dtype=dtype)
    problem = inputs.problem(case, target.device)
    bounds = torch.tensor([0, *lengths], device=target.device).cumsum(0).to(torch.int32)
    return replace(problem, cu_seqlens=bounds, max_seqlen=max(lengths)), inputs.dout(case, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_sequence_equals_itself_alone(target, dtype):
    problem, dout = packed(target, (5, 1, 64, 130, 33), dtype)
    together = budget.evaluate(target.run, problem, dout)
    tables = dict.fromkeys(("dpos_key", "dpos_query"), 0.0)
    near = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    for start, stop in pairwise(problem.cu_seqlens.tolist()):
        inside = {name: getattr(problem, name)[:, :, start:stop] for name in ("q", "k", "v")}
        one = replace(problem, **inside, cu_seqlens=None, max_seqlen=stop - start)
        alone = budget.evaluate(target.run, one, dout[:, :, start:stop])
        for name in ("out", "lse", "dq", "dk", "dv"):
            torch.testing.assert_close(together[name][:, :, start:stop], alone[name], **near)
        for name in tables:
            tables[name] = tables[name] + alone[name].double()
    for name, total in tables.items():
        torch.testing.assert_close(together[name].double(), total, **near)


def test_nothing_leaks_from_one_sequence_into_another(target):
    problem, dout = packed(target, (20, 37, 15))
    changed = {name: getattr(problem, name).clone() for name in ("q", "k", "v")}
    for x in changed.values():
        x[:, :, 20:57] = 50.0
    plain = budget.evaluate(target.run, problem, dout)
    other = budget.evaluate(target.run, replace(problem, **changed), dout)
    for name in ("out", "lse", "dq", "dk", "dv"):
        for inside in (slice(0, 20), slice(57, 72)):
            assert torch.equal(other[name][:, :, inside], plain[name][:, :, inside]), name
        assert not torch.equal(other[name], plain[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_sequence_equals_the_dense_call(target, dtype):
    problem, dout = packed(target, (77,), dtype)
    dense = budget.evaluate(target.run, replace(problem, cu_seqlens=None), dout)
    for name, value in budget.evaluate(target.run, problem, dout).items():
        torch.testing.assert_close(value, dense[name], rtol=0, atol=8 * torch.finfo(dtype).eps, msg=name)


def test_a_loose_bound_on_the_lengths_changes_nothing(target):
    problem, dout = packed(target, (20, 37, 15))
    exact = budget.evaluate(target.run, problem, dout)
    loose = budget.evaluate(target.run, replace(problem, max_seqlen=500), dout)
    for name, value in exact.items():
        torch.testing.assert_close(loose[name], value, rtol=0, atol=2e-6, msg=name)


def test_public_function_takes_tokens_first_and_differentiates(target):
    problem, _ = packed(target, (20, 37, 15))
    target.need(problem.q)
    names = ("q", "k", "v")
    tokens_first = [getattr(problem, name)[0].transpose(0, 1).detach().requires_grad_() for name in names]
    out = dk.disentangled_attention_varlen(
        *tokens_first, problem.pos_key, problem.pos_query, cu_seqlens=problem.cu_seqlens, max_seqlen=37,
        backend=target.backend,
    )  # fmt: skip
    assert out.shape == (72, 2, 16)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)
    expected = budget.evaluate(target.run, problem, dout.transpose(0, 1)[None])
    assert torch.equal(out, expected["out"][0].transpose(0, 1))
    for name, gradient in zip(names, torch.autograd.grad(out, tokens_first, dout)):
        assert torch.equal(gradient, expected[f"d{name}"][0].transpose(0, 1)), name
