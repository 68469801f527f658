"""Barriers of a block: who waits for whom, in any order of the warps, and what is wrong with a barrier."""

import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run


@pytest.mark.parametrize("late", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_warps_hand_over_by_named_barriers(late, seed):
    """Warps 0 and 1 produce, warps 2 and 3 consume: one says full, the other empty."""
    body = """
    setp.lt.u32 %p1, %r1, 64;
    and.b32 %r5, %r1, 63;
    shl.b32 %r5, %r5, 2;
    mov.u32 %r6, 0;
    mov.u32 %r9, 0;
again:
    @!%p1 bra consume;
    setp.eq.u32 %p2, %r6, 0;
    @!%p2 bar.sync 2, 128;
    mad.lo.u32 %r7, %r6, 100, %r5;
    st.shared.b32 [%r5], %r7;
    bar.arrive 1, 128;
    bra next;
consume:
    bar.sync 1, 128;
    xor.b32 %r8, %r5, 252;
    ld.shared.b32 %r7, [%r8];
    add.u32 %r9, %r9, %r7;
    setp.lt.u32 %p3, %r6, 3;
    @%p3 bar.arrive 2, 128;
next:
    add.u32 %r6, %r6, 1;
    setp.lt.u32 %p4, %r6, 4;
    @%p4 bra again;
    @!%p1 st.global.b32 [%rd2+-256], %r9;
"""
    run = Run(body, out=64, threads=128, shared=256, late=late, seed=seed)
    assert run.out.tolist() == [600 + 4 * (252 - 4 * i) for i in range(64)]
    with pytest.raises(PtxError, match=r"race|nobody wrote|deadlock"):
        Run(body.replace("@!%p2 bar.sync 2, 128;", ""), threads=128, out=64, shared=256, late=late, seed=seed)


def test_barrier_and_threads_may_be_in_registers():
    body = """
    shr.u32 %r5, %r1, 5;
    shr.u32 %r6, %r5, 1;
    add.u32 %r6, %r6, 1;
    mov.u32 %r7, 64;
    shl.b32 %r8, %r1, 2;
    st.shared.b32 [%r8], %r1;
    bar.sync %r6, %r7;
    xor.b32 %r8, %r8, 128;
    ld.shared.b32 %r9, [%r8];
    st.global.b32 [%rd2], %r9;
"""
    assert Run(body, out=128, threads=128, shared=512).out.tolist() == [i ^ 32 for i in range(128)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;", "deadlock: warp 0 waits at barrier 0, line"),
        (
            "setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 1;\n@!%p1 bar.sync 2;",
            "deadlock: warp 0 waits at barrier 1, .*warp 1 waits at barrier 2",
        ),
        (
            "shr.u32 %r5, %r1, 5;\nadd.u32 %r5, %r5, 1;\nshl.b32 %r5, %r5, 5;\nbar.sync 1, %r5;",
            "deadlock|expects 2 warps, those before it 1|deadlock",
        ),
        ("bar.sync 16;", "there is no barrier 16, only 0 to 15"),
        ("bar.sync 1, 40;", "a barrier for 40 threads, which is no number of whole warps"),
        ("bar.sync 1, 128;", "barrier 1 waits for 128 threads, more than the block has"),
        ("bar.sync 1, %r2;", "lanes of a warp disagree about the threads of a barrier"),
        (
            "setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 1, 64;\n@!%p1 bar.sync 1, 32;",
            "barrier 1: this warp expects . warps, those before it .|deadlock",
        ),
    ],
)
def test_barriers_that_are_wrong(body, message):
    with pytest.raises(PtxError, match=message):
        Run(body, threads=64)


def test_registers_are_taken_when_others_have_given_them():
    body = """
    setp.lt.u32 %p1, %r1, 128;
    @!%p1 bra more;
    setmaxnreg.dec.sync.aligned.u32 24;
    bra over;
more:
    setmaxnreg.inc.sync.aligned.u32 240;
over:
    st.global.b32 [%rd2], %r1;
"""
    run = Run(body, out=384, threads=384, late=range(4))
    assert run.out.tolist() == list(range(384))
    with pytest.raises(PtxError, match=r"deadlock: .* waits for an mbarrier, a product or registers"):
        Run(body.replace("dec.sync.aligned.u32 24", "dec.sync.aligned.u32 160"), out=384, threads=384)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setmaxnreg.inc.sync.aligned.u32 100;", "setmaxnreg to 100 registers; multiples of 8 from 24 to 256"),
        ("setmaxnreg.inc.sync.aligned.u32 32;", "setmaxnreg.inc to 32 registers, of 168"),
        ("setmaxnreg.dec.sync.aligned.u32 240;", "setmaxnreg.dec to 240 registers, of 168"),
    ],
)
def test_numbers_of_registers_that_are_wrong(body, message):
    with pytest.raises(PtxError, match=message):
        Run(body, threads=384)
