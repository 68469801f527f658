"""mbarrier objects: phases, arrivals, transaction counts, and who learns what from whom."""

import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run

# Thread 0 makes a barrier at byte 1024, for as many arrivals as %r30 says.
INIT = """
    mov.u32 %r30, {arrivals};
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [memory+1024], %r30;
    {fence}
    bar.sync 0;
"""
WAIT = """
again{n}:
    mbarrier.try_wait.parity.shared::cta.b64 %p9, [memory+1024], {parity};
    @!%p9 bra again{n};
"""
# Warp 0 stores and arrives; warp 1 waits and loads.
HAND_OVER = """
    setp.ge.u32 %p2, %r1, 32;
    shl.b32 %r5, %r2, 2;
    @%p2 bra consume;
    st.shared.b32 [%r5], %r1;
    {sync}
    {arrive}
    bra over;
consume:
    {wait}
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd2+-128], %r6;
over:
"""


def run(arrivals=32, sync="", arrive="mbarrier.arrive.shared::cta.b64 _, [memory+1024];", wait=None, rest="", **more):
    init = INIT.format(arrivals=arrivals, fence="")
    body = init + HAND_OVER.format(sync=sync, arrive=arrive, wait=WAIT.format(n="", parity=0) if wait is None else wait)
    return Run(body + rest, threads=64, shared=2048, **more)


ONE = "setp.eq.u32 %p3, %r2, 0;\n    @%p3 mbarrier.arrive.shared::cta.b64 _, [memory+1024];"


@pytest.mark.parametrize("late", [(), (0,), (1,)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_phase_ends_when_all_have_arrived(late, seed):
    assert run(late=late, seed=seed).out.tolist() == list(range(32))
    # One lane may arrive for all, once the warp has met.
    assert run(1, "bar.warp.sync -1;", ONE, late=late, seed=seed).out.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wait": ""}, "race|nobody wrote"),
        ({"arrivals": 33}, "deadlock: warp 1 waits for an mbarrier, a product or registers, line"),
        ({"arrivals": 1, "arrive": ONE}, "race: load of shared memory at byte .*, which warp 0 lane"),
        ({"arrivals": 16}, None),
        ({"wait": WAIT.format(n="", parity=1)}, "race|nobody wrote"),
    ],
)
def test_handing_over_wrongly(changes, message):
    if message is None:  # two phases have passed: parity 0 looks unfinished again
        with pytest.raises(PtxError, match=r"deadlock|race"):
            run(late=(1,), **changes)
        return
    with pytest.raises(PtxError, match=message):
        run(**changes)


# Nothing waits: the kernel asks again until the answer is yes.
POLL = """
again{n}:
    mbarrier.test_wait.parity.shared::cta.b64 %p9, [memory+1024], {parity};
    add.u32 %r40, %r40, 1;
    @!%p9 bra again{n};
"""


@pytest.mark.parametrize("late", [(), (0,), (1,)])
def test_a_warp_may_ask_instead_of_waiting(late):
    polled = run(late=late, wait=POLL.format(n="", parity=0), sync="mov.u32 %r40, 0;")
    assert polled.out.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrivals": 33}, "deadlock: warp 1 waits"),
        # Asked once, and gone on whatever the answer was.
        ({"wait": "mbarrier.test_wait.parity.shared.b64 %p9, [memory+1024], 0;", "arrivals": 33}, "race|nobody wrote"),
    ],
)
def test_asking_wrongly(changes, message):
    with pytest.raises(PtxError, match=message):
        run(**{"wait": POLL.format(n="", parity=0), **changes})


def test_phases_follow_each_other():
    body = (
        INIT.format(arrivals=64, fence="")
        + """
    mov.u32 %r7, 0;
    shl.b32 %r5, %r1, 2;
    xor.b32 %r6, %r5, 128;
    mov.u32 %r9, 0;
loop:
    add.u32 %r8, %r7, %r1;
    st.shared.b32 [%r5], %r8;
    mbarrier.arrive.shared::cta.b64 _, [memory+1024];
    and.b32 %r10, %r7, 1;
"""
        + WAIT.format(n=1, parity="%r10")
        + """
    ld.shared.b32 %r8, [%r6];
    add.u32 %r9, %r9, %r8;
    bar.sync 0;
    add.u32 %r7, %r7, 1;
    setp.lt.u32 %p4, %r7, 5;
    @%p4 bra loop;
    st.global.b32 [%rd2], %r9;
"""
    )
    assert Run(body, out=64, threads=64, shared=2048).out.tolist() == [10 + 5 * (i ^ 32) for i in range(64)]


