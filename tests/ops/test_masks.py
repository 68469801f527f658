"""Masks forbid exactly what they say, padded rows follow one rule, and padding changes nothing else."""

from dataclasses import replace

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import Masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Longest distance between two float32 results that only the order of their sums tells apart.
PHI = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize("case", [
    Case(batch=2, heads=2, nq=nq, head_dim=24, mask=mask, dtype=dtype)
    for mask in inputs.MASKS if mask != "none"
    for dtype in DTYPES
    for nq in (19, 81)
], ids=lambda case: case.id)  # fmt: skip
def test_every_mask_stays_within_the_budget(check_case, case):
    check_case(case)


@pytest.mark.parametrize("case", [
    Case(batch=2, heads=2, nq=nq, nk=nk, head_dim=24, mask=mask, dropout_p=p, terms=terms)
    for nq, nk in ((30, 70), (70, 30))
    for mask in ("left", "holes", "all_padding", "heads", "sparse+holes")
    for p, terms in ((0.0, "c2p"), (0.2, "c2p+p2c"))
], ids=lambda case: case.id)  # fmt: skip
def test_masks_of_unequal_lengths_and_with_dropout(check_case, case):
    check_case(case)


@pytest.mark.parametrize("mask", ["right", "left", "holes", "one_token"])
def test_one_valid_key_or_pattern_equals_attention_over_the_kept_keys_alone(target, mask):
    """No position terms, so a key's index does not matter: dropping the masked keys must give the same."""
    case = Case(batch=1, heads=2, nq=40, nk=90, mask=mask, terms="none")
    problem = inputs.problem(case, target.device)
    kept = problem.masks.key[0]
    alone = replace(problem, k=problem.k[:, :, kept], v=problem.v[:, :, kept], masks=Masks())
    for ours, expected in zip(target.run(problem), target.run(alone)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=PHI[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["right_tokens", "all_padding", "all_padding_tokens", "sparse"])
def test_padded_rows_get_the_mean_of_all_values(target, mask, dtype):
    case = Case(batch=4, heads=2, nq=37, head_dim=16, mask=mask, dtype=dtype, dropout_p=0.3)
    problem = inputs.problem(case, target.device)
    rows = padded_rows(problem)
    assert rows.any()
    assert not rows.all()
    out, lse = target.run(problem)
    mean = problem.v.double().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double()[rows], mean[rows], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(lse.isneginf(), rows)


def test_padded_rows_send_their_gradient_to_every_value_evenly_and_nowhere_else(target):
    case = Case(batch=2, heads=2, nq=37, head_dim=16, mask="all_padding_tokens", dropout_p=0.3)
    problem = inputs.problem(case, target.device)
    rows = padded_rows(problem)
    dout = inputs.dout(case, problem) * rows[..., None]
    results = budget.evaluate(target.run, problem, dout)
    expected = (dout.double().sum(2, keepdim=True) / case.keys).expand_as(problem.v)
    torch.testing.assert_close(results["dv"].double(), expected, rtol=0, atol=1e-6)
    for name in ("dq", "dk", "dpos_key", "dpos_query"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def test_masked_keys_get_exactly_zero_gradient(target):
    case = Case(batch=3, heads=2, nq=61, head_dim=32, mask="holes")
    problem = inputs.problem(case, target.device)
    results = budget.evaluate(target.run, problem, inputs.dout(case, problem))
    masked = ~problem.masks.key[:, None, :, None].expand_as(problem.k)
    for name in ("dk", "dv"):
        assert torch.equal(results[name][masked], torch.zeros_like(results[name][masked])), name
        assert (results[name][~masked] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_values_of_masked_keys_never_matter(target, mask, dtype):
    case = Case(batch=2, heads=2, nq=75, head_dim=32, mask=mask, dtype=dtype)
    problem = inputs.problem(case, target.device)
    masked = ~problem.masks.key[:, None, :, None]
    k, v = (x.masked_fill(masked, 1e4) for x in (problem.k, problem.v))
    dout = inputs.dout(case, problem)
    plain = budget.evaluate(target.run, problem, dout)
    other = budget.evaluate(target.run, replace(problem, k=k, v=v), dout)
    for name, value in plain.items():
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("mask", ["right", "left", "holes", "blocks", "heads", "sparse"])
def test_public_masks_give_the_same_bits_as_parsed_ones(target, mask):
    problem = inputs.problem(Case(batch=2, heads=3, nq=30, head_dim=16, mask=mask), target.device)
    target.need(problem.q)
    given = problem.masks.key if problem.masks.pair is None else problem.masks.pair
    for form in (given, given.long(), given.to(torch.uint8)):
        out = dk.disentangled_attention(
            problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query, attention_mask=form,
            backend=target.backend,
        )  # fmt: skip
        assert torch.equal(out, target.run(problem)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_mask_and_the_same_pairs_agree(target, dtype):
    case = Case(batch=2, heads=2, nq=70, head_dim=32, mask="holes", dtype=dtype)
    problem = inputs.problem(case, target.device)
    pairs = problem.masks.key[:, None, None, :].expand(-1, 1, 70, -1)
    dout = inputs.dout(case, problem)
    by_key = budget.evaluate(target.run, problem, dout)
    for pair in (pairs, pairs.contiguous(), pairs.expand(-1, 2, -1, -1).contiguous()):
        by_pair = budget.evaluate(target.run, replace(problem, masks=Masks(pair=pair)), dout)
        for name, value in by_key.items():
            size = max(1.0, float(value[value.isfinite()].abs().max()))
            torch.testing.assert_close(by_pair[name], value, rtol=0, atol=PHI[dtype] * size, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_true_masks_equal_no_mask(target, dtype):
    case = Case(batch=2, heads=2, nq=50, head_dim=32, dtype=dtype)
    problem = inputs.problem(case, target.device)
    true = torch.ones(2, 1, 50, 50, dtype=torch.bool, device=target.device)
    expected = target.run(problem)[0]
    for masks in (Masks(key=true[:, 0, 0]), Masks(key=true[:, 0, 0], query=true[:, 0, 0]), Masks(pair=true)):
        out = target.run(replace(problem, masks=masks))[0]
        torch.testing.assert_close(out, expected, rtol=0, atol=PHI[dtype] * 4)


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("pads", [1, 9, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_padding_leaves_valid_rows_and_gradients_alone(target, pads, side, dtype):
    length, before = 45, {"right": 0, "left": pads, "both": pads // 2}[side]
    case = Case(batch=1, heads=2, nq=length, head_dim=32, dtype=dtype, reachable=False)
    alone = inputs.problem(case, target.device)
    dout = inputs.dout(case, alone)
    wide = inputs.problem(replace(case, nq=length + pads, seed=9), target.device)
    tokens = torch.zeros(1, length + pads, dtype=torch.bool, device=target.device)
    inside = slice(before, before + length)
    tokens[:, inside] = True
    padded = {name: getattr(wide, name).contiguous() for name in ("q", "k", "v")}
    for name, x in padded.items():
        x[:, :, inside] = getattr(alone, name)
    wide = replace(wide, **padded, pos_key=alone.pos_key, pos_query=alone.pos_query, masks=Masks(tokens, tokens))
    wide_dout = torch.zeros(wide.q.shape, dtype=dtype, device=target.device)
    wide_dout[:, :, inside] = dout
    expected = budget.evaluate(target.run, alone, dout)
    results = budget.evaluate(target.run, wide, wide_dout)
    for name, value in expected.items():
        ours = results[name] if name.startswith("dpos") else results[name][:, :, inside]
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(ours, value, rtol=0, atol=PHI[dtype] * size, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sample_does_not_depend_on_its_batch(target):
    case = Case(batch=5, heads=2, nq=50, head_dim=32, mask="holes_tokens")
    problem = inputs.problem(case, target.device)
    together = target.run(problem)[0]
    for b in range(case.batch):
        one = replace(
            problem,
            **{name: getattr(problem, name)[b : b + 1] for name in ("q", "k", "v")},
            masks=Masks(problem.masks.key[b : b + 1], problem.masks.query[b : b + 1]),
        )
        torch.testing.assert_close(target.run(one)[0], together[b : b + 1], rtol=0, atol=PHI[torch.float32])


def padded_rows(problem):
    """Return (B, H, Nq) bool, True where a row is padding or may attend to no key."""
    batch, heads, nq, _ = problem.q.shape
    keep = torch.ones(batch, heads, nq, problem.k.shape[2], dtype=torch.bool, device=problem.q.device)
    masks = problem.masks
    if masks.key is not None:
        keep &= masks.key[:, None, None, :]
    if masks.query is not None:
        keep &= masks.query[:, None, :, None]
    if masks.pair is not None:
        keep &= masks.pair
    return ~keep.any(-1)
