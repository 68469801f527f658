"""The CUDA backward, its own source run on the emulated device, held to the error budget; small shapes."""

import random
from dataclasses import replace

import pytest
import torch

from deberta_kernels.impl import torch_tiled
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from tests.cuda_emulation import harness

BF16, FP16 = torch.bfloat16, torch.float16
# Saturated from distance 64 on: tiles of all zones within 300 tokens.
SHORT = {"position_buckets": 16, "max_relative_positions": 64}

CASES = [
    *(Case(batch=1, heads=2, nq=n, dtype=dtype) for n, dtype in ((1, BF16), (63, FP16), (65, BF16), (129, FP16))),
    Case(batch=1, heads=1, nq=330, dtype=BF16, **SHORT),
    Case(batch=1, heads=1, nq=300, dtype=FP16, position_buckets=0, max_relative_positions=40),
    Case(batch=1, heads=2, nq=40, nk=260, dtype=BF16, **SHORT),
    Case(batch=1, heads=2, nq=260, nk=40, dtype=FP16, **SHORT),
    *(Case(batch=1, heads=2, nq=70, dtype=BF16, terms=terms) for terms in ("c2p", "p2c", "none")),
    *(Case(batch=2, heads=1, nq=70, dtype=BF16, mask=mask) for mask in inputs.MASKS if mask != "none"),
    Case(batch=1, heads=1, nq=300, dtype=FP16, mask="right_tokens", **SHORT),
    Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, dtype=BF16, mask="holes"),
    Case(batch=3, heads=1, nq=150, dtype=BF16, packed=True, **SHORT),
    Case(batch=1, heads=2, nq=100, dtype=BF16, dropout_p=0.3),
    Case(batch=1, heads=1, nq=90, dtype=FP16, dropout_p=0.2, mask="heads"),
    *(Case(batch=1, heads=1, nq=150, dtype=dtype, spread=spread) for dtype, spread in
      ((FP16, 8.0), (FP16, 30.0), (BF16, 30.0), (BF16, 200.0))),
]  # fmt: skip


def launched(case: Case, deterministic: bool = False, **changed: torch.Tensor) -> harness.BackwardLaunch:
    """Prepare the backward of a case, with some of its tensors replaced."""
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    problem = replace(problem, **changed)
    out, lse = torch_tiled.forward(problem)
    return harness.BackwardLaunch(problem, dout, out, lse, harness.library(), deterministic=deterministic)


def present(gradients) -> dict[str, torch.Tensor]:
    return {name: x for name, x in gradients._asdict().items() if x is not None}


def check(case: Case, problem, gradients: dict[str, torch.Tensor]) -> None:
    out, lse = torch_tiled.forward(problem)
    report = budget.measure(
        {"out": out, "lse": lse, **gradients}, budget.truth(problem, inputs.dout(case, problem)), case.id
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_are_within_the_budget(case, deterministic):
    problem = inputs.problem(case)
    check(case, problem, present(launched(case, deterministic).run()))


@pytest.mark.parametrize("case", [
    Case(batch=2, heads=1, nq=200, dtype=BF16, mask="holes", **SHORT),
    Case(batch=3, heads=1, nq=150, dtype=FP16, packed=True, dropout_p=0.2),
], ids=lambda case: case.id)  # fmt: skip
def test_deterministic_gradients_do_not_depend_on_the_order_of_blocks_and_threads(case):
    launch = launched(case, deterministic=True)
    expected = present(launch.run())
    for seed in (1, 2):
        launch = launched(case, deterministic=True)
        order = list(range(launch.arguments.blocks))
        random.Random(seed).shuffle(order)
        for name, gradient in present(launch.run(order, seed)).items():
            assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("case", [
    Case(batch=1, heads=1, nq=330, dtype=BF16, **SHORT),
    Case(batch=1, heads=1, nq=200, nk=140, dtype=BF16, mask="sparse"),
], ids=lambda case: case.id)  # fmt: skip
def test_deterministic_gradients_do_not_depend_on_a_warpgroup_that_falls_behind(case, late):
    expected = present(launched(case, deterministic=True).run())
    actual = present(launched(case, deterministic=True).run(late=late))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_gradients_in_any_order_stay_within_the_budget():
    case = Case(batch=1, heads=1, nq=300, dtype=BF16, **SHORT)
    problem = inputs.problem(case)
    launch = launched(case)
    order = list(range(launch.arguments.blocks))[::-1]
    check(case, problem, present(launch.run(order, seed=3)))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_sequence_longer_than_was_said_harms_no_other(deterministic):
    """On a GPU nobody compares the lengths with `max_seqlen` before the launch."""
    problem = inputs.problem(Case(batch=4, heads=2, nq=200, dtype=BF16, packed=True, **SHORT))
    tokens = problem.q.shape[2]
    cu_seqlens = torch.tensor([0, tokens - 60, tokens], dtype=torch.int32)
    honest = replace(problem, cu_seqlens=cu_seqlens, max_seqlen=tokens)
    out, lse = harness.run(honest)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(BF16)

    def run(problem):
        launch = harness.BackwardLaunch(
            problem, dout, out.contiguous(), lse.contiguous(), harness.library(), deterministic=deterministic
        )
        return present(launch.run())

    expected, found = run(honest), run(replace(honest, max_seqlen=64))
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name][:, :, -60:], expected[name][:, :, -60:]), name