ARRIVE = "    @%p1 mbarrier.arrive.shared::cta.b64 _, [memory+1024];\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (INIT.format(arrivals=0, fence=""), "an mbarrier for 0 arrivals; 1 to 1048575 are possible"),
        (
            INIT.format(arrivals=1, fence="@%p1 mbarrier.init.shared::cta.b64 [memory+1024], 1;"),
            "of an mbarrier that is one already, at byte 1024",
        ),
        (INIT.format(arrivals=1, fence="").replace("+1024", "+1028"), "misaligned mbarrier: 8 bytes"),
        (
            INIT.format(arrivals=1, fence="") + ARRIVE.replace("1024", "1032"),
            "there is no mbarrier at byte 1032 of shared memory",
        ),
        (
            INIT.format(arrivals=1, fence="") + "ld.shared.b32 %r5, [memory+1024];",
            "load of shared memory that is an mbarrier, at byte 1024",
        ),
        (
            INIT.format(arrivals=1, fence="")
            + "    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 4;\n"
            + ARRIVE,
            "gets more arrivals in a phase than the 1 it was made for",
        ),
        (
            INIT.format(arrivals=1, fence="")
            + "    @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [memory+1024], 4000000;\n",
            "opcode|counts 4000000 bytes; less than 1048576 are possible",
        ),
        (
            INIT.format(arrivals=1, fence="").replace("bar.sync 0;", "")
            + "    setp.eq.u32 %p2, %r1, 33;\n    @%p2 mbarrier.arrive.shared::cta.b64 _, [memory+1024];",
            "race: the mbarrier at byte 1024 is used, and nothing orders that|there is no mbarrier",
        ),
        (
            INIT.format(arrivals=1, fence="") + "mbarrier.init.shared::cta.b64 [memory+2048], 1;",
            "mbarrier.init out of range",
        ),
    ],
)
def test_barrier_objects_that_are_wrong(body, message):
    with pytest.raises(PtxError, match=message):
        Run(body, threads=64, shared=2048)


def test_lanes_of_one_warp_may_wait_for_each_other():
    """Lanes 1 to 31 wait below; lane 0 arrives above, having waited itself for another lane."""
    second = "[memory+1032]"
    body = (
        INIT.format(arrivals=1, fence=f"@%p1 mbarrier.init.shared::cta.b64 {second}, 1;")
        + f"""
    setp.eq.u32 %p2, %r2, 0;
    @%p2 bra first;
    setp.eq.u32 %p3, %r2, 7;
    @%p3 mbarrier.arrive.shared::cta.b64 _, {second};
    {WAIT.format(n=1, parity=0)}
    ld.shared.b32 %r6, [memory];
    st.global.b32 [%rd2], %r6;
    bra over;
first:
    {WAIT.format(n=2, parity=0).replace("[memory+1024]", second)}
    st.shared.b32 [memory], 5;
    mbarrier.arrive.shared::cta.b64 _, [memory+1024];
over:
"""
    )
    assert Run(body, shared=2048).out.tolist() == [0] + [5] * 31


def test_a_warp_meets_again_behind_lanes_that_wait():
    """Lane 0 waits for warp 1; the other lanes come to the barrier of the warp first, and wait there."""
    body = (
        INIT.format(arrivals=1, fence="")
        + f"""
    setp.lt.u32 %p2, %r1, 32;
    @!%p2 bra other;
    setp.ne.u32 %p3, %r2, 0;
    @%p3 bra meet;
    {WAIT.format(n=1, parity=0)}
meet:
    bar.warp.sync -1;
    shfl.sync.idx.b32 %r5, %r1, 3, 31, -1;
    st.global.b32 [%rd2], %r5;
    bra over;
other:
    setp.eq.u32 %p4, %r2, 0;
    @%p4 mbarrier.arrive.shared::cta.b64 _, [memory+1024];
over:
"""
    )
    run = Run(body, threads=64, shared=2048, late=[1])
    assert run.out.tolist() == [3] * 32
    # Waiting again and again counts once.
    assert run.count("mbarrier.try_wait")["executed"] == 1
    assert run.count("bar.warp.sync")["executed"] == 1
