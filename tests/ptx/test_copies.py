"""cp.async: what lands, when, and who may look at it."""

import numpy as np
import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run

# Each thread copies 4 bytes twice, waits, and reads its neighbour's.
COPY = """
    ld.param.u64 %rd5, [a];
    add.s64 %rd5, %rd5, %rd3;
    shl.b32 %r5, %r1, 2;
    cp.async.ca.shared.global [%r5], [%rd5], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r5+256], [%rd5+256], 4, {size};
    cp.async.commit_group;
    cp.async.wait_group {left};
    {barrier}
    xor.b32 %r6, %r5, 128;
    ld.shared.b32 %r7, [%r6];
    ld.shared.b32 %r8, [%r6+{second}];
    add.u32 %r7, %r7, %r8;
    st.global.b32 [%rd2], %r7;
"""
A = np.arange(128, dtype=np.uint32) * 3


def run(size="4", left=0, barrier="bar.sync 0;", second=256, **more):
    return Run(
        COPY.format(size=size, left=left, barrier=barrier, second=second), out=64, threads=64, shared=512, a=A, **more
    )


@pytest.mark.parametrize("late", [(), (1,)])
def test_copies_land_when_waited_for(late):
    other = np.arange(64) ^ 32
    assert run(late=late).out.tolist() == (A[other] + A[other + 64]).tolist()
    # What is not read becomes zero.
    assert run(size="0", late=late).out.tolist() == A[other].tolist()
    assert run(size="2").out.tolist() == (A[other] + (A[other + 64] & 0xFFFF)).tolist()
    # The first of two groups has landed when one is left.
    assert run(left=1, second=0).out.tolist() == (2 * A[other]).tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"left": 1}, r"race: load of shared memory that cp.async is writing, at byte \d+"),
        ({"left": 2, "second": 0}, "race: load of shared memory that cp.async is writing"),
        ({"barrier": ""}, "race|nobody wrote"),
        ({"size": "8"}, "cp.async reads 8 bytes and writes 4"),
    ],
)
def test_copies_that_are_looked_at_too_early(changed, message):
    with pytest.raises(PtxError, match=message):
        run(**changed)


def test_a_store_over_a_copy_in_flight():
    body = """
    ld.param.u64 %rd5, [a];
    setp.eq.u32 %p1, %r1, 0;
    @%p1 cp.async.cg.shared.global [memory], [%rd5], 16;
    @%p1 {} [memory+{}], {};
"""
    for opcode, offset, value in (("st.shared.b32", 4, "1"), ("cp.async.ca.shared.global", 8, "[%rd5], 4")):
        with pytest.raises(PtxError, match=f"race: .* of shared memory that cp.async is writing, at byte {offset}"):
            Run(body.format(opcode, offset, value), shared=16, a=A)


@pytest.mark.parametrize(
    ("into", "source", "message"),
    [
        ("memory+4", "%rd5", "misaligned cp.async"),
        ("memory", "%rd5+4", "misaligned cp.async"),
        ("memory+512", "%rd5", "cp.async out of range"),
        ("memory", "%rd5+512", "cp.async out of range: 16 bytes at byte 512 of memory range 1"),
    ],
)
def test_copies_out_of_range_or_misaligned(into, source, message):
    body = "    ld.param.u64 %rd5, [a];\n    setp.eq.u32 %p1, %r1, 0;\n"
    with pytest.raises(PtxError, match=message):
        Run(body + f"    @%p1 cp.async.cg.shared.global [{into}], [{source}], 16;", shared=512, a=A)


def test_wait_all_waits_for_what_was_not_committed():
    body = COPY.replace("    cp.async.commit_group;\n", "").replace("cp.async.wait_group {left};", "cp.async.wait_all;")
    body = body.format(size=4, barrier="bar.sync 0;", second=256)
    other = np.arange(64) ^ 32
    assert Run(body, out=64, threads=64, shared=512, a=A).out.tolist() == (A[other] + A[other + 64]).tolist()
