"""Holding executed counts to their bounds: what grows is named, with its figure, bound and place."""

import count_ptx
import pytest
from counted import bounds
from counted.bounds import Record
from counted.figures import Conflict

PLACES = (Conflict("primitives.py:170 from query_grad.py:147", "ld.shared.b16", 128, 576, 448),)
VALUES = {"instructions": 1000, "wavefronts": 1728, "conflicts": 448, "sectors": 1024, "barriers": 2.5}
GOOD = Record("triton 3.9", "sm_90", "bwd_dq_kernel bf16 D64 bias", "near", VALUES, {"float": 1000}, PLACES)


def committed(*records):
    found = {}
    bounds.update(found, records, complete=True)
    return found


def judged(**values):
    return bounds.judge(GOOD._replace(values={**VALUES, **values}), committed(GOOD))


def test_what_was_counted_before_is_not_wrong():
    assert judged() == []
    assert judged(instructions=1034, wavefronts=1700, conflicts=0) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"instructions": 1035}, "instructions 1035 is over 1034 (was 1000)"),
        ({"sectors": 1025}, "sectors 1025 is over 1024 (was 1024)"),
        ({"barriers": 2.75}, "barriers 2.75 is over 2.5 (was 2.5)"),
        (
            {"conflicts": 449},
            "conflicts 449 is over 448 (was 448); conflicts: "
            "448 by ld.shared.b16 at primitives.py:170 from query_grad.py:147",
        ),
        ({"operands": 1}, "operands 1 is over 0 (was 0)"),
    ],
)
def test_what_has_grown_is_named(values, words):
    assert judged(**values) == [words]


def test_a_kernel_without_a_bound_is_wrong():
    assert "no bound is committed" in bounds.judge(GOOD._replace(zone="far"), committed(GOOD))[0]


def test_a_kernel_that_was_not_executed_is_missing_unless_its_compiler_is():
    known = committed(GOOD, GOOD._replace(zone="far"), GOOD._replace(compiler="triton 3.6"))
    assert bounds.missing([GOOD], known) == ["triton 3.9 sm_90 bwd_dq_kernel bf16 D64 bias, far"]
    assert bounds.missing([], known) == []


def test_an_update_forgets_what_is_gone_unless_a_part_was_executed():
    known = committed(GOOD, GOOD._replace(zone="far"))
    bounds.update(known, [GOOD], complete=False)
    assert len(known["triton 3.9"]["sm_90"]) == 2
    bounds.update(known, [GOOD], complete=True)
    assert known["triton 3.9"]["sm_90"].keys() == {"bwd_dq_kernel bf16 D64 bias, near"}


def test_bounds_survive_the_file(tmp_path):
    path = tmp_path / "bounds.json"
    bounds.store(committed(GOOD), path)
    assert bounds.load(path) == committed(GOOD)


def test_the_report_names_places_and_what_is_wrong(capsys):
    known = committed(GOOD, GOOD._replace(zone="far"))
    values = {**dict.fromkeys(count_ptx._FIGURES, 0), **VALUES}
    records = [GOOD._replace(values={**values, "sectors": 2000})]
    assert count_ptx.report_on(records, known, classes=True, complete=True) == 2
    lines = capsys.readouterr().out.splitlines()
    assert (
        "CONFLICTS at primitives.py:170 from query_grad.py:147: 448 of 576 wavefronts by 128 ld.shared.b16 "
        "(bwd_dq_kernel bf16 D64 bias, near)" in lines
    )
    assert "WRONG triton 3.9 sm_90 bwd_dq_kernel bf16 D64 bias, near: sectors 2000 is over 1024 (was 1024)" in lines
    assert "WRONG triton 3.9 sm_90 bwd_dq_kernel bf16 D64 bias, far: has bounds, and was not executed" in lines
    assert count_ptx.report_on(records, known, classes=False, complete=False) == 1


def test_kernels_that_meet_the_same_conflict_share_a_line():
    worse = Conflict("primitives.py:178 from position_grad.py:115", "ld.shared.b16", 128, 640, 512)
    records = [GOOD, GOOD._replace(zone="near masked"), GOOD._replace(name="bwd_position_kernel", conflicts=(worse,))]
    first, second = count_ptx.conflict_lines(records)
    assert first.startswith("CONFLICTS at primitives.py:178")
    assert second.endswith("(bwd_dq_kernel bf16 D64 bias, near; bwd_dq_kernel bf16 D64 bias, near masked)")
