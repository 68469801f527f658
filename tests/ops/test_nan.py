"""NaN is neither made nor hidden: finite problems give finite results, and a NaN reaches its own sample only."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import Masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("mask", ["none", "holes_tokens", "sparse"])
@pytest.mark.parametrize("logits", [1e1, 1e3, 4.7e3, 2e4, 6e4], ids=lambda x: f"{x:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_up_to_the_limit_of_float16_stay_finite_and_right(target, dtype, logits, mask):
    """The original overflows in float16 from 4,727 on, so eager in float32 is the yardstick."""
    known = ladder(target.device, dtype, logits, mask)
    finite = known.oracle["lse"][known.oracle["lse"].isfinite()]
    assert float(finite.abs().max()) > 0.5 * logits
    results = budget.evaluate(target.run, known.problem, known.dout)
    for name, value in results.items():
        assert torch.equal(value.isfinite(), known.oracle[name].isfinite()), name
    # Scores of 6e4 are known to 4e-3 in float32, so results are only as good as that.
    slack = 16 * logits * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    for name, value in results.items():
        expected = known.oracle[name]
        inside = expected.isfinite()
        size = max(1.0, float(expected[inside].abs().max()))
        error = float((value.double() - expected)[inside].abs().max())
        assert error <= slack * size, f"{name}: error {error:.3e} of {slack * size:.3e}"


@lru_cache(maxsize=2)
def ladder(device, dtype, logits, mask):
    """Return the truth of a problem whose largest scaled score is about `logits`."""
    case = Case(batch=2, heads=2, nq=40, head_dim=32, dtype=dtype, mask=mask)
    problem = inputs.problem(case, device)
    exact = {name: getattr(problem, name).double() for name in ("q", "k", "pos_key", "pos_query")}
    scores = problem.scale * (exact["q"] @ exact["k"].mT)
    factor = (logits / float(scores.abs().max())) ** 0.5
    grown = {name: (factor * x).to(dtype) for name, x in exact.items()}
    dout = inputs.dout(case, problem) / max(1.0, factor)
    return budget.truth(replace(problem, **grown), dout, float32_yardstick=True)


def test_valid_keys_at_the_bottom_of_float16_do_not_leak_to_padding(target):
    """The original fills masked scores with -65504, which wins when every valid score is lower."""
    case = Case(batch=1, heads=1, nq=20, head_dim=64, dtype=torch.float16, terms="none")
    problem = inputs.problem(case, target.device)
    q, k, v = torch.full_like(problem.q, 250.0), torch.full_like(problem.k, -250.0), torch.zeros_like(problem.v)
    v[:, :, 10:] = 1.0
    tokens = (torch.arange(20, device=target.device) < 10)[None]
    out, _ = target.run(replace(problem, q=q, k=k, v=v, scale=0.125, masks=Masks(key=tokens)))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "poison"), [("q", float("nan")), ("k", float("nan")), ("v", float("nan")), ("v", float("inf"))]
)
def test_nan_in_a_valid_token_reaches_its_sample_and_no_other(target, name, poison, dtype):
    case = Case(batch=3, heads=2, nq=37, head_dim=24, dtype=dtype, mask="right")
    problem = inputs.problem(case, target.device)
    problem = replace(
        problem, masks=Masks(key=problem.masks.key.index_fill(1, torch.tensor([0], device=target.device), True))
    )
    dout = inputs.dout(case, problem)
    clean = budget.evaluate(target.run, problem, dout)
    x = getattr(problem, name).clone()
    x[1, 1, 0, 5] = poison
    results = budget.evaluate(target.run, replace(problem, **{name: x}), dout)
    hit = results["out"][1, 1] if name != "q" else results["out"][1, 1, :1]
    assert not hit.isfinite().all(-1).any()
    if name == "q":
        assert torch.equal(results["out"][1, 1, 1:], clean["out"][1, 1, 1:])
    for part in ("out", "lse", "dq", "dk", "dv"):
        for b, h in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
            assert torch.equal(results[part][b, h], clean[part][b, h]), part
    assert not results["dq"][1, 1, 0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", ["pos_key", "pos_query"])
def test_nan_in_a_table_row_reaches_the_rows_that_use_it(target, table, dtype):
    case = Case(batch=1, heads=2, nq=40, head_dim=24, dtype=dtype)
    problem = inputs.problem(case, target.device)
    x = getattr(problem, table).clone()
    x[1, 256 + 30, 0] = float("nan")  # distance i - j = 30
    out = target.run(replace(problem, **{table: x}))[0]
    assert out[0, 0].isfinite().all()
    assert out[0, 1, 30:].isnan().all()
    if table == "pos_key":
        assert out[0, 1, :30].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_nan_in_masked_keys_spreads_nowhere(target, mask, poison, dtype):
    case = Case(batch=2, heads=2, nq=70, head_dim=24, dtype=dtype, mask=mask)
    problem = inputs.problem(case, target.device)
    dout = inputs.dout(case, problem)
    masked = ~problem.masks.key[:, None, :, None]
    k, v = (x.masked_fill(masked, poison) for x in (problem.k, problem.v))
    clean = budget.evaluate(target.run, problem, dout)
    results = budget.evaluate(target.run, replace(problem, k=k, v=v), dout)
    for name, value in clean.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["right_tokens", "left_tokens", "holes_tokens"])
def test_nan_in_padded_tokens_reaches_padded_rows_only(target, mask, dtype):
    case = Case(batch=2, heads=2, nq=70, head_dim=24, dtype=dtype, mask=mask)
    problem = inputs.problem(case, target.device)
    padding = ~problem.masks.key[:, None, :, None]
    # Padded rows return the mean of v, NaN included; nothing downstream reads them, so their gradient is zero.
    dout = inputs.dout(case, problem).masked_fill(padding, 0.0)
    clean = budget.evaluate(target.run, problem, dout)
    dirty = {name: getattr(problem, name).masked_fill(padding, float("nan")) for name in ("q", "k", "v")}
    results = budget.evaluate(target.run, replace(problem, **dirty), dout)
    valid = ~padding.expand_as(clean["out"])
    assert torch.equal(results["out"][valid], clean["out"][valid])
    assert torch.equal(results["out"].isnan(), ~valid & padding.any(2, keepdim=True))
    for name in ("lse", "dq", "dk", "dv", "dpos_key", "dpos_query"):
        assert torch.equal(results[name], clean[name]), name


def test_nan_in_the_upstream_gradient_is_not_hidden(target):
    case = Case(batch=2, heads=2, nq=20, head_dim=16)
    problem = inputs.problem(case, target.device)
    dout = inputs.dout(case, problem)
    clean = budget.evaluate(target.run, problem, dout)
    dout[0, 1, 3, 2] = float("nan")
    results = budget.evaluate(target.run, problem, dout)
    for name in ("dk", "dv"):
        assert results[name][0, 1].isnan().any(-1).all(), name
    assert results["dq"][0, 1, 3].isnan().all()
    for name in ("dq", "dk", "dv"):
        assert torch.equal(results[name][1], clean[name][1]), name
        assert torch.equal(results[name][0, 0], clean[name][0, 0]), name
