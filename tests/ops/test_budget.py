"""The yardstick is the original's arithmetic to the bit, and the budget notices what it must notice."""

import itertools
from dataclasses import replace

import pytest
import torch

from deberta_kernels.impl import reference
from deberta_kernels.testing import budget, eager, inputs
from deberta_kernels.testing.inputs import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def hugging_face_attention(case, share_att_key):
    """Return Hugging Face's attention module and its inputs for a case."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as modeling

    config = modeling.DebertaV2Config(
        hidden_size=case.heads * case.head_dim,
        num_attention_heads=case.heads,
        position_buckets=case.position_buckets,
        max_relative_positions=case.max_relative_positions,
        pos_att_type=[t for t in case.terms.split("+") if t != "none"],
        share_att_key=share_att_key,
        relative_attention=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(case.seed)
    module = modeling.DisentangledSelfAttention(config).to(case.dtype).eval()
    span = case.position_buckets if case.position_buckets > 0 else case.max_relative_positions
    hidden = torch.randn(case.batch, case.nq, config.hidden_size).to(case.dtype)
    relative = torch.randn(2 * span, config.hidden_size).to(case.dtype)
    return module, 3 * hidden, relative


def projected_problem(case, module, hidden, relative):
    """Return the problem that the module computes, projected with its own modules."""

    def heads_of(x):
        return x.unflatten(-1, (case.heads, case.head_dim)).transpose(-3, -2)

    share = module.share_att_key
    key_proj = module.key_proj if share else getattr(module, "pos_key_proj", None)
    query_proj = module.query_proj if share else getattr(module, "pos_query_proj", None)
    problem = inputs.problem(case)
    return type(problem)(
        *(heads_of(proj(hidden)) for proj in (module.query_proj, module.key_proj, module.value_proj)),
        pos_key=heads_of(key_proj(relative)) if "c2p" in case.terms else None,
        pos_query=heads_of(query_proj(relative)) if "p2c" in case.terms else None,
        masks=problem.masks,
        position=problem.position,
        scale=problem.scale,
    )


@pytest.mark.parametrize("share_att_key", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize(
    "case",
    [
        Case(dtype=dtype, nq=nq, mask=mask, terms=terms, head_dim=24, position_buckets=b, max_relative_positions=m)
        for dtype in DTYPES
        for nq, mask, terms, b, m in (
            (37, "none", "c2p+p2c", 32, 64),
            (90, "right_tokens", "c2p+p2c", 16, 40),
            (37, "holes_tokens", "c2p", 0, 20),
            (41, "blocks", "p2c", 64, 40),
            (16, "all_padding_tokens", "none", 8, 16),
        )
    ],
    ids=lambda case: case.id,
)
def test_yardstick_is_bit_equal_to_hugging_face(case, share_att_key):
    module, hidden, relative = hugging_face_attention(case, share_att_key)
    hidden.requires_grad_()
    relative.requires_grad_()
    problem = projected_problem(case, module, hidden, relative)
    masks = problem.masks
    mask = torch.ones(case.batch, 1, case.nq, case.nq, dtype=torch.bool)
    if masks.pair is not None:
        mask = masks.pair
    elif masks.key is not None:
        mask = (masks.key[:, None, :] & masks.key[:, :, None])[:, None]
    expected = module(hidden, mask, rel_embeddings=relative)[0]
    ours = eager.attention(problem)[0].transpose(1, 2).flatten(2)
    assert torch.equal(ours, expected)
    dout = torch.randn(expected.shape).to(case.dtype)
    used = [hidden, relative] if case.terms != "none" else [hidden]
    for ours_d, expected_d in zip(torch.autograd.grad(ours, used, dout), torch.autograd.grad(expected, used, dout)):
        assert torch.equal(ours_d, expected_d)


def test_yardstick_divides_by_exactly_what_hugging_face_divides_by():
    for head_dim, factor in itertools.product(range(8, 257), (1, 2, 3)):
        theirs = torch.sqrt(torch.tensor(head_dim, dtype=torch.float) * factor)
        assert torch.equal(eager.divisor((head_dim * factor) ** -0.5), theirs)


def drawn(dtype=torch.float32, **settings):
    problem = inputs.problem(Case(batch=1, heads=2, nq=20, head_dim=16, dtype=dtype, **settings))
    return budget.truth(problem, inputs.dout(Case(seed=5, dtype=dtype), problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "dpos_key", "dpos_query"])
def test_budget_notices_one_wrong_value_in_any_tensor(name, dtype):
    known = drawn(dtype)
    results = budget.evaluate(reference.attention, known.problem, known.dout)
    assert budget.measure(results, known).ok
    allowed = {row.name: row.max_allowed for row in budget.measure(results, known).rows}[name]
    results[name] = results[name].clone(memory_format=torch.contiguous_format)
    results[name].view(-1)[3] += max(3 * allowed, 0.05)
    report = budget.measure(results, known)
    assert [row.name for row in report.rows if not row.ok] == [name]
    assert "OVER BUDGET" in str(report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_notices_a_mean_error_that_no_single_value_shows(dtype):
    known = drawn(dtype)
    results = budget.evaluate(reference.attention, known.problem, known.dout)
    row = next(row for row in budget.measure(results, known).rows if row.name == "out")
    exact = known.oracle["out"]
    results["out"] = (exact + 1.5 * row.mean_allowed).to(torch.float64)
    row = next(row for row in budget.measure(results, known).rows if row.name == "out")
    assert row.max_error <= row.max_allowed
    assert row.mean_error > row.mean_allowed
    assert not row.ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_budget_notices_values_that_are_not_finite(value):
    known = drawn()
    results = budget.evaluate(reference.attention, known.problem, known.dout)
    results["dk"] = results["dk"].clone()
    results["dk"].view(-1)[0] = value
    assert "1 values not finite" in str(budget.measure(results, known))


def test_budget_notices_a_finite_lse_on_a_padded_row():
    known = drawn(mask="all_padding")
    results = budget.evaluate(reference.attention, known.problem, known.dout)
    assert budget.measure(results, known).ok
    results["lse"] = results["lse"].nan_to_num(neginf=-1e30)
    assert not budget.measure(results, known).ok


def test_budget_notices_wrong_dtype_wrong_shape_and_missing_tensors():
    known = drawn(torch.bfloat16)
    good = budget.evaluate(reference.attention, known.problem, known.dout)
    assert "dtype torch.float32" in str(budget.measure({**good, "dq": good["dq"].float()}, known))
    assert "shape (1, 2, 20, 15)" in str(budget.measure({**good, "dv": good["dv"][..., :-1]}, known))
    assert "missing" in str(budget.measure({k: v for k, v in good.items() if k != "dpos_key"}, known))


def test_second_look_compares_with_eager_in_other_orders_and_is_reported():
    """One sum of 8 features, so that eager's error depends on their order and on luck."""
    case = Case(batch=1, heads=1, nq=9, head_dim=8, spread=8.0)
    problem = inputs.problem(case)
    known = budget.truth(problem, inputs.dout(case, problem))
    lucky, every = known.errors["dq"], known.errors_of_all_orders["dq"]
    assert every[0] > lucky[0]
    results = budget.evaluate(reference.attention, problem, known.dout)
    limit = 3 * (lucky[0] + 1e-6 * float(known.oracle["dq"].abs().max()))
    for error, ok in ((0.9 * limit, True), (0.5 * (limit + 3 * every[0]), True), (5 * every[0], False)):
        results["dq"] = known.oracle["dq"].float()
        results["dq"][0, 0, 0, 0] += error
        row = next(row for row in budget.measure(results, known).rows if row.name == "dq")
        assert row.ok == ok
        assert row.second_look == (error > limit)


