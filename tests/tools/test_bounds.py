"""Holding compiled kernels to their bounds: every way to be wrong is found and named."""

import dataclasses

import pytest
from offline import bounds
from offline.counting import Counts, Report

NAME = "fwd_kernel bf16 D64 bias"
GOOD = Report(
    registers=255,
    stack=64,
    shared=90000,
    matrix_name="HGMMA",
    whole=Counts(instructions=3000, matrix=40, local_loads=50),
    near=Counts(instructions=900, matrix=20),
    far=Counts(instructions=320, matrix=8),
)


def judged(report=GOOD, chip="sm_90", name=NAME, plain=300, bound=None):
    wrong = bounds.judge(report, chip, name, bounds.limits(GOOD) if bound is None else bound)
    return wrong + bounds.broken_promises(report, chip, name, plain)


def changed(**values):
    return dataclasses.replace(GOOD, **values)


def test_a_good_kernel_is_not_wrong():
    assert judged() == []


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (changed(shared=240000), "shared memory 240000 is more than the 232448 bytes"),
        (changed(whole=Counts(instructions=16)), "a stub: 16 instructions"),
        (changed(matrix_name=""), "no matrix instruction"),
        (changed(matrix_name="HMMA"), "matrix instruction HMMA, not HGMMA"),
        (changed(whole=Counts(instructions=3000, local_loads=900)), "900 of 3000 instructions access local memory"),
        (changed(far=Counts(instructions=320, matrix=8, local_stores=1)), "1 accesses to local memory in the far loop"),
        (changed(near=Counts(instructions=951, matrix=20)), "near loop over 950"),
        (changed(far=Counts(instructions=331, matrix=8)), "far loop 331 instructions, plain flash attention has 300"),
        (changed(far=None), "no far loop was found"),
        (changed(registers=272), "registers 272 is over 271 (was 255)"),
        (changed(stack=129), "stack 129 is over 128 (was 64)"),
        (changed(shared=90001), "shared 90001 is over 90000 (was 90000)"),
    ],
)
def test_what_is_wrong_is_named(report, words):
    assert any(words in clause for clause in judged(report)), judged(report)


def test_a_kernel_without_a_bound_is_wrong():
    assert "no bound is committed" in bounds.judge(GOOD, "sm_90", NAME, None)[0]


def test_promises_hold_for_the_main_variant_alone():
    far = changed(far=Counts(instructions=900, matrix=8))
    loose = {name: [value, 10**6] for name, (value, _) in bounds.limits(GOOD).items()}
    assert judged(far, bound=loose) != []
    assert judged(far, name="fwd_kernel bf16 D64 bias+mask", bound=loose) == []
    assert judged(far, name="fwd_kernel fp16 D128 bias", bound=loose) == []
    exact = changed(matrix_name="")
    assert judged(exact, name="fwd_kernel fp32 D64 bias", bound=loose) == []


def test_helper_kernels_need_no_matrix_instruction():
    small = Report(32, 0, 0, "", Counts(instructions=100), None, None)
    assert bounds.judge(small, "sm_90", "expand_kernel bf16 D64", bounds.limits(small)) == []


def test_bounds_survive_the_file(tmp_path):
    path = tmp_path / "bounds.json"
    assert bounds.load(path) == {}
    stored = {"3.9": {"sm_90": {NAME: bounds.limits(GOOD)}, "sm_80": {}}, "3.6": {"sm_90": {NAME: bounds.limits(GOOD)}}}
    bounds.store(stored, path)
    assert bounds.load(path) == stored
    assert Report.from_json(GOOD.as_json()) == GOOD


def record(name, report):
    return {"chip": "sm_90", "name": name, "report": report.as_json(), "plain": 300}


def test_a_miss_that_is_known_is_printed_and_one_that_is_not_is_wrong(capsys):
    import kernels_offline

    far = changed(far=Counts(instructions=331, matrix=8))
    result = {"triton": "3.9", "release": "3.9.0", "seconds": 1.0, "records": [record(NAME, far)]}
    known = {"3.9": {"sm_90": {NAME: bounds.limits(far)}}}
    assert kernels_offline.report_on(result, known, {}, update=False) == 1
    assert kernels_offline.report_on(result, known, {f"sm_90 {NAME}": "a reason"}, update=False) == 0
    assert "MISSED sm_90 fwd_kernel bf16 D64 bias: far loop 331" in capsys.readouterr().out
    worse = {**result, "records": [record(NAME, changed(far=Counts(instructions=400, matrix=8)))]}
    assert kernels_offline.report_on(worse, known, {f"sm_90 {NAME}": "a reason"}, update=False) == 1


def test_an_update_forgets_kernels_that_are_gone_unless_a_part_was_compiled(capsys):
    import kernels_offline

    result = {"triton": "3.9", "release": "3.9.0", "seconds": 1.0, "records": [record(NAME, changed())]}
    for complete, expected in ((False, {NAME, "old_kernel"}), (True, {NAME})):
        known = {"3.9": {"sm_90": {"old_kernel": {}}}}
        kernels_offline.report_on({**result, "complete": complete}, known, {}, update=True)
        assert known["3.9"]["sm_90"].keys() == expected


def test_a_kernel_that_does_not_compile_is_wrong(capsys):
    import kernels_offline

    result = {"triton": "3.9", "release": "3.9.0", "seconds": 1.0, "complete": True}
    result["records"] = [{"chip": "sm_90", "name": NAME, "error": "CompilationError: no"}]
    assert kernels_offline.report_on(result, {}, {}, update=True) == 1
    assert "does not compile: CompilationError: no" in capsys.readouterr().out
