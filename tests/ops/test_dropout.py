"""Dropout keeps exactly the pairs the counter contract names, in forward and backward, on every backend alike."""

from dataclasses import replace

import pytest
import torch

from deberta_kernels import dropout
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("case", [
    Case(batch=2, heads=2, nq=nq, nk=nk, head_dim=32, dtype=dtype, dropout_p=p, mask=mask, seed=seed)
    for nq, nk, mask, seed in (
        (1, 1, "none", 3), (70, 70, "none", 4), (70, 70, "holes_tokens", 5), (33, 81, "sparse", 6),
    )
    for dtype in DTYPES
    for p in (0.1, 0.5)
], ids=lambda case: case.id)  # fmt: skip
def test_dropout_stays_within_the_budget(check_case, case):
    check_case(case)


@pytest.mark.parametrize("p", [1e-6, 0.9, 0.99999], ids=str)
def test_extreme_probabilities_stay_within_the_budget(check_case, p):
    check_case(Case(batch=1, heads=2, nq=40, head_dim=16, dropout_p=p))


def probe(target, nq, nk, heads=2, batch=2, p=0.25, seed=0):
    """Return a problem whose out is the dropped probabilities themselves: uniform attention, values the identity."""
    problem = inputs.problem(
        Case(batch=batch, heads=heads, nq=nq, nk=nk, head_dim=nk, dropout_p=p, seed=seed, terms="none"), target.device
    )
    eye = torch.eye(nk, device=target.device).expand(batch, heads, nk, nk)
    return replace(problem, q=torch.zeros_like(problem.q), v=eye)


@pytest.mark.parametrize(("nq", "nk"), [(50, 61), (1, 8), (8, 19), (130, 67)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_kept_pairs_are_exactly_those_of_the_contract(target, nq, nk, p):
    problem = probe(target, nq, nk, p=p, seed=7)
    torch.manual_seed(7)
    out = target.run(problem)[0]
    expected = dropout.keep_mask(problem.seed, p, range(4), range(nq), range(nk)).view(2, 2, nq, nk)
    assert torch.equal(out != 0, expected)
    torch.testing.assert_close(out, expected * dropout.keep_scale(p) / nk, rtol=1e-6, atol=0)


def test_backward_uses_the_mask_of_the_forward(target):
    """With the identity as upstream gradient, dv is the transposed dropped probabilities."""
    problem = probe(target, 40, 61, seed=8)
    dout = torch.zeros(2, 2, 40, 61, device=target.device)
    dout[:, :, range(40), range(40)] = 1.0
    torch.manual_seed(8)
    results = budget.evaluate(target.run, problem, dout)
    assert torch.equal(results["dv"][..., :40].transpose(-1, -2) != 0, results["out"] != 0)


def test_packed_sequences_count_inside_themselves(target):
    lengths, p = (9, 1, 26), 0.4
    problem = probe(target, 36, 36, batch=1, p=p, seed=9)
    bounds = torch.tensor([0, 9, 10, 36], dtype=torch.int32, device=target.device)
    problem = replace(problem, cu_seqlens=bounds, max_seqlen=26)
    torch.manual_seed(9)
    kept = target.run(problem)[0][0] != 0
    expected = torch.zeros(2, 36, 36, dtype=torch.bool, device=target.device)
    for number, (start, length) in enumerate(zip(bounds.tolist(), lengths)):
        inside = slice(start, start + length)
        block = dropout.keep_mask(problem.seed, p, range(2 * number, 2 * number + 2), range(length), range(length))
        expected[:, inside, inside] = block
    assert torch.equal(kept, expected)


@pytest.mark.usefixtures("same_bits")
def test_same_seed_repeats_and_another_seed_does_not(target):
    case = Case(batch=1, heads=2, nq=60, head_dim=16, dropout_p=0.3)
    problem = inputs.problem(case, target.device)
    dout = inputs.dout(case, problem)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(budget.evaluate(target.run, problem, dout))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
        assert name == "lse" or not torch.equal(results[0][name], results[2][name]), name


def test_consecutive_calls_differ(target):
    problem = inputs.problem(Case(batch=1, heads=2, nq=60, head_dim=16, dropout_p=0.3), target.device)
    assert not torch.equal(target.run(problem)[0], target.run(problem)[0])


def test_no_dropout_draws_nothing_from_the_generator(target):
    problem = inputs.problem(Case(batch=1, heads=2, nq=20, head_dim=16), target.device)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    target.run(problem)
    assert torch.equal(torch.get_rng_state(), before)


def test_keep_rate_and_expectation_are_right(target):
    p, calls = 0.3, 12 if target.most_tiles is None else 3
    problem = probe(target, 256, 256, batch=2, heads=2, p=p)
    torch.manual_seed(11)
    outs = torch.stack([target.run(problem)[0] for _ in range(calls)])
    draws = outs.numel()
    rate = float((outs != 0).double().mean())
    assert abs(rate - (1 - p)) < 4 * (p * (1 - p) / draws) ** 0.5
    assert float(outs.double().mean()) * 256 == pytest.approx(1.0, abs=4 * (p / (1 - p) / draws) ** 0.5)
    kept = (outs != 0).double().flatten(2) - rate
    for first, second in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (2, 1))):
        # Heads, samples and steps are independent: 4 sigma of a correlation of n draws is 4 / sqrt(n).
        a, b = kept.view(calls, 4, -1)[first], kept.view(calls, 4, -1)[second]
        assert abs(float((a * b).mean()) / (p * (1 - p))) < 4 / a.numel() ** 0.5
