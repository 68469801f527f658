"""Every barrier, wait, fence and commit that the Triton kernels execute is missed, or redundant for a known reason.

`redundant_triton.json` holds how many are what, by Triton version, device, variant and kernel; where they change for a
good reason, `--write-tables` writes it anew. Versions that it does not have are held to the rule alone.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from offline.variants import deterministically
from ptx import mutations
from ptx.drivers import triton_driver
from ptx.redundant import reasons, recorded

from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import Case
from tests.ptx.kernels.problems import BF16, FP32

TABLE = Path(__file__).with_name("redundant_triton.json")
# Every zone within three tiles. Lengths that end with a tile or not, and queries that are near to no key: what far
# zones leave in flight is then not waited for in the near one.
NEAR = {"position_buckets": 8, "max_relative_positions": 20}
PLAIN = [
    Case(batch=1, heads=1, nq=330, dtype=BF16, **NEAR),
    *(Case(batch=1, heads=1, nq=330, nk=n, dtype=BF16, **NEAR) for n in (100, 128)),
    Case(batch=1, heads=1, nq=60, nk=330, dtype=BF16, **NEAR),
    Case(batch=1, heads=1, nq=60, dtype=BF16, **NEAR),
    Case(batch=1, heads=1, nq=150, nk=190, dtype=BF16, prefix_length=40, **NEAR),
    Case(batch=2, heads=1, nq=200, dtype=BF16, packed=True, **NEAR),
    # All keys in one tile, near and far.
    *(Case(batch=1, heads=1, nq=n, nk=20, dtype=BF16, **NEAR) for n in (20, 330)),
]
MASKED = [
    Case(batch=2, heads=1, nq=320, dtype=BF16, mask="right", **NEAR),
    Case(batch=2, heads=1, nq=330, nk=128, dtype=BF16, mask="right", **NEAR),
    # All 128 keys are there: full tiles that saturate, and nothing behind them.
    Case(batch=1, heads=1, nq=330, nk=128, dtype=BF16, mask="right", seed=246, **NEAR),
    Case(batch=2, heads=1, nq=60, dtype=BF16, mask="right", **NEAR),
    Case(batch=1, heads=1, nq=200, nk=330, dtype=BF16, mask="holes", **NEAR),
    Case(batch=2, heads=1, nq=200, dtype=BF16, mask="right", terms="none"),
    *(Case(batch=2, heads=1, nq=n, nk=20, dtype=BF16, mask="holes", **NEAR) for n in (20, 330)),
]
PAIRS = [
    Case(batch=1, heads=1, nq=330, dtype=BF16, mask="sparse", dropout_p=0.1, **NEAR),
    Case(batch=1, heads=1, nq=330, nk=128, dtype=BF16, mask="sparse", dropout_p=0.1, **NEAR),
    Case(batch=2, heads=1, nq=60, dtype=BF16, mask="sparse+holes", dropout_p=0.1, **NEAR),
    *(Case(batch=1, heads=1, nq=n, nk=20, dtype=BF16, mask="sparse", dropout_p=0.1, **NEAR) for n in (20, 330)),
]
VARIANTS = {
    "masked": MASKED,
    "plain": PLAIN,
    "pairs, dropout": PAIRS,
    "no bias": [replace(case, terms="none") for case in PLAIN],
    "masked, dropout, float32": [replace(case, dtype=FP32, dropout_p=0.1) for case in MASKED],
}
SAMPLE = ("masked",)
# What no class says, by variant, kernel and opcode.
_ONE_ZONE = (
    "without a bias one zone alone has tiles, and behind its last copies, which are of nothing, no other follows"
)
WRITTEN = {
    ("no bias", "_disentangled_bwd_dq_kernel", "cp.async.wait_group"): _ONE_ZONE,
    ("no bias", "_disentangled_bwd_dkv_kernel", "cp.async.wait_group"): _ONE_ZONE,
}


def marked(name):
    return pytest.param(name, marks=() if name in SAMPLE else pytest.mark.every_case)


def launches_of(architecture, cases):
    """Run forward and backward of every case, and return the launches of each kernel that orders something."""
    device = triton_driver.Device(architecture)
    target = Target("ptx", "triton", (BF16, FP32))
    with triton_driver.installed(device), recorded.recorded(device) as found:
        for case in cases:
            problem = inputs.problem(case)
            torch.manual_seed(case.seed)
            for deterministic in (False, True):
                with deterministically(deterministic):
                    budget.evaluate(target.run, problem, inputs.dout(case, problem))
    return [
        launches for launches in found.values() if any(map(mutations.is_ordering, launches[0].machine.program.opcodes))
    ]


def counted(launches, variant):
    """Return how many are noticed, of each class, not executed; and what has no reason."""
    program = launches[0].machine.program
    found = recorded.outcomes(launches)
    for mutant, (kind, _) in found.items():
        if kind == "unexplained" and (variant, program.kernel.name, mutant.opcode) in WRITTEN:
            found[mutant] = "redundant", "written reason"
    counts = Counter(why if kind == "redundant" else kind for kind, why in found.values())
    counts["not executed"] = sum(map(mutations.is_ordering, program.opcodes)) - len(found)
    unexplained = [
        f"{program.kernel.name}, PTX line {mutant.line}: {mutant.opcode}"
        for mutant, (kind, _) in found.items()
        if kind == "unexplained"
    ]
    return counts, unexplained


@pytest.mark.parametrize("name", [marked(name) for name in VARIANTS])
@pytest.mark.parametrize("architecture", [80, 90], ids=lambda a: f"sm_{a}")
def test_what_orders_something_is_missed_or_redundant(request, architecture, name):
    found, unexplained = {}, []
    for launches in launches_of(architecture, VARIANTS[name]):
        counts, without_reason = counted(launches, name)
        key = f"Triton {triton.__version__}, sm_{architecture}, {name}: {launches[0].machine.name.strip('_')}"
        found[key] = found.get(key, Counter()) + counts
        unexplained += without_reason
    assert unexplained == []
    if request.config.getoption("--write-tables"):
        write(found)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    expected = {key: table.get(key) for key in found}
    assert known_version(table) is False or expected == {key: dict(counts) for key, counts in found.items()}


def known_version(table):
    return any(key.startswith(f"Triton {triton.__version__},") for key in table)


def write(found):
    """Write one line for each kernel, in order."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    table |= {key: dict(sorted(counts.items())) for key, counts in found.items()}
    lines = [f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table)]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def test_every_class_of_the_table_is_explained():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    named = {name for counts in table.values() for name in counts}
    assert named - {"noticed", "not executed"} <= {*reasons.CLASSES, "written reason"}
