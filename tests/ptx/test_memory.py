"""Loads, stores and atomic operations: what they move, and what they may not touch."""

import numpy as np
import pytest
from ptx.errors import PtxError
from ptx.machine import Machine, Memory

from tests.ptx.small_kernels import Run, module


def test_vectors_and_narrow_types():
    body = """
    ld.param.u64 %rd5, [a];
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd5, %rd5, %rd6;
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd5];
    ld.global.s8 %r9, [%rd5+1];
    ld.global.nc.u8 %r10, [%rd5+1];
    ld.global.s16 %r11, [%rd5+2];
    ld.global.v2.b64 {%rd7, %rd8}, [%rd5];
    cvt.u32.u64 %r12, %rd8;
    xor.b32 %r13, %r5, %r6;
    add.s64 %rd9, %rd1, %rd6;
    st.global.v4.b32 [%rd9], {%r9, %r10, %r11, %r12};
    st.global.u8 [%rd9+13], %r13;
"""
    a = np.arange(128, dtype=np.uint32) * np.uint32(0x91234567) + np.uint32(5)
    out = Run(body, out=128, granule=1, a=a).out.reshape(32, 4)
    x = a.reshape(32, 4)
    assert out[:, 0].tolist() == (x[:, 0] >> 8).astype(np.int8).astype(np.int32).view(np.uint32).tolist()
    assert out[:, 1].tolist() == (x[:, 0] >> 8 & 255).tolist()
    assert out[:, 2].tolist() == (x[:, 0] >> 16).astype(np.int16).astype(np.int32).view(np.uint32).tolist()
    assert out[:, 3].tolist() == (x[:, 2] & 0xFFFF00FF | ((x[:, 0] ^ x[:, 1]) & 255) << 8).tolist()


def test_shared_memory_and_generic_addresses():
    body = """
    mov.u32 %r5, memory;
    shl.b32 %r6, %r1, 2;
    add.u32 %r5, %r5, %r6;
    st.shared.b32 [%r5], %r1;
    bar.sync 0;
    mov.u64 %rd5, memory;
    cvta.shared.u64 %rd6, %rd5;
    sub.s32 %r7, 252, %r6;
    cvt.u64.u32 %rd7, %r7;
    add.s64 %rd6, %rd6, %rd7;
    ld.u32 %r8, [%rd6];
    st.u32 [%rd2], %r8;
"""
    assert Run(body, out=64, threads=64, shared=256).out.tolist() == list(range(63, -1, -1))


def test_parameters_by_address():
    text = module("""
    mov.b64 %rd5, big;
    add.s64 %rd6, %rd5, 24;
    ld.param.u32 %r5, [%rd6+-4];
    ld.param.v2.u64 {%rd7, %rd8}, [big+32];
    cvta.param.u64 %rd9, %rd5;
    ld.u32 %r6, [%rd9+8];
    cvt.u32.u64 %r7, %rd8;
    add.u32 %r8, %r5, %r6;
    add.u32 %r8, %r8, %r7;
    st.global.u32 [%rd2], %r8;""").replace(".param .u64 out", ".param .u64 out, .param .align 64 .b8 big[64]")
    out = np.zeros(32, np.uint32)
    big = np.arange(16, dtype=np.uint32)
    arguments = np.array([out.ctypes.data], np.uint64).tobytes().ljust(64, b"\0") + big.tobytes()
    Machine(text).launch((1,), arguments, [Memory(out.ctypes.data, 128)])
    assert out.tolist() == [5 + 2 + 10] * 32
    with pytest.raises(ValueError, match="arguments must have 128 bytes, got 8"):
        Machine(text).launch((1,), arguments[:8], [])


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [("add.u32", sum(range(64))), ("max.s32", 63), ("min.u32", 0), ("or.b32", 63), ("xor.b32", 0), ("exch.b32", None)],
)
def test_atomic_operations(opcode, expected):
    out = np.full(1, 7 if "min" in opcode else 0, np.uint32)
    Run(f"    atom.global.gpu.{opcode} %r5, [%rd1], %r1;", out=out, threads=64, grid=(1,))
    assert int(out[0]) == expected if expected is not None else int(out[0]) < 64


