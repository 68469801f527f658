"""The CUDA forward, its own source run on the emulated device, held to the error budget.

Shapes are small, since a tile takes 20 ms; small bucket counts bring the far zones within reach.
"""

import random
from dataclasses import replace

import pytest
import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem
from tests.cuda_emulation import harness

BF16, FP16 = torch.bfloat16, torch.float16
# Saturated from distance 64 on: tiles of all zones within 300 tokens.
SHORT = {"position_buckets": 16, "max_relative_positions": 64}

CASES = [
    *(Case(batch=1, heads=2, nq=n, dtype=dtype) for n, dtype in
      ((1, BF16), (63, FP16), (64, BF16), (65, FP16), (128, BF16), (129, FP16), (200, BF16))),
    Case(batch=1, heads=1, nq=512, dtype=BF16),
    *(Case(batch=1, heads=1, nq=330, dtype=dtype, **SHORT) for dtype in (BF16, FP16)),
    Case(batch=1, heads=1, nq=300, dtype=BF16, position_buckets=0, max_relative_positions=40),
    Case(batch=1, heads=2, nq=40, nk=260, dtype=BF16, **SHORT),
    Case(batch=1, heads=2, nq=260, nk=40, dtype=FP16, **SHORT),
    *(Case(batch=1, heads=2, nq=70, dtype=BF16, terms=terms) for terms in ("c2p", "p2c", "none")),
    *(Case(batch=3, heads=2, nq=100, dtype=BF16, mask=mask) for mask in inputs.MASKS if mask != "none"),
    *(Case(batch=2, heads=1, nq=300, dtype=FP16, mask=mask, **SHORT) for mask in
      ("right_tokens", "left", "one_token", "holes", "sparse")),
    *(Case(batch=2, heads=1, nq=90, nk=90 + prefix, prefix_length=prefix, dtype=BF16) for prefix in (1, 16, 70)),
    Case(batch=2, heads=1, nq=150, nk=171, prefix_length=21, mask="holes", dtype=FP16, **SHORT),
    *(Case(batch=4, heads=2, nq=150, dtype=dtype, packed=True, seed=seed) for dtype, seed in ((BF16, 0), (FP16, 1))),
    Case(batch=3, heads=1, nq=260, dtype=BF16, packed=True, **SHORT),
    *(Case(batch=2, heads=2, nq=100, dtype=BF16, layout=layout) for layout in inputs.LAYOUTS),
    Case(batch=1, heads=2, nq=50, dtype=BF16, reachable=True),
    *(Case(batch=2, heads=2, nq=100, dtype=dtype, dropout_p=0.3) for dtype in (BF16, FP16)),
    Case(batch=1, heads=2, nq=230, dtype=BF16, dropout_p=0.1, mask="holes", **SHORT),
    Case(batch=2, heads=1, nq=70, nk=91, prefix_length=21, dtype=BF16, dropout_p=0.5, mask="sparse"),
    Case(batch=3, heads=1, nq=90, dtype=BF16, dropout_p=0.2, packed=True),
    *(Case(batch=1, heads=2, nq=140, head_dim=128, dtype=dtype) for dtype in (BF16, FP16)),
    Case(batch=2, heads=1, nq=200, head_dim=128, dtype=BF16, mask="holes_tokens", dropout_p=0.2, **SHORT),
    Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, head_dim=128, dtype=FP16, mask="heads"),
    Case(batch=3, heads=1, nq=150, head_dim=128, dtype=BF16, packed=True, **SHORT),
    *(Case(batch=1, heads=1, nq=150, dtype=dtype, spread=spread) for dtype, spread in
      ((BF16, 10.0), (FP16, 10.0), (FP16, 200.0))),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_are_within_the_budget(case):
    problem = inputs.problem(case)
    out, lse = harness.run(problem)
    report = budget.measure({"out": out, "lse": lse}, budget.truth(problem), case.id)
    assert report.ok, str(report)


def random_case(seed: int) -> Case:
    draw = random.Random(seed).choice
    packed = draw((False, False, False, True))
    nq, prefix = draw((1, 17, 64, 65, 100, 128, 129, 200)), 0 if packed else draw((0, 0, 1, 16, 63, 64, 65))
    mask = "none" if packed else draw(inputs.MASKS)
    buckets, most = draw(((256, 512), (16, 64), (4, 8), (0, 40), (0, 1)))
    nk = None if packed else draw((nq, 30, 150)) + prefix
    if nk != nq:
        mask = mask.removesuffix("_tokens")
    return Case(
        batch=draw((1, 2, 3)), heads=draw((1, 2)), nq=nq, nk=nk, head_dim=draw((64, 64, 128)),
        dtype=draw((BF16, FP16)), terms=draw(inputs.TERMS), position_buckets=buckets, max_relative_positions=most,
        prefix_length=prefix, mask=mask, layout=draw(inputs.LAYOUTS), spread=draw((1.0, 3.0, 30.0)),
        dropout_p=draw((0.0, 0.0, 0.3)), reachable=draw((False, True)), packed=packed, seed=seed,
    )  # fmt: skip


