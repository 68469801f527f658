"""What the kernels execute per tile, a part of `make count-ptx`: within the committed bounds, and as the zones say."""

from dataclasses import replace

import pytest
from counted import bounds, execution, variants, zones
from counted.variants import Unit
from ptx.drivers import cuda_modules

COMMITTED = bounds.load()
# The compiler of `make test-ptx`; `make count-ptx` counts what every one makes that is here.
UNITS = [Unit(compiler, "sm_90a", "bf16", 64, "bias") for compiler in cuda_modules.compilers()[:1]]
UNITS += [Unit("triton", chip, "bf16", 64, "bias") for chip in ("sm_80", "sm_90")]


def named(units):
    return [pytest.param(unit, id=unit.title) for unit in units]


@pytest.fixture(scope="module", params=named(UNITS))
def records(request):
    if (release := variants.release(request.param.compiler)) not in COMMITTED:
        pytest.skip(f"no counts of {release} are committed")
    return variants.records_of(request.param)


def test_counts_are_within_their_bounds(records):
    wrong = {record.title: problems for record in records if (problems := bounds.judge(record, COMMITTED))}
    assert wrong == {}


def test_zones_hold_what_the_mathematics_says(records):
    """Products of 64 x 64 x 16: four for scores and values each of a far tile, and of each of three more near."""
    found = {(record.name, record.zone): record.values for record in records}
    forward = next(name for name, _ in found if "fwd_kernel" in name or "forward" in name)
    assert found[forward, "far"]["matrix"] == found[forward, "prefix"]["matrix"] == 8
    assert found[forward, "near"]["matrix"] == 20
    # Keys and values, of 64 x 64 numbers of two bytes.
    tiles = found[forward, "far"]["bytes"] / (64 * 64 * 2)
    assert tiles == (2 if records[0].chip == "sm_80" else 1)  # two tiles of queries share them
    assert found[forward, "far"]["sectors"] * 32 == found[forward, "far"]["bytes"]


def test_places_of_conflicts_are_in_the_kernels(records):
    for record in records:
        assert (record.values["conflicts"] > 0) == bool(record.conflicts)
        assert all(place.place for place in record.conflicts)


def test_a_larger_problem_says_the_same_of_its_tiles(monkeypatch):
    def larger(zone):
        step = zones.STEP
        return replace(zone, case=replace(zone.case, nq=zone.case.nq + step, nk=zone.case.keys + step))

    def tiles():
        return {record[2:4]: record.values for record in variants.records_of(UNITS[0]) if record.zone != zones.PROGRAM}

    expected, few = tiles(), zones.zones_of
    monkeypatch.setattr(execution, "zones_of", lambda features: [larger(zone) for zone in few(features)])
    assert tiles() == expected
