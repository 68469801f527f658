"""The Triton kernels as Triton compiles them for sm_80 and sm_90, executed: by its own binder and the package's plans.

Ten seconds a variant are the compiler's, and kept in TRITON_CACHE_DIR; a case then takes a second or less.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from ptx.drivers import triton_driver
from ptx.errors import PtxError
from triton import knobs

from deberta_kernels.impl.triton import fences, launch
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.backends import Target
from deberta_kernels.testing.inputs import MASKS, Case
from tests.ptx.kernels import problems
from tests.ptx.kernels.problems import BF16, FAR, FEW_KEYS, FP16, FP32, GENERAL, SHORT

ARCHITECTURES = (80, 90)
CASES = [
    *GENERAL,
    *FEW_KEYS,
    # Every mask in every zone.
    *(
        Case(
            batch=2,
            heads=1,
            nq=150 if mask.endswith("tokens") else 81,
            nk=150,
            dtype=BF16,
            mask=mask,
            position_buckets=8,
            max_relative_positions=20,
        )
        for mask in MASKS
    ),
    # One number a lane: sums of products must be the same in all lanes that hold one.
    Case(batch=1, heads=1, nq=70, head_dim=17, dtype=FP32, position_buckets=8, max_relative_positions=20),
    *(Case(batch=2, heads=1, nq=150, dtype=dtype, mask="holes") for dtype in (FP16, FP32)),
    Case(batch=1, heads=1, nq=330, dtype=FP16, mask="right_tokens", **SHORT),
    Case(batch=1, heads=1, nq=200, dtype=FP32, mask="right", **SHORT),
    *(Case(batch=1, heads=1, nq=n, head_dim=d, dtype=BF16, **SHORT) for d in (32, 40, 128) for n in (77, 200)),
]
# Warps that fall behind: one, and all but one.
LATE = [(0,), (1, 2, 3)]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def device(request):
    with triton_driver.installed(triton_driver.Device(request.param)) as device:
        yield device


@pytest.fixture(autouse=True)
def in_order(request):
    """Start every test with the same order of warps."""
    if "device" in request.fixturenames:
        device = request.getfixturevalue("device")
        device.seed, device.late = 0, ()


def named(cases):
    return [pytest.param(c, id=c.id) for c in cases]


@pytest.mark.parametrize("case", named(CASES))
def test_results_and_gradients_are_within_the_budget(device, check, case):
    check("triton", case)


@pytest.mark.parametrize("case", named([
    Case(batch=2, heads=1, nq=150, dtype=BF16, mask="holes", **SHORT),
    Case(batch=1, heads=1, nq=330, dtype=BF16, **SHORT),
    Case(batch=1, heads=1, nq=111, head_dim=128, dtype=BF16, **SHORT),
]))  # fmt: skip
def test_devices_with_little_shared_memory_are_within_the_budget(check, case):
    with triton_driver.installed(triton_driver.Device(86)):
        check("triton", case)


@pytest.mark.parametrize("late", LATE, ids=str)
@pytest.mark.parametrize("case", named([Case(batch=1, heads=1, nq=330, dtype=BF16, **SHORT)]))
def test_a_warp_may_fall_behind(device, check, case, late):
    device.seed, device.late = 7 * len(late), late
    check("triton", case)


DETERMINISTIC = [
    Case(batch=2, heads=1, nq=150, dtype=BF16, mask="holes"),
    Case(batch=1, heads=2, nq=330, dtype=FP16, **SHORT),
    Case(batch=1, heads=1, nq=200, dtype=FP32, **SHORT),
]


@contextmanager
def deterministically():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", named(DETERMINISTIC))
def test_deterministic_gradients_are_within_the_budget(device, check, case):
    with deterministically():
        check("triton", case)


@pytest.mark.parametrize("case", named([Case(batch=2, heads=1, nq=200, dtype=BF16, **SHORT)]))
def test_only_the_sums_of_tables_depend_on_the_order_of_blocks(device, case):
    """All other gradients have one order, and all of them where it is asked for."""
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    run = Target("triton", "triton", (case.dtype,)).run

    def gradients(seed):
        device.seed = seed
        return budget.evaluate(run, problem, dout)

    with deterministically():
        first, *others = (gradients(seed) for seed in (1, 100))
    fused = [gradients(seed) for seed in (1, 100, 200)]
    tables = {"dpos_key", "dpos_query"}
    for again in others:
        assert all(torch.equal(again[name], x) for name, x in first.items())
    for again in fused:
        assert all(torch.equal(again[name], x) for name, x in first.items() if name not in tables)


@pytest.mark.every_case
@pytest.mark.parametrize("case", named(problems.every_case()))
def test_every_case_of_the_gpu_program(device, check, case):
    check("triton", case)


@pytest.mark.parametrize("case", named([Case(batch=1, heads=1, nq=64, dtype=BF16, **SHORT)]))
def test_a_launch_that_is_left_out_is_found_by_what_the_next_one_reads(device, check, case, monkeypatch):
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda step: None if "preprocess" in step.kernel.__name__ else run(step))
    with pytest.raises(PtxError, match="load of memory that nobody wrote"):
        check("triton", case)


def test_devices_are_told_apart(check):
    case = Case(batch=1, heads=1, nq=64, dtype=BF16, **SHORT)
    opcodes = {}
    for architecture in ARCHITECTURES:
        with triton_driver.installed(triton_driver.Device(architecture)) as device:
            check("triton", case)
        opcodes[architecture] = {opcode for m in device.machines.values() for opcode in m.program.opcodes}
    assert not any(opcode.startswith("wgmma") for opcode in opcodes[80])
    assert any(opcode.startswith("wgmma") for opcode in opcodes[90])


if fences.needed("sm_90", 2):

    @pytest.mark.parametrize("case", named([replace(FAR, nq=1000)]))
    def test_what_triton_compiles_without_added_fences_is_a_race(check, case, monkeypatch):
        monkeypatch.setattr(fences, "needed", lambda *given: False)
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
        missing = r"race: wgmma operand of shared memory .* a fence\.proxy\.async is missing between the two"
        with triton_driver.installed(triton_driver.Device(90)), pytest.raises(PtxError, match=missing):
            check("triton", case)