def test_nan_in_padding_stays_there():
    case = Case(batch=2, heads=1, nq=130, dtype=BF16, mask="holes_tokens")
    problem = inputs.problem(case)
    tokens = problem.masks.key
    poisoned = {}
    for name in ("q", "k", "v"):
        poisoned[name] = getattr(problem, name).clone()
        poisoned[name].transpose(1, 2)[~tokens] = float("nan")
    clean, found = (present(launched(case, True, **changed).run()) for changed in ({}, poisoned))
    for name in ("dpos_key", "dpos_query"):
        assert torch.equal(found[name], clean[name]), name
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name].transpose(1, 2)[tokens], clean[name].transpose(1, 2)[tokens]), name


PLAIN = Case(batch=1, heads=1, nq=300, dtype=BF16, **SHORT)
KEYS_IN_TURN = Case(batch=2, heads=1, nq=90, nk=111, prefix_length=21, dtype=BF16, mask="holes")
FAULTS = {
    "the last stage released while a lane reads it": (
        "sync_warp();  // every lane has read the visit", "", "still be reading",
    ),
    "a stage released before its products are done": (
        "product_wait<0>();\n    sums_.add_to_queries(dq, first_query(), turn());\n    release_stage();",
        "release_stage();\n    product_wait<0>();\n    sums_.add_to_queries(dq, first_query(), turn());",
        "still be reading|no barrier between|another is writing",
    ),
    "gradients stored while a warp loads its bias": (
        "sums_.sync_consumer();  // every warp has loaded its bias from what the gradients overwrite", "",
        "still be reading",
    ),
    "sums stored while products read what they overwrite": (
        "sums_.sync_consumer();  // every warp's products have read what the sums overwrite", "", "still be reading",
    ),
    "no wait for a table block": (
        "const RingCounter<L::kSlots> low = high_.next();\n    wait_slot(low);",
        "const RingCounter<L::kSlots> low = high_.next();", "reads what another is writing|nobody wrote",
    ),
    "an operand that changes under its product": (
        "product_wait<1>();\n    score_gradients(score, dp, draws, ds);",
        "weights[3] ^= 1;\n    product_wait<1>();\n    score_gradients(score, dp, draws, ds);", "an operand changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_errors(name):
    old, new, message = FAULTS[name]
    case, deterministic = (KEYS_IN_TURN, True) if "last stage" in name else (PLAIN, False)
    problem = inputs.problem(case)
    out, lse = torch_tiled.forward(problem)
    launch = harness.BackwardLaunch(
        problem, inputs.dout(case, problem), out, lse, harness.library(((old, new),)), deterministic=deterministic
    )
    with pytest.raises(harness.EmulationError, match=message):
        launch.run()
