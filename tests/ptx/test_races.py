"""Shared memory: two accesses, one of them a write, that nothing orders are an error in every order of the warps."""

import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run

# A store of warp 0 and a load of warp 1.
STORE_AND_LOAD = """
    setp.lt.u32 %p1, %r1, 32;
    shl.b32 %r5, %r2, 2;
    @%p1 st.shared.b32 [%r5], %r1;
    {between}
    @!%p1 ld.shared.b32 %r6, [%r5];
"""
# A load of warp 0 and then a store of warp 1.
LOAD_AND_STORE = """
    setp.lt.u32 %p1, %r1, 32;
    shl.b32 %r5, %r2, 2;
    @%p1 st.shared.b32 [%r5], %r1;
    @%p1 ld.shared.b32 %r6, [%r5];
    {between}
    @!%p1 st.shared.b32 [%r5], %r1;
"""


@pytest.mark.parametrize("body", [STORE_AND_LOAD, LOAD_AND_STORE])
@pytest.mark.parametrize("seed", range(3))
def test_warps_without_a_barrier_between_them(body, seed):
    Run(body.format(between="bar.sync 0;"), threads=64, shared=128, seed=seed)
    with pytest.raises(
        PtxError, match=r"race: .* of shared memory at byte \d+, which warp . lane \d+ (wrote|read), and nothing orders"
    ):
        Run(body.format(between=""), threads=64, shared=128, seed=seed)


def test_a_load_that_comes_first_reads_what_nobody_wrote_or_races():
    with pytest.raises(PtxError, match=r"race|nobody wrote"):
        Run(STORE_AND_LOAD.format(between=""), threads=64, shared=128, late=[0])


def test_a_barrier_of_other_warps_orders_nothing():
    between = "@!%p1 bra over;\n bar.sync 1, 32;\nover:\n"
    with pytest.raises(PtxError, match="race"):
        Run(STORE_AND_LOAD.format(between=between), threads=64, shared=128, late=[1])


def test_lanes_of_a_warp_are_ordered_by_its_barrier_not_by_lockstep():
    body = """
    shl.b32 %r5, %r2, 2;
    xor.b32 %r6, %r5, 4;
    st.shared.b32 [%r5], %r1;
    {between}
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd2], %r7;
"""
    run = Run(body.format(between="bar.warp.sync -1;"), shared=128)
    assert run.out.tolist() == [lane ^ 1 for lane in range(32)]
    with pytest.raises(PtxError, match="race: load of shared memory at byte 4, which warp 0 lane 1 wrote"):
        Run(body.format(between=""), shared=128)


def test_a_lane_is_ordered_with_itself():
    store, load = "    st.shared.b32 [%r5], %r1;\n", "    ld.shared.b32 %r6, [%r5];\n"
    Run("    shl.b32 %r5, %r2, 2;\n" + store + load + store, shared=128)


def test_lanes_that_store_different_values_to_one_place():
    Run("    st.shared.b32 [memory], 7;", shared=16)
    with pytest.raises(PtxError, match="race: store of shared memory at byte 0, which warp 0 lane 0 wrote"):
        Run("    st.shared.b32 [memory], %r1;", shared=16)


def test_warps_that_store_the_same_value_are_no_race():
    Run("    st.shared.b32 [memory], 7;", threads=64, shared=16)
    with pytest.raises(PtxError, match="race"):
        Run("    shr.u32 %r5, %r1, 5;\n    st.shared.b32 [memory], %r5;", threads=64, shared=16)


def test_bytes_of_a_word_have_their_own_past():
    body = """
    cvt.u16.u32 %h1, %r1;
    shl.b32 %r5, %r1, 1;
    st.shared.b16 [%r5], %h1;
    {between}
    shl.b32 %r6, %r2, 2;
    setp.lt.u32 %p1, %r1, 32;
    @%p1 ld.shared.b32 %r7, [%r6];
    @%p1 st.global.b32 [%rd2], %r7;
    bar.sync 0;
    @!%p1 st.shared.b32 [%r6], %r1;
"""
    run = Run(body.format(between="bar.sync 0;"), threads=64, shared=128)
    assert run.out.tolist() == [2 * lane | (2 * lane + 1) << 16 for lane in range(32)]
    with pytest.raises(PtxError, match=r"race|nobody wrote"):
        Run(body.format(between=""), threads=64, shared=128)


def test_a_word_that_is_half_written_is_not_written():
    with pytest.raises(PtxError, match="nobody wrote, at byte 2"):
        Run("    st.shared.b16 [memory], 7;\n    bar.warp.sync -1;\n    ld.shared.b32 %r5, [memory];", shared=16)


def test_every_reader_counts_before_a_store():
    body = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 st.shared.b32 [memory], 7;
    bar.sync 0;
    ld.shared.b32 %r5, [memory];
    {between}
    setp.ge.u32 %p2, %r1, 224;
    @%p2 st.shared.b32 [memory], 9;
"""
    Run(body.format(between="bar.sync 0;"), threads=256, shared=16)
    # Warps 4 to 7 meet; warps 0 to 3 have read and told nobody.
    between = "setp.lt.u32 %p3, %r1, 128;\n @%p3 bra over;\n bar.sync 1, 128;\nover:\n"
    with pytest.raises(PtxError, match=r"race: store of shared memory at byte 0, which warp [0-3] .*read"):
        Run(body.format(between=between), threads=256, shared=16, late=[4, 5, 6, 7])


@pytest.mark.parametrize(("between", "excused"), [("", 63), ("bar.sync 0;", 62)])
def test_equal_stores_that_nothing_orders_are_no_race_and_counted(between, excused):
    """Those of the lanes of a warp, and that of the first warp's before the other's."""
    body = f"""
    setp.lt.u32 %p1, %r1, 32;
    @%p1 st.shared.b32 [memory], 7;
    {between}
    @!%p1 st.shared.b32 [memory], 7;
    """
    run = Run(body, out=64, threads=64, shared=16)
    assert run.machine.excused == excused
