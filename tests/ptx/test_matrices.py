"""Fragments of ldmatrix, stmatrix and mma.sync, as the PTX ISA writes them down.

Its groupID is lane >> 2, its threadID_in_group lane % 4.
"""

import numpy as np
import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run

GROUP, THREAD = np.arange(32) >> 2, np.arange(32) % 4
# Put 512 bytes of the input into shared memory.
FILL = """
    ld.param.u64 %rd5, [a];
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd5, %rd5, %rd6;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd5];
    shl.b32 %r5, %r1, 4;
    st.shared.v4.b32 [%r5], {%r10, %r11, %r12, %r13};
    bar.sync 0;
    add.s64 %rd7, %rd1, %rd6;
"""
MATRICES = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) * np.uint16(257)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(transposed, count):
    names = ", ".join(f"%r{20 + i}" for i in range(count))
    body = FILL + "    mov.b32 %r20, 0;\n    mov.b32 %r21, 0;\n    mov.b32 %r22, 0;\n    mov.b32 %r23, 0;\n"
    body += f"    ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 {{{names}}}, [%r5];\n"
    body += "    st.global.v4.b32 [%rd7], {%r20, %r21, %r22, %r23};"
    run = Run(body, out=128, shared=512, a=MATRICES)
    out = run.out.view(np.uint16).reshape(32, 4, 2)
    for m in range(count):
        matrix = MATRICES[m].T if transposed else MATRICES[m]
        for half in range(2):
            assert out[:, m, half].tolist() == matrix[GROUP, 2 * THREAD + half].tolist()
    assert run.count("ldmatrix") == {"executed": 1, "wavefronts": count, "needed": count, "sectors": 0, "bytes": 0}


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_way_back(transposed):
    suffix = ".trans" if transposed else ""
    body = (
        FILL
        + f"""
    ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r5];
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r5], {{%r23, %r22, %r21, %r20}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r5];
    st.global.v4.b32 [%rd7], {{%r20, %r21, %r22, %r23}};
"""
    )
    out = Run(body, out=128, shared=512, a=MATRICES).out.view(np.uint16).reshape(4, 8, 8)
    assert out.tolist() == MATRICES[::-1].tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "add.u32 %r5, %r5, 8;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5];",
            "misaligned ldmatrix: 16 bytes",
        ),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5+512];", "load out of range: 16 bytes at byte 512"),
        (
            "setp.eq.u32 %p1, %r1, 1;\n@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5];",
            "divergence at a barrier: ldmatrix is for lanes 0xffffffff",
        ),
    ],
)
def test_matrices_that_are_wrong(body, message):
    with pytest.raises(PtxError, match=message):
        Run(FILL + body, out=128, shared=512, a=MATRICES)


def test_a_warp_must_meet_between_a_store_and_ldmatrix():
    body = FILL.replace("bar.sync 0;", "") + "    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r5];"
    with pytest.raises(PtxError, match="race: load of shared memory at byte 0"):
        Run(body, out=128, shared=512, a=MATRICES)


def registers(a, name, first, count):
    """Return instructions that load `count` registers of a lane from an input of (32, count) words."""
    lines = [f"    ld.param.u64 %rd80, [{name}];", f"    mul.wide.u32 %rd81, %r1, {4 * count};"]
    lines.append("    add.s64 %rd80, %rd80, %rd81;")
    lines += [f"    ld.global.b32 {a}{first + i}, [%rd80+{4 * i}];" for i in range(count)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_of_halves(kind):
    g = np.random.default_rng(0)
    a, b, c = g.integers(-8, 8, (16, 16)), g.integers(-8, 8, (16, 8)), g.integers(-99, 99, (16, 8)).astype(np.float32)

    def bits(x):
        return (
            (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            if kind == "bf16"
            else x.astype(np.float16).view(np.uint16)
        )

    # a_i: row = groupID, + 8 for i in 2, 3, 6, 7; column = 2 * threadID_in_group + (i & 1), + 8 for i >= 4.
    fa = np.stack([bits(a)[GROUP + 8 * (i // 2 % 2), 2 * THREAD + i % 2 + 8 * (i // 4)] for i in range(8)], 1)
    # b_i: row = 2 * threadID_in_group + (i & 1), + 8 for i >= 2; column = groupID.
    fb = np.stack([bits(b)[2 * THREAD + i % 2 + 8 * (i // 2), GROUP] for i in range(4)], 1)
    # c_i: row = groupID, + 8 for i >= 2; column = 2 * threadID_in_group + (i & 1).
    fc = np.stack([c[GROUP + 8 * (i // 2), 2 * THREAD + i % 2] for i in range(4)], 1)
    body = (
        registers("%r", "a", 10, 4) + registers("%r", "b", 20, 2) + registers("%f", "c", 30, 4).replace(".b32", ".f32")
    )
    body += f"""
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
        {{%f1,%f2,%f3,%f4}}, {{%r10,%r11,%r12,%r13}}, {{%r20,%r21}}, {{%f30,%f31,%f32,%f33}};
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd7, %rd1, %rd6;
    st.global.v4.f32 [%rd7], {{%f1,%f2,%f3,%f4}};
"""
    out = Run(body, out=128, dtype=np.float32, a=fa, b=fb, c=fc).out.reshape(32, 4)
    d = (a @ b + c).astype(np.float32)
    for i in range(4):
        assert out[:, i].tolist() == d[GROUP + 8 * (i // 2), 2 * THREAD + i % 2].tolist()


def test_mma_of_tf32():
    g = np.random.default_rng(1)
    a, b = g.integers(-8, 8, (16, 8)).astype(np.float32), g.integers(-8, 8, (8, 8)).astype(np.float32)
    # a_i: row = groupID, + 8 for odd i; column = threadID_in_group, + 4 for i >= 2. b_i: row = threadID_in_group + 4 i.
    fa = np.stack([a[GROUP + 8 * (i % 2), THREAD + 4 * (i // 2)] for i in range(4)], 1)
    fb = np.stack([b[THREAD + 4 * i, GROUP] for i in range(2)], 1)
    # Bits below those of tf32 do not count.
    fa = (fa.view(np.uint32) | 0xFFF).view(np.float32)
    body = (
        registers("%r", "a", 10, 4)
        + registers("%r", "b", 20, 2)
        + """
    mov.f32 %f30, 0f00000000;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
        {%f1,%f2,%f3,%f4}, {%r10,%r11,%r12,%r13}, {%r20,%r21}, {%f30,%f30,%f30,%f30};
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd7, %rd1, %rd6;
    st.global.v4.f32 [%rd7], {%f1,%f2,%f3,%f4};
"""
    )
    out = Run(body, out=128, dtype=np.float32, a=fa, b=fb).out.reshape(32, 4)
    for i in range(4):
        assert out[:, i].tolist() == (a @ b)[GROUP + 8 * (i // 2), 2 * THREAD + i % 2].tolist()