def test_atomic_sums_of_several_blocks_are_no_race():
    body = "    red.relaxed.gpu.global.add.f32 [%rd1], 0f3F800000;\n"
    assert Run(body, out=1, dtype=np.float32, grid=(3,)).out[0] == 96
    body = "    atom.global.cas.b32 %r5, [%rd2], %r2, 77;\n"
    out = np.arange(32, dtype=np.uint32) // 2 * 2
    assert Run(body, out=out).out.tolist() == [77 if lane % 2 == 0 else lane - 1 for lane in range(32)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("opcode", ["red.global.gpu.relaxed", "atom.global.gpu.relaxed"])
def test_atomic_sums_of_vectors(opcode, size):
    """Of three blocks, each lane adds to numbers of its own; what was there before comes back from the last one."""
    names = ", ".join(f"%r{10 + n}" for n in range(size))
    results = f"{{{', '.join(f'%r{20 + n}' for n in range(size))}}}, " if opcode.startswith("atom") else ""
    body = "".join(f"    mov.b32 %r{10 + n}, 0f{np.float32(n + 1).view(np.uint32):08X};\n" for n in range(size))
    body += f"    mul.wide.u32 %rd5, %r1, {4 * size};\n    add.s64 %rd5, %rd1, %rd5;\n"
    found = Run(f"{body}    {opcode}.add.v{size}.f32 {results}[%rd5], {{{names}}};\n", out=32 * size, dtype=np.float32,
                grid=(3,))  # fmt: skip
    assert found.out.reshape(32, size).tolist() == [[3.0 * (n + 1) for n in range(size)]] * 32


@pytest.mark.parametrize(
    ("address", "message"),
    [("%rd1+4", "misaligned atomic operation"), ("%rd1+128", "atomic operation out of range")],
)
def test_atomic_sums_of_vectors_used_wrongly(address, message):
    with pytest.raises(PtxError, match=message):
        Run(f"    red.global.add.v2.f32 [{address}], {{%r1, %r2}};\n", dtype=np.float32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.u32 [%rd2+4], %r1;", "store out of range: 4 bytes at byte 128 of memory range 0, which has 128"),
        ("ld.global.u32 %r5, [%rd2+-4];", "load out of range"),
        ("st.global.u32 [%rd2+2], %r1;", "misaligned store to global memory: 4 bytes at address"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd2];", "misaligned load of global memory: 8 bytes"),
        (
            "ld.param.u64 %rd9, [a];\nst.global.u32 [%rd9], %r1;",
            "store to memory that is read only, at byte 0 of memory range 1",
        ),
        ("st.shared.u32 [memory+254], %r1;", "misaligned store to shared memory: 4 bytes at address 0xfe"),
        ("st.shared.u32 [memory+256], %r1;", "store out of range: 4 bytes at byte 256 of shared memory, which has 256"),
        ("ld.shared.u8 %r5, [memory+7];", "load of shared memory that nobody wrote, at byte 7"),
        ("mov.b64 %rd5, out;\ncvta.param.u64 %rd5, %rd5;\nst.u32 [%rd5], %r1;", "store to a parameter"),
        ("ld.param.u64 %rd9, [out+16];", "load out of range: byte 16 of the parameters"),
        ("atom.global.add.u32 %r5, [%rd1+2], 1;", "misaligned atomic operation"),
    ],
)
def test_accesses_that_are_wrong(body, message):
    with pytest.raises(PtxError, match=message):
        Run(body, shared=256, a=np.zeros(4, np.uint32))


LOCAL = """
    .local .align 8 .b8 depot[24];
    mov.u64 %rd10, depot;
    cvta.local.u64 %rd11, %rd10;
    st.local.u32 [%rd10+4], %r2;
    st.local.v2.b32 [depot+16], {%r1, %r2};
    and.b32 %r5, %r2, 1;
    mul.wide.u32 %rd12, %r5, 4;
    add.s64 %rd11, %rd11, %rd12;
"""


