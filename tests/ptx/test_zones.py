"""One tile of a zone, out of problems that differ by it: exact, with its figures and source lines."""

import numpy as np
import pytest
from counted import zones
from counted.execution import Executed
from counted.figures import conflicts, figures_of
from counted.places import Sources

from tests.ptx.small_kernels import Run, module

# A tile: two barriers, a store of 32 words to one bank; outside of the loop one more store.
BODY = """
    ld.param.u64 %rd10, [tiles];
    ld.global.b32 %r10, [%rd10];
    mul.lo.u32 %r6, %r2, 128;
    st.shared.b32 [%r6], %r1;
LOOP:
    bar.sync 0;
    st.shared.b32 [%r6], %r2;
    bar.sync 0;
    add.u32 %r10, %r10, -1;
    setp.ne.u32 %p1, %r10, 0;
    @%p1 bra LOOP;
    ld.global.b32 %r11, [%rd1];
"""
ZONE = zones.ZONES["near"]
KERNEL = "kernel"


@pytest.fixture(scope="module")
def executed():
    machines = []

    def run(zone, steps):
        rows, tiles = (n // zones.STEP + more for n, more in zip((zone.case.nq, zone.case.keys), steps, strict=True))
        # Twice the tiles per step, 4 x 4 of 64.
        counts = np.array([4 * tiles], np.uint32)
        machines.append(Run(BODY, grid=(rows,), shared=4096, tiles=counts).machine)
        return {KERNEL: machines[-1].counts}

    found = zones.by_zone([ZONE], run)[KERNEL]
    return Executed(machines[0], 2, found)


def test_a_tile_is_what_grows_with_queries_times_keys(executed):
    values = figures_of(executed, "near").values
    # One warp: a quarter of an instruction a warp of four.
    assert (values["instructions"], values["barriers"], values["wavefronts"]) == (6 / 4, 2 / 4, 32)
    assert (values["conflicts"], values["bytes"], values["matrix"]) == (31, 0, 0)


def test_a_program_is_what_is_left(executed):
    values = figures_of(executed, zones.PROGRAM).values
    outside = sum(executed.machine.counts[:, 0] == 2)
    assert values["instructions"] == outside / 4
    assert (values["wavefronts"], values["barriers"], values["bytes"]) == (32, 0, 2 * 128)


def test_classes_add_up_to_all_instructions(executed):
    figures = figures_of(executed, "near")
    assert sum(figures.classes.values()) == figures.values["instructions"]
    assert figures.classes["store shared"] == 1 / 4


def test_what_does_not_grow_with_tiles_is_a_program_alone():
    def run(zone, steps):
        return {KERNEL: Run("    add.u32 %r5, %r1, %r2;", grid=(3 + steps[1],)).machine.counts}

    assert zones.by_zone([ZONE], run)[KERNEL].keys() == {zones.PROGRAM}


def test_what_a_driver_adds_is_not_counted():
    body = "    cp.async.wait_group 0; fence.proxy.async.shared::cta;\n    fence.proxy.async.shared::cta;"
    machine = Run(body).machine
    figures = figures_of(Executed(machine, 1, {zones.PROGRAM: machine.counts}), zones.PROGRAM)
    assert figures.classes["barrier"] == 1 / 4
    assert figures.values["waits"] == 1 / 4


PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"


@pytest.mark.parametrize(("first", "operands"), [("%rd20", 4096 / 128), ("{%r1, %r1, %r1, %r1}", 2048 / 128)])
def test_products_and_their_operands(first, operands):
    sums = ", ".join(f"%f{n}" for n in range(32))
    zeros = "\n".join(f"    mov.f32 %f{n}, 0f00000000;" for n in range(32))
    body = f"""{zeros}
    wgmma.fence.sync.aligned;
    setp.ne.u32 %p1, %r1, 9999;
    {PRODUCT} {{{sums}}}, {first}, %rd21, %p1, 1, 1, 0{", 0" if first == "%rd20" else ""};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
"""
    program = zones_program(body)
    values = figures_of(program, zones.PROGRAM).values
    assert (values["matrix"], values["operands"], values["waits"]) == (1, operands, 1)


def zones_program(body):
    """A kernel of four warps that executed every instruction once, or is taken to have."""
    from ptx.machine import Machine

    machine = Machine(module(body, threads=128))
    machine.counts[:, 0] = 4
    return Executed(machine, 1, {zones.PROGRAM: machine.counts})


def test_the_places_of_conflicts_are_source_lines():
    body = """
    .loc 1 12 3 // kernel.py:12:3
    mul.lo.u32 %r6, %r2, 8;
    .loc 2 96 20 // primitives.py:96:20 @[ kernel.py:14:5 @[ kernel.py:40:1 ] ]
    st.shared.b32 [%r6], %r2;
    st.shared.b32 [%r6], %r2;
"""
    machine = Run(body, shared=256).machine
    machine.program.source.append('.file 1 "/a/b/kernel.py"\n.file 2 "/a" "primitives.py"')
    (found,) = conflicts(Executed(machine, 1, {zones.PROGRAM: machine.counts}), zones.PROGRAM)
    assert found == ("primitives.py:96 from kernel.py:14 from kernel.py:40", "st.shared.b32", 2, 4, 2)


def test_places_of_functions_that_nvcc_inlined():
    text = [
        '.file 1 "/src/backward.cu"', '.file 2 "/src/tiles.h"', '.file 3 "/src/primitives.h"',
        "add", " .loc 1 23 9", " .loc 2 50 3, function_name $L__info_string0, inlined_at 1 23 9",
        " .loc 3 68 3, function_name $L__info_string1, inlined_at 2 50 3", "st.shared", " .loc 1 30 1", "ret",
    ]  # fmt: skip
    sources = Sources(text)
    assert sources.of(8) == "primitives.h:68 from tiles.h:50 from backward.cu:23"
    assert (sources.of(10), sources.of(4)) == ("backward.cu:30", "")


@pytest.mark.parametrize("features", ["none", "bias", "bias+mask", "bias+pair", "bias+dropout"])
def test_problems_of_zones(features):
    for zone in zones.zones_of(features):
        small, large = (zones.problem(zone, features, zones.torch.float32, 32, steps) for steps in ((0, 0), (1, 1)))
        assert large.q.shape[2] == small.q.shape[2] + zones.STEP
        assert large.k.shape[2] == small.k.shape[2] + zones.STEP
        added = large.position.prefix_length - small.position.prefix_length
        assert added == (zones.STEP if zone.name == "prefix" else 0)
        assert (small.pos_key is None) == (features == "none")
        assert (small.dropout_p > 0) == ("dropout" in features)
        mask = small.masks.pair if "pair" in features else small.masks.key
        assert (mask is not None) == ("mask" in features or "pair" in features)
        if mask is not None and "pair" not in features:
            taken = (~mask.view(-1, 16)).sum(1)
            assert taken.tolist() == [int(zone.holes)] * len(taken)