def with_gaps(nk: int, *gaps: tuple[int, int]) -> AttentionProblem:
    """Return a problem whose keys in each gap, first and behind the last, are masked: near tiles in several runs."""
    problem = inputs.problem(Case(batch=1, heads=1, nq=128, nk=nk, dtype=BF16))
    keep = torch.ones(1, nk, dtype=torch.bool)
    for first, stop in gaps:
        keep[:, first:stop] = False
    return replace(problem, masks=replace(problem.masks, key=keep))


LATE = [with_gaps(384, (192, 256)), with_gaps(384, (320, 384), (64, 128)), with_gaps(512, (192, 256), (320, 384))]


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("problem", LATE, ids=["3+2", "1+3", "3+1+2"])
def test_results_do_not_depend_on_a_warpgroup_that_falls_behind(problem, late):
    expected, actual = harness.run(problem), harness.run(problem, late=late)
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[1], actual[1])


def test_a_block_is_not_passed_on_before_its_copy():
    """The second consumer still reads what lay there before."""
    wait, after, before = (
        "    wait_slot(high_);\n",
        "    // Not before that",
        "    {\n      // What the first tile needs",
    )
    library = harness.library(((wait + after, after), (before, wait + before)))
    with pytest.raises(harness.EmulationError, match=r"still be reading|another is writing"):
        harness.Launch(LATE[0], library).run(late=2)


@pytest.mark.parametrize("case", [random_case(seed) for seed in range(24)], ids=lambda case: case.id)
def test_random_cases_are_within_the_budget(case):
    test_results_are_within_the_budget(case)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_staging_meets_no_bank_twice(head_dim):
    library = harness.library()
    library.emulated_banks()
    harness.run(inputs.problem(Case(batch=1, heads=1, nq=200, head_dim=head_dim, dtype=BF16)))
    assert library.emulated_banks() == 101  # one word per bank, in stores and in loads


def test_results_do_not_depend_on_the_order_of_the_threads():
    problem = inputs.problem(Case(batch=1, heads=1, nq=300, dtype=BF16, mask="holes", **SHORT))
    out, lse = harness.run(problem)
    for seed in (1, 2, 3):
        again = harness.run(problem, seed=seed)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])


@pytest.mark.parametrize("case", [
    Case(batch=2, heads=1, nq=130, dtype=BF16, mask="holes_tokens"),
    Case(batch=2, heads=1, nq=260, dtype=BF16, mask="right_tokens", **SHORT),
    Case(batch=1, heads=1, nq=130, head_dim=128, dtype=BF16, mask="holes_tokens"),
], ids=lambda case: case.id)  # fmt: skip
def test_nan_in_padding_stays_there(case):
    problem = inputs.problem(case)
    tokens = problem.masks.key
    poisoned = {}
    for name in ("q", "k", "v"):
        x = getattr(problem, name).clone()
        x.transpose(1, 2)[~tokens] = float("nan")
        poisoned[name] = x
    out, lse = harness.run(problem)
    found, found_lse = harness.run(replace(problem, **poisoned))
    real = tokens[:, None].expand(lse.shape)
    assert torch.equal(found[real], out[real])
    assert torch.equal(found_lse, lse)


def test_nan_in_a_real_token_is_not_hidden_and_stays_in_its_sequence():
    problem = inputs.problem(Case(batch=3, heads=1, nq=100, dtype=BF16, packed=True))
    start, stop = problem.cu_seqlens[1:3].tolist()
    v = problem.v.clone()
    v[:, :, stop - 1] = float("nan")
    out, _ = harness.run(replace(problem, v=v))
    assert out[:, :, start:stop].isnan().all()
    assert out[:, :, :start].isfinite().all()
    assert out[:, :, stop:].isfinite().all()


def test_tiles_without_a_valid_key_are_skipped():
    """What a skipped tile holds is never read: its memory may be out of reach."""
    problem = inputs.problem(Case(batch=1, heads=1, nq=300, dtype=BF16, **SHORT))
    keep = torch.ones(1, 300, dtype=torch.bool)
    keep[:, 64:128] = False
    keep[:, 192:] = False
    problem = replace(problem, masks=replace(problem.masks, key=keep))
    whole = harness.run(problem)
    launch = harness.Launch(problem, harness.library())
    launch.params.nk = 192  # the same zones, but keys from 192 on do not exist
    shorter = launch.run()
    assert torch.equal(whole[0], shorter[0])
    assert torch.equal(whole[1], shorter[1])