def test_local_memory_is_a_lane_s_own():
    body = f"{LOCAL}    add.u32 %r6, %r2, 100;\n    st.u32 [%rd11], %r6;\n    ld.local.u32 %r7, [depot+4];\n"
    body += "    st.global.u32 [%rd2], %r7;\n    ld.local.u32 %r8, [%rd10+20];\n    xor.b32 %r8, %r8, %r2;\n"
    body += "    setp.ne.u32 %p5, %r8, 0;\n    @%p5 trap;\n"
    assert Run(body, threads=64, out=64).out.tolist() == [t % 32 + 100 * (t % 2) for t in range(64)]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("ld.local.u32 %r6, [depot+8];", "load of local memory that nobody wrote, at byte 8 .*lane 0"),
        ("ld.u32 %r6, [%rd11];", "load of local memory that nobody wrote, at byte 0"),
        ("st.local.u32 [%rd10+24], %r6;", "store out of range: 4 bytes at byte 24 of local memory, which has 24"),
        ("ld.local.u32 %r6, [%rd10+-4];", "load out of range"),
        ("st.local.u32 [%rd10+2], %r6;", "misaligned store to local memory: 4 bytes at address 0x2"),
    ],
)
def test_local_memory_used_wrongly(rest, message):
    with pytest.raises(PtxError, match=message):
        Run(LOCAL + rest)


ZERO = "    setp.eq.u32 %p1, %r1, 0;\n    @%p1 st.shared.b64 [memory], 0;\n    bar.sync 0;\n"
CHANGE = "red.shared.add.u32 [memory], 1;"


@pytest.mark.parametrize("address", ["memory", "%r5", "%rd5"])
def test_atomic_operations_of_shared_memory(address):
    body = ZERO + "    mov.u32 %r5, memory;\n    mov.u64 %rd5, memory;\n"
    body += f"    atom.shared.add.u32 %r6, [{address}], 1;\n    red.shared::cta.max.u32 [{address}+4], %r1;\n"
    body += "    bar.sync 0;\n    ld.shared.v2.b32 {%r7, %r8}, [memory];\n    add.u32 %r7, %r7, %r8;\n"
    body += "    sub.u32 %r7, %r7, %r6;\n    st.global.u32 [%rd2], %r7;\n"
    found = Run(body, threads=64, out=64, shared=16, seed=2).out
    # What the counter was is different for every thread.
    assert sorted(found.tolist()) == list(range(64, 128))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (CHANGE, "ld.shared.u32 %r5, [memory];", "changed atomically|which warp . lane .* read"),
        (CHANGE, "st.shared.u32 [memory], 7;", "changed atomically|which warp . lane .* wrote"),
        ("st.shared.u32 [memory], 7;", CHANGE, "which warp . lane .* wrote|changed atomically"),
        ("ld.shared.u32 %r5, [memory];", CHANGE, "which warp . lane .* read|changed atomically"),
    ],
)
@pytest.mark.parametrize("late", [0, 1])
def test_atomic_operations_race_with_plain_accesses(first, second, message, late):
    body = (
        ZERO + f"    setp.lt.u32 %p2, %r1, 32;\n    setp.eq.u32 %p3, %r1, 32;\n    @%p3 {second}\n    @!%p2 bra over;\n"
    )
    body += f"    @%p1 {first}\nover:\n"
    with pytest.raises(PtxError, match=message):
        Run(body, threads=64, shared=16, late=[late])


def test_an_atomic_operation_hides_none_before_it():
    """Warp 2 knows of what warp 1 has done, which came last, and not of what warp 0 has."""
    body = ZERO + "    setp.lt.u32 %p2, %r1, 64;\n    @%p2 red.shared.add.u32 [memory], 1;\n"
    body += "    setp.lt.u32 %p3, %r1, 32;\n    @%p3 bra over;\n    bar.sync 1, 64;\n"
    body += "    ld.shared.u32 %r5, [memory];\nover:\n"
    with pytest.raises(PtxError, match=r"race: load of shared memory at byte 0, which warp 0 .*changed atomically"):
        Run(body, threads=96, shared=16, late=[1, 2])


