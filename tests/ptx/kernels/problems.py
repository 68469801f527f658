"""The problems that the kernels are run on as PTX, and what holds them to the error budget."""

from dataclasses import replace

import pytest
import torch

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import DOUTS, KEY_MASKS, LAYOUTS, PAIR_MASKS, Case

__all__ = ["FAR", "FEW_KEYS", "GENERAL", "SHORT", "check", "every_case"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Longer than what saturates: tiles of every zone.
FAR = Case(batch=1, heads=1, nq=1200, dtype=BF16)
# Saturated from distance 64 on: the same within 330 tokens.
SHORT = {"position_buckets": 16, "max_relative_positions": 64}
_DTYPES = (BF16, FP16, FP32)

# bfloat16 and 64 numbers a head: every feature set, mask, layout, gradient and form of a call.
GENERAL = [
    FAR,
    *(Case(batch=1, heads=2, nq=n, dtype=BF16) for n in (1, 64, 65, 150)),
    Case(batch=1, heads=1, nq=40, nk=260, dtype=BF16, **SHORT),
    *(Case(batch=2, heads=1, nq=130, dtype=BF16, mask=mask) for mask in KEY_MASKS),
    *(Case(batch=2, heads=1, nq=100, dtype=BF16, mask=f"{mask}_tokens") for mask in KEY_MASKS),
    *(Case(batch=2, heads=2, nq=90, dtype=BF16, mask=mask) for mask in PAIR_MASKS),
    *(Case(batch=2, heads=2, nq=70, dtype=BF16, layout=layout, dout=dout)
      for layout, dout in zip(LAYOUTS, (*DOUTS, *DOUTS), strict=False)),
    *(Case(batch=1, heads=2, nq=90, dtype=BF16, terms=terms) for terms in ("c2p", "p2c", "none")),
    Case(batch=3, heads=2, nq=90, dtype=BF16, packed=True),
    Case(batch=3, heads=1, nq=260, dtype=BF16, packed=True, dropout_p=0.1, **SHORT),
    Case(batch=1, heads=1, nq=200, nk=230, dtype=BF16, prefix_length=30),
    Case(batch=2, heads=1, nq=90, nk=111, dtype=BF16, prefix_length=21, mask="holes", dropout_p=0.3),
    Case(batch=2, heads=1, nq=130, dtype=BF16, mask="sparse", dropout_p=0.2),
    Case(batch=1, heads=2, nq=100, dtype=BF16, terms="none", dropout_p=0.5),
    Case(batch=1, heads=1, nq=330, dtype=BF16, **SHORT),
    Case(batch=1, heads=2, nq=50, dtype=BF16, reachable=True),
]  # fmt: skip

# A query with one key has no gradient of scores, one with few a small one.
FEW_KEYS = [
    *(Case(batch=2, heads=2, nq=n, dtype=BF16, dropout_p=0.1, seed=seed) for n in (1, 2, 3) for seed in range(2)),
    *(Case(batch=2, heads=2, nq=n, dtype=FP16, dropout_p=p) for n, p in ((1, 0.1), (2, 0.5))),
    Case(batch=2, heads=2, nq=2, dtype=BF16),
    Case(batch=2, heads=1, nq=40, dtype=BF16, dropout_p=0.1, mask="one_token"),
    Case(batch=2, heads=1, nq=140, dtype=BF16, dropout_p=0.1, mask="one_token"),
    Case(batch=3, heads=2, nq=1, dtype=BF16, dropout_p=0.1, packed=True),
    Case(batch=2, heads=2, nq=3, nk=1, dtype=BF16, dropout_p=0.1, terms="none"),
    Case(batch=1, heads=1, nq=90, nk=1, dtype=BF16, dropout_p=0.1, prefix_length=1),
]  # fmt: skip


def every_case() -> list[Case]:
    """Return the correctness list of `make gpu`, with no more heads and sequences than their masks need."""
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.plan import Plan

    found = [replace(c, heads=min(c.heads, 2 if c.nq < 700 else 1), batch=c.batch if c.packed else min(c.batch, 2))
             for c in cases(Plan(device="cuda"))]  # fmt: skip
    return list(dict.fromkeys(found))


def check(backend: str, case: Case, *, backward: bool = True) -> None:
    """Run a case through the package's operators, with all gradients; fail where it leaves the budget."""
    problem = inputs.problem(case)
    against = budget.truth(problem, inputs.dout(case, problem) if backward else None)
    torch.manual_seed(case.seed)
    target = Target("ptx", backend, _DTYPES)
    report = budget.measure(budget.evaluate(target.run, against.problem, against.dout), against, f"{backend} {case.id}")
    if not report.ok:
        pytest.fail(str(report), pytrace=False)