def test_a_second_look_leaves_out_what_was_taken_out_of_the_truth():
    problem = inputs.problem(Case(batch=1, heads=1, nq=9, head_dim=8, spread=8.0))
    known = budget.truth(problem)
    del known.oracle["lse"]
    assert known.errors_of_all_orders.keys() == {"out"}


def test_check_raises_the_report():
    problem = inputs.problem(Case(batch=1, heads=1, nq=20, head_dim=16))

    def forgets_the_scale(given):
        return reference.attention(given.changed(scale=1.0))

    with pytest.raises(budget.BudgetError, match=r"mine[\s\S]*out .*OVER BUDGET"):
        budget.check(forgets_the_scale, problem, label="mine")
    assert budget.check(reference.attention, problem).ok


def test_truth_refuses_a_problem_that_does_not_fit_its_dtype():
    problem = inputs.problem(Case(batch=1, heads=1, nq=20, head_dim=16, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"d[kv] of this problem does not fit torch.float16"):
        budget.truth(problem, torch.full_like(problem.q, 60000.0))


def test_yardstick_falls_back_to_float32_only_where_eager_overflows():
    fine, huge = Case(dtype=torch.float16, nq=30), Case(dtype=torch.float16, nq=30, spread=100.0)
    assert not budget.truth(inputs.problem(fine)).overflowed
    assert budget.truth(inputs.problem(huge)).overflowed


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_layouts_are_what_they_are_called(layout):
    problem = inputs.problem(Case(batch=2, heads=3, nq=6, head_dim=8, layout=layout))
    expected = {
        "heads_inside": (144, 8, 24, 1),
        "heads_first": (144, 48, 8, 1),
        "fused": (432, 8, 72, 1),
        "one_sample": (0, 8, 24, 1),
        "one_head": (48, 0, 8, 1),
        "every_other": (288, 8, 48, 1),
        "wide_elements": (288, 16, 48, 2),
    }
    assert problem.q.stride() == problem.k.stride() == problem.v.stride() == expected[layout]
    assert problem.q.is_contiguous() == (layout == "heads_first")


def test_douts_are_what_they_are_called():
    case = Case(batch=2, heads=3, nq=6, head_dim=8, dtype=torch.bfloat16)
    problem = inputs.problem(case)
    strides = {name: inputs.dout(Case(**{**vars(case), "dout": name}), problem).stride() for name in inputs.DOUTS}
    assert strides == {
        "randn": (144, 48, 8, 1),
        "sum": (0, 0, 0, 0),
        "transposed": (144, 48, 1, 6),
        "every_other": (288, 96, 16, 1),
        "slice": (234, 13, 39, 1),
    }


@pytest.mark.parametrize("mask", inputs.MASKS)
def test_masks_are_what_they_are_called(mask):
    case = Case(batch=3, heads=4, nq=33, mask=mask)
    drawn = inputs.masks(case)
    assert (drawn.query is not None) == mask.endswith("_tokens")
    if mask == "none":
        assert drawn.key is None
        assert drawn.pair is None
    elif mask in inputs.PAIR_MASKS:
        assert drawn.pair.shape == (3, 4 if mask == "heads" else 1, 33, 33)
        assert 0 < drawn.pair.float().mean() < 1
    else:
        tokens = drawn.key.sum(-1)
        assert (tokens == 1).all() if mask.startswith("one_token") else (tokens < 33).any()
        assert bool((tokens == 0).any()) == mask.startswith("all_padding")


def test_same_case_draws_the_same_tensors_and_another_seed_others():
    case = Case(batch=3, nq=33, mask="sparse+holes", dropout_p=0.5)
    first, again, other = (inputs.problem(c) for c in (case, case, replace(case, seed=1)))
    for name in ("q", "k", "v", "pos_key", "pos_query", "seed"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert torch.equal(first.masks.pair, again.masks.pair)
    assert not torch.equal(first.masks.pair, other.masks.pair)


def test_ids_name_what_differs():
    assert Case(batch=2, heads=3, nq=111, head_dim=64, dtype=torch.bfloat16).id == "B2-N111-H3-D64-bf16-c2p+p2c"
    long = Case(nk=70, mask="holes", dropout_p=0.1, seed=4).id
    assert long == "B2-Nq111-Nk70-H3-D64-fp32-c2p+p2c-holes-dropout0.1-seed4"


def test_what_is_allowed_follows_the_formula():
    assert budget.allowance(torch.bfloat16, 1.0, 50.0) == pytest.approx(2 * (1 + 50e-5))
    assert budget.allowance(torch.float32, 1.0, 0.1) == pytest.approx(3 * (1 + 1e-6))
    assert budget.allowance(torch.float32, 1.0, 4.0, mean=True) == pytest.approx(1.1 * (1 + 4e-6))
    assert budget.allowance(torch.float16, 0.0, 8.0, relative=0.5) == pytest.approx(8.0)