@pytest.mark.parametrize("body", ["red.shared.add.u32 [memory], 1;", "atom.shared.add.u32 %r5, [memory+2], 1;",
                                  "atom.shared.add.u32 %r5, [memory+16], 1;"])  # fmt: skip
def test_atomic_operations_of_shared_memory_used_wrongly(body):
    with pytest.raises(
        PtxError, match=r"atomic operation (of shared memory that nobody wrote|out of range)|misaligned"
    ):
        Run(body, shared=16)


@pytest.mark.parametrize("body", ["red.global.add.u32 [%rd2], 1;", "atom.global.cas.b32 %r5, [%rd2], %r2, 77;"])
def test_an_atomic_operation_reads_what_it_changes(body):
    with pytest.raises(PtxError, match="atomic operation of memory that nobody wrote, at byte 0"):
        Run(body, defined=False)


@pytest.mark.parametrize(("kind", "granule", "at"), [("b8", 1, 1), ("b16", 2, 2), ("b32", 4, 4), ("b64", 4, 8)])
def test_unwritten_memory_is_told_by_elements(kind, granule, at):
    """What stands beside a written element is still unwritten."""
    wide = "%rd9" if kind == "b64" else "%h1" if kind in ("b8", "b16") else "%r5"
    body = f"    setp.ne.u32 %p1, %r1, 0;\n    @%p1 bra over;\n    st.global.{kind} [%rd1], 0;\n"
    body += f"    ld.global.{kind} {wide}, [%rd1];\n    ld.global.{kind} {wide}, [%rd1+{at}];\nover:\n"
    with pytest.raises(PtxError, match=f"load of memory that nobody wrote, at byte {at} of memory range 0"):
        Run(body, granule=granule, defined=False)


def test_undefined_global_memory():
    with pytest.raises(PtxError, match="load of memory that nobody wrote, at byte 128 of memory range 0"):
        Run(
            "    st.global.u32 [%rd2], %r1;\n    ld.global.u32 %r5, [%rd2];\n    ld.global.u32 %r5, [%rd1+128];",
            out=40,
            defined=False,
        )


RACES = [
    ("st.global.u32 [%rd2], %r6;", "race: store over what block . wrote, at byte"),
    ("ld.global.u32 %r5, [%rd1]; @%p1 st.global.u32 [%rd1], %r6;", "race: .* at byte 0 of memory range 0"),
    ("@%p1 red.global.add.u32 [%rd1], 1; @!%p1 st.global.u32 [%rd1], 7;", "race: .* at byte 0 of memory range 0"),
]


@pytest.mark.parametrize(("body", "message"), RACES)
def test_blocks_may_not_touch_what_another_one_writes(body, message):
    with pytest.raises(PtxError, match=message):
        Run(f"    mov.u32 %r6, %ctaid.x;\n    setp.eq.u32 %p1, %r6, 1;\n    {body}", grid=(2,), seed=3)


def test_elements_next_to_each_other_do_not_race():
    body = """
    mov.u32 %r6, %ctaid.x;
    shl.b32 %r7, %r1, 2;
    mad.lo.u32 %r7, %r6, 2, %r7;
    cvt.u64.u32 %rd5, %r7;
    add.s64 %rd5, %rd1, %rd5;
    cvt.u16.u32 %h1, %r6;
    st.global.b16 [%rd5], %h1;
"""
    assert Run(body, grid=(2,), granule=2).out.tolist() == [1 << 16] * 32
    with pytest.raises(PtxError, match="race"):
        Run(body, grid=(2,), granule=4)


def test_warps_of_a_block_race_in_global_memory_too():
    body = "    setp.lt.u32 %p1, %r1, 32;\n    @%p1 st.global.u32 [%rd1], 1;\n{}    @!%p1 ld.global.u32 %r5, [%rd1];"
    with pytest.raises(PtxError, match=r"race: (load|store) at byte 0 of memory range 0, which warp . (wrote|read)"):
        Run(body.format(""), threads=64)
    Run(body.format("    bar.sync 0;\n"), threads=64)
