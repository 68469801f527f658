"""What is counted of each instruction: executions, wavefronts of shared memory and those of conflicts, sectors."""

import numpy as np
import pytest
from ptx import counts

from tests.ptx.small_kernels import Run

NOTHING = dict.fromkeys(("executed", "wavefronts", "needed", "sectors", "bytes"), 0)


def shared(stride, kind, registers="%r5", offset=0):
    """Store one vector a lane, `stride` bytes apart."""
    return (
        f"    mov.u32 %r5, 7;\n    mad.lo.u32 %r6, %r2, {stride}, {offset};\n    st.shared.{kind} [%r6], {registers};"
    )


@pytest.mark.parametrize(
    ("body", "wavefronts", "needed"),
    [
        (shared(4, "b32"), 1, 1),
        (shared(8, "b32"), 2, 1),
        (shared(128, "b32"), 32, 1),
        (shared(132, "b32"), 1, 1),
        (shared(0, "b32"), 1, 1),
        (shared(2, "b16", "%h5").replace("mov.u32 %r5, 7;", "mov.u16 %h5, 7;"), 1, 1),
        # 16 lanes of 8 bytes, and 8 of 16, are served at a time.
        (shared(8, "v2.b32", "{%r5, %r5}"), 2, 2),
        (shared(16, "v2.b32", "{%r5, %r5}"), 4, 2),
        (shared(16, "v4.b32", "{%r5, %r5, %r5, %r5}"), 4, 4),
        (shared(32, "v4.b32", "{%r5, %r5, %r5, %r5}"), 8, 4),
    ],
)
def test_wavefronts(body, wavefronts, needed):
    run = Run(body, shared=4400)
    assert run.count("st.shared") == {**NOTHING, "executed": 1, "wavefronts": wavefronts, "needed": needed}


@pytest.mark.parametrize(("address", "sectors"), [("%rd2", 4), ("%rd1", 1), ("%rd5", 32)])
def test_sectors_and_bytes(address, sectors):
    body = f"    mul.wide.u32 %rd5, %r1, 64;\n    add.s64 %rd5, %rd5, %rd1;\n    ld.global.b32 %r5, [{address}];"
    memory = np.zeros(1024, np.uint32)
    out = memory[-memory.ctypes.data % 64 // 4 :][:512]
    count = Run(body, out=out).count("ld.global")
    assert (count["sectors"], count["bytes"]) == (sectors, 128)


def test_what_a_predicate_leaves_out_is_issued_all_the_same():
    body = "    setp.eq.u32 %p1, %r1, 99;\n    @%p1 st.shared.b32 [memory], %r1;"
    assert Run(body, shared=16, threads=64).count("st.shared") == {**NOTHING, "executed": 2}


def test_counts_add_up_over_warps_blocks_and_launches():
    assert Run("    add.u32 %r5, %r1, %r2;", threads=96, grid=(2, 2)).count("add.u32")["executed"] == 12


def test_counts_by_class_and_by_line():
    body = shared(8, "b32") + "\n    st.global.b32 [%rd2], %r5;"
    machine = Run(body, shared=256).machine
    found = counts.by_class(machine)
    assert (found["store shared"], found["store global"], found["load parameter"], found["branch"]) == (1, 1, 1, 1)
    assert sum(found.values()) == sum(count.executed for count in counts.by_line(machine))
    (worst,) = counts.conflicts(machine)
    assert (worst.opcode, worst.executed, worst.wavefronts, worst.needed) == ("st.shared.b32", 1, 2, 1)
    assert machine.program.source[worst.line - 1].strip() == "st.shared.b32 [%r6], %r5;"


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "matrix"), ("wgmma.fence.sync.aligned", "barrier"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"), ("mbarrier.init.shared.b64", "barrier"),
        ("ld.volatile.shared.b32", "load shared"), ("ld.global.nc.v4.b32", "load global"), ("ld.u32", "load global"),
        ("ld.param.u64", "load parameter"), ("div.full.f32", "special function"), ("div.s32", "integer"),
        ("fma.rn.bf16x2", "float"), ("and.pred", "predicate"), ("and.b32", "integer"), ("cvt.rn.f32.s32", "convert"),
    ],
)  # fmt: skip
def test_classes(opcode, expected):
    assert counts.class_of(opcode) == expected
