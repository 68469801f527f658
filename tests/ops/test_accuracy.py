"""Out, lse and all gradients stay within the error budget, over shapes, dtypes, terms and position settings."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

by_id = partial(pytest.mark.parametrize, ids=lambda case: case.id)


def cases(*variants, dtypes=DTYPES, **common):
    return [Case(dtype=dtype, **{**common, **variant}) for variant in variants for dtype in dtypes]


@by_id("case", cases(*({"nq": n} for n in (1, 2, 7, 15, 16, 17, 63, 64, 65, 111, 127, 129)), batch=2, heads=2))
def test_lengths_around_tile_edges(check_case, case):
    check_case(case)


@by_id("case", cases(*({"head_dim": d} for d in (8, 13, 16, 20, 24, 32, 40, 48, 72, 80, 96, 128, 160, 256)), nq=45))
def test_head_dims(check_case, case):
    check_case(case)


@by_id("case", cases(*({"terms": terms, "nq": n} for terms in inputs.TERMS for n in (37, 150))))
def test_position_terms(check_case, case):
    check_case(case)


@by_id(
    "case",
    cases(
        {"nq": 1, "nk": 130},
        {"nq": 130, "nk": 1},
        {"nq": 61, "nk": 140},
        {"nq": 140, "nk": 61, "mask": "holes"},
        {"nq": 64, "nk": 69, "prefix_length": 5},
        {"nq": 33, "nk": 33, "prefix_length": 33},
        {"nq": 70, "nk": 86, "prefix_length": 16, "reachable": True, "mask": "left"},
        {"nq": 20, "nk": 100, "reachable": True, "terms": "p2c"},
    ),
)
def test_unequal_lengths_and_prefix_keys(check_case, case):
    check_case(case)


@by_id(
    "case",
    cases(
        *(
            {"position_buckets": buckets, "max_relative_positions": furthest}
            for buckets, furthest in (
                (0, 64), (-1, 200), (0, 1), (16, 64), (32, 128), (64, 64), (512, 4096), (2, 8), (3, 9), (17, 100),
                (256, 128), (64, 20), (16, 5),
            )
        ),
        nq=150,
        heads=2,
        batch=1,
        dtypes=(torch.float32, torch.bfloat16),
    ),
)  # fmt: skip
def test_position_settings(check_case, case):
    check_case(case)


@by_id(
    "case",
    [
        Case(batch=1, heads=2, nq=512, head_dim=64, mask="right"),
        Case(batch=1, heads=1, nq=512, head_dim=64, dtype=torch.bfloat16),
        Case(batch=1, heads=1, nq=640, head_dim=40, reachable=True, mask="holes_tokens"),
        Case(batch=1, heads=1, nq=1151, head_dim=32),
        Case(batch=1, heads=1, nq=1151, head_dim=32, dtype=torch.bfloat16, dropout_p=0.1),
        Case(batch=2, heads=2, nq=1100, head_dim=16, dtype=torch.float16, mask="left"),
        Case(batch=2, heads=2, nq=1100, head_dim=16, dtype=torch.bfloat16, packed=True),
        Case(batch=1, heads=1, nq=1300, nk=1100, head_dim=16, terms="p2c"),
        Case(batch=1, heads=1, nq=1100, nk=1300, head_dim=16, terms="c2p"),
        Case(batch=1, heads=1, nq=90, nk=2300, head_dim=16),
        Case(batch=1, heads=1, nq=2300, nk=90, head_dim=16, mask="left"),
        Case(batch=1, heads=1, nq=700, head_dim=24, position_buckets=16, max_relative_positions=64),
        Case(batch=1, heads=1, nq=700, head_dim=24, position_buckets=0, max_relative_positions=100),
    ],
)
def test_long_inputs_reach_every_distance_zone(check_case, case):
    check_case(case)


@by_id("case", cases({"batch": 1, "heads": 1}, {"batch": 7, "heads": 1}, {"batch": 1, "heads": 5}, nq=29, head_dim=32))
def test_batch_and_head_counts(check_case, case):
    check_case(case)


@by_id("case", cases(*({"spread": s} for s in (0.1, 2.0, 8.0)), nq=75))
def test_small_and_large_scores(check_case, case):
    check_case(case)


@by_id("case", cases({}, {"mask": "holes"}, {"packed": True}, nq=75))
def test_lse_is_differentiable(check_case, case):
    check_case(case, with_dlse=True)


@by_id("case", cases({"nq": 50, "mask": "right"}, {"nq": 50, "terms": "none"}, {"nq": 40, "nk": 60, "terms": "c2p"}))
def test_public_function_gives_the_same_bits(target, run_case, case):
    problem = inputs.problem(case, target.device)
    target.need(problem.q)
    out, lse = dk.disentangled_attention(
        problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query, attention_mask=problem.masks.key,
        return_lse=True, backend=target.backend,
    )  # fmt: skip
    expected = run_case(case, problem)
    assert torch.equal(out, expected["out"])
    assert torch.equal(lse, expected["lse"])


def test_out_lies_in_token_major_memory(run_case):
    out = run_case(Case(batch=2, heads=3, nq=10, head_dim=16))["out"]
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5)], ids=["no_batch", "no_queries"])
def test_empty_inputs_give_empty_results_and_zero_gradients(target, shape, dtype):
    batch, heads, nq, nk = shape
    options = {"dtype": dtype, "device": target.device, "requires_grad": True}
    q = torch.randn(batch, heads, nq, 8, **options)
    target.need(q)
    k = torch.randn(batch, heads, nk, 8, **options)
    pos_key = torch.randn(heads, 512, 8, **options)
    out = dk.disentangled_attention(q, k, k, pos_key, backend=target.backend)
    assert out.shape == q.shape
    assert out.dtype == dtype
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert torch.equal(pos_key.grad, torch.zeros_like(pos_key))


def test_scale_multiplies_the_raw_scores(target):
    problem = inputs.problem(Case(batch=1, heads=1, nq=20, terms="none"), target.device)
    out = target.run(replace(problem, scale=0.3))[0]
    scores = 0.3 * (problem.q.double() @ problem.k.double().mT)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ problem.v.double(), rtol=0, atol=1e-5)
