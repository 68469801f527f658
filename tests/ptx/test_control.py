"""Branches: lanes part, and meet again at the first instruction that both reach."""

import numpy as np
import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run

STORE = "    st.global.u32 [%rd2], %r5;\n"


def test_lanes_loop_as_often_as_each_wants():
    body = (
        "    mov.u32 %r5, 0;\nagain:\n    add.u32 %r5, %r5, 2;\n    setp.lt.u32 %p1, %r5, %r2;\n    @%p1 bra again;\n"
    )
    run = Run(body + STORE)
    assert run.out.tolist() == [max(2, lane + lane % 2) for lane in range(32)]
    # The lanes are together again when they store.
    assert run.count("st.global")["executed"] == 1
    assert run.count("add.u32")["executed"] == 16


def test_nested_branches():
    body = """
    and.b32 %r6, %r2, 1;
    setp.eq.u32 %p1, %r6, 0;
    setp.lt.u32 %p2, %r2, 16;
    mov.u32 %r5, 0;
    @!%p1 bra odd;
    @!%p2 bra even_high;
    add.u32 %r5, %r5, 1;
    bra over;
even_high:
    add.u32 %r5, %r5, 10;
    bra over;
odd:
    add.u32 %r5, %r5, 100;
over:
    add.u32 %r5, %r5, 1000;
"""
    run = Run(body + STORE)
    assert run.out.tolist() == [1100 if lane % 2 else 1001 if lane < 16 else 1010 for lane in range(32)]
    assert run.count("st.global")["executed"] == 1


def test_lanes_that_return_early_store_nothing():
    body = "    setp.gt.u32 %p1, %r2, 3;\n    mov.u32 %r5, 9;\n    @%p1 ret;\n"
    assert Run(body + STORE).out.tolist() == [9] * 4 + [0] * 28


def test_special_registers():
    body = """
    mov.u32 %r6, %ctaid.x;
    mov.u32 %r7, %ctaid.y;
    mov.u32 %r8, %nctaid.x;
    mov.u32 %r9, %ntid.x;
    mov.u32 %r10, %warpid;
    mad.lo.u32 %r11, %r7, %r8, %r6;
    mad.lo.u32 %r12, %r11, %r9, %r1;
    shl.b32 %r5, %r12, 4;
    or.b32 %r5, %r5, %r10;
    mul.wide.u32 %rd5, %r12, 4;
    add.s64 %rd2, %rd1, %rd5;
"""
    run = Run(body + STORE, out=6 * 64, threads=64, grid=(3, 2))
    assert run.out.tolist() == [i << 4 | i % 64 // 32 for i in range(384)]


def test_shuffles():
    body = """
    shfl.sync.bfly.b32 %r5, %r2, 5, 31, -1;
    shfl.sync.up.b32 %r6|%p1, %r2, 1, 0, -1;
    shfl.sync.down.b32 %r7|%p2, %r2, 4, 0x101f, -1;
    shfl.sync.idx.b32 %r8, %r2, 3, 0x181f, -1;
    @!%p1 add.u32 %r6, %r6, 100;
    @!%p2 add.u32 %r7, %r7, 100;
    mul.lo.u32 %r9, %r2, 16;
    cvt.u64.u32 %rd5, %r9;
    add.s64 %rd5, %rd1, %rd5;
    st.global.v4.b32 [%rd5], {%r5, %r6, %r7, %r8};
"""
    out = Run(body, out=128).out.reshape(32, 4)
    lanes = np.arange(32)
    assert out[:, 0].tolist() == (lanes ^ 5).tolist()
    assert out[:, 1].tolist() == [100, *range(31)]
    # Two segments of 16 lanes, by c = 0x101f; four of 8 by 0x181f.
    assert out[:, 2].tolist() == [lane + 4 if lane % 16 < 12 else lane + 100 for lane in range(32)]
    assert out[:, 3].tolist() == [lane // 8 * 8 + 3 for lane in range(32)]


def test_votes_and_reductions():
    body = """
    setp.lt.u32 %p1, %r2, 5;
    vote.sync.ballot.b32 %r5, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1;
    vote.sync.all.pred %p3, %p1, -1;
    sub.s32 %r6, %r2, 9;
    redux.sync.add.s32 %r7, %r6, -1;
    redux.sync.min.s32 %r8, %r6, -1;
    redux.sync.max.u32 %r9, %r6, -1;
    selp.b32 %r10, 1, 0, %p2;
    @%p3 add.u32 %r10, %r10, 2;
    elect.sync %r11|%p4, -1;
    @%p4 st.global.v4.b32 [%rd1], {%r5, %r7, %r8, %r9};
    @%p4 st.global.b32 [%rd1+16], %r10;
"""
    total = sum(range(32)) - 9 * 32
    assert Run(body).out[:5].tolist() == [31, total, 2**32 - 9, 2**32 - 1, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1;", "shfl.sync is for lanes 0xffffffff and executed by 0x0000000f"),
        ("vote.sync.ballot.b32 %r5, %p1, -1;", "divergence at a barrier: vote.sync is for"),
        ("redux.sync.add.s32 %r5, %r2, -1;", "divergence at a barrier: redux.sync is for"),
        ("shfl.sync.idx.b32 %r5, %r2, 9, 31, 15;", "shfl.sync reads lane 9, which does not execute it"),
        ("bar.sync 0;", "divergence at a barrier: bar.sync is for lanes 0xffffffff and executed by 0x0000000f"),
        ("bar.warp.sync -1;", "divergence at a barrier: bar.warp.sync is for lanes 0xffffffff"),
        ("trap;", "the kernel executed a trap"),
    ],
)
def test_instructions_for_the_warp_want_the_warp(body, message):
    with pytest.raises(PtxError, match=message):
        Run(f"    setp.lt.u32 %p1, %r2, 4;\n    @%p1 {body}")


def test_an_error_says_where():
    body = "    setp.eq.u32 %p1, %r1, 70;\n    mov.u32 %r6, %ctaid.x;\n    setp.eq.u32 %p2, %r6, 2;\n"
    body += "    and.pred %p1, %p1, %p2;\n    @%p1 trap;"
    with pytest.raises(PtxError) as caught:
        Run(body, threads=96, grid=(3,), seed=5)
    e = caught.value
    assert (e.kernel, e.block, e.warp, e.lane, e.seed, e.text) == ("kernel", 2, 2, 6, 5, "@%p1 trap;")
    assert (
        str(e) == f"kernel: the kernel executed a trap (block 2, warp 2, lane 6, seed 5, PTX line {e.line}: @%p1 trap;)"
    )


def test_lanes_whose_block_stands_behind_the_meeting_point_come_back_to_it():
    body = """
    setp.eq.u32 %p1, %r2, 0;
    mov.u32 %r5, 1;
    @%p1 bra away;
meet:
    shfl.sync.idx.b32 %r6, %r5, 0, 31, -1;
    bar.sync 0;
    add.u32 %r5, %r5, %r6;
    bra over;
away:
    mov.u32 %r5, 100;
    bra meet;
over:
"""
    run = Run(body + STORE)
    assert run.out.tolist() == [200] + [101] * 31
    assert run.count("shfl")["executed"] == run.count("bar.sync")["executed"] == 1


def test_lanes_that_meet_at_different_places():
    body = "    setp.eq.u32 %p1, %r2, 0;\n    @%p1 bra away;\n    bar.warp.sync -1;\naway:\n    bar.warp.sync -1;\n"
    with pytest.raises(PtxError, match=r"divergence at a barrier: bar\.warp\.sync is for lanes 0xffffffff"):
        Run(body)
