"""The scalar opcodes against numpy: one of each family, with values at the edges."""

import numpy as np
import pytest
from ptx.opcodes import OPCODES

from tests.ptx.small_kernels import Run, load

INTEGERS = np.array(
    [
        0,
        1,
        2,
        3,
        5,
        31,
        32,
        33,
        63,
        64,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**31 - 1,
        2**31,
        2**31 + 1,
        2**32 - 1,
        2**32 - 2,
        2**32 - 31,
        12345678,
        0xDEADBEEF,
        0x80000001,
        0x55555555,
        0xAAAAAAAA,
        0x0F0F0F0F,
        7,
        11,
        13,
        1000,
    ],
    np.uint32,
)
FLOATS = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        1e-40,
        -1e-40,
        1e30,
        -1e30,
        np.inf,
        -np.inf,
        np.nan,
        3.14159,
        1e-3,
        7.0,
        -7.0,
        100.0,
        0.1,
        0.2,
        0.3,
        1e10,
        2.0**31,
        -(2.0**31),
        2.0**-126,
        65504.0,
        65520.0,
        1 + 2**-8,
        1 + 2**-9,
        9.0,
    ],
    np.float32,
)
OTHER = np.roll(INTEGERS, 5)


def binary(opcode, a, b, kind="b32", result="b32"):
    """Run an opcode on two registers a lane."""
    bits = int(kind[1:])
    names = {"b16": "%h", "b32": "%r", "b64": "%rd"}
    x, y, z = (names[k] + str(n) for k, n in ((kind, 20), (kind, 21), (result, 22)))
    body = load("a", x, kind) + load("b", y, kind) + f"    {opcode} {z}, {x}, {y};\n"
    size = int(result[1:]) // 8
    body += f"    mul.wide.u32 %rd3, %r1, {size};\n    add.s64 %rd2, %rd1, %rd3;\n    st.global.{result} [%rd2], {z};"
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[size * 8]
    assert a.itemsize * 8 == bits
    return Run(body, dtype=dtype, granule=min(size, 4), a=a, b=b).out


def signed(x):
    return x.view({4: np.int32, 8: np.int64, 2: np.int16}[x.itemsize])


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.u32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.u32", lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)),
        ("min.s32", lambda a, b: np.minimum(signed(a), signed(b)).view(np.uint32)),
        ("max.u32", np.maximum),
        ("and.b32", lambda a, b: a & b),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: np.where(b > 31, 0, a << (b & 31))),
        ("shr.u32", lambda a, b: np.where(b > 31, 0, a >> (b & 31))),
        ("shr.s32", lambda a, b: (signed(a) >> np.minimum(b, 31).astype(np.int32)).view(np.uint32)),
        ("div.u32", lambda a, b: np.where(b == 0, 2**32 - 1, a // np.maximum(b, 1))),
        ("rem.u32", lambda a, b: np.where(b == 0, a, a % np.maximum(b, 1))),
    ],
)
def test_integers(opcode, expected):
    assert binary(opcode, INTEGERS, OTHER).tolist() == expected(INTEGERS, OTHER).astype(np.uint32).tolist()


def test_signed_division_truncates():
    a, b = np.array([7, -7, 7, -7] * 8, np.int32), np.array([2, 2, -2, -2] * 8, np.int32)
    assert signed(binary("div.s32", a, b))[:4].tolist() == [3, -3, -3, 3]
    assert signed(binary("rem.s32", a, b))[:4].tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_comparisons_and_selection(name, kind):
    body = load("a", "%r5") + load("b", "%r6") + f"    setp.{name}.{kind} %p1, %r5, %r6;\n"
    body += "    selp.b32 %r7, %r5, %r6, %p1;\n    not.pred %p2, %p1;\n    @%p2 add.u32 %r7, %r7, 1;\n"
    out = Run(body + "    st.global.u32 [%rd2], %r7;", a=INTEGERS, b=OTHER).out
    x, y = (INTEGERS, OTHER) if kind == "u32" else (signed(INTEGERS), signed(OTHER))
    true = {"lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[name]
    assert out.tolist() == np.where(true, INTEGERS, OTHER + np.uint32(1)).tolist()


@pytest.mark.parametrize("name", ["lt", "ge", "eq", "ne", "ltu", "geu", "equ", "neu"])
def test_comparisons_of_floats_know_nan(name):
    a, b = FLOATS, np.roll(FLOATS, 3)
    body = load("a", "%f5", "f32") + load("b", "%f6", "f32") + f"    setp.{name}.f32 %p1, %f5, %f6;\n"
    out = Run(body + "    selp.b32 %r7, 1, 0, %p1;\n    st.global.u32 [%rd2], %r7;", a=a, b=b).out
    unordered = np.isnan(a) | np.isnan(b)
    plain = {"lt": a < b, "ge": a >= b, "eq": a == b, "ne": a != b}[name[:2]]
    expected = plain | unordered if name.endswith("u") else plain & ~unordered
    assert out.tolist() == expected.astype(int).tolist()


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("add.f32", np.add),
        ("sub.rn.f32", np.subtract),
        ("mul.f32", np.multiply),
        ("div.full.f32", np.divide),
        ("max.f32", np.fmax),
        ("min.f32", np.fmin),
    ],
)
def test_floats(opcode, expected):
    other = np.roll(FLOATS, 7)
    out = binary(opcode, FLOATS.view(np.uint32), other.view(np.uint32)).view(np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, expected(FLOATS, other))


def test_a_fused_product_rounds_once():
    a = np.full(32, 1 + 2**-12, np.float32)
    body = load("a", "%f5", "f32") + "    neg.f32 %f6, %f5;\n    fma.rn.f32 %f7, %f5, %f5, %f6;\n"
    out = Run(body + "    st.global.f32 [%rd2], %f7;", dtype=np.float32, a=a).out
    assert out[0] == np.float32((1 + 2.0**-12) ** 2 - (1 + 2.0**-12))


def test_subnormal_numbers_are_flushed_where_the_opcode_says_so():
    a = np.full(32, 1e-40, np.float32).view(np.uint32)
    one = np.full(32, 1.0, np.float32).view(np.uint32)
    assert binary("mul.ftz.f32", a, one)[0] == 0
    assert binary("mul.f32", a, one)[0] == a[0]


def test_powers_of_two():
    body = load("a", "%f5", "f32") + "    ex2.approx.ftz.f32 %f6, %f5;\n    st.global.f32 [%rd2], %f6;"
    a = np.where(np.abs(FLOATS) > 200, np.float32(-np.inf), FLOATS)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(Run(body, dtype=np.float32, a=a).out, np.exp2(a), rtol=3e-7)


def test_sixteen_bit_floats_round_to_nearest_even():
    body = load("a", "%f5", "f32") + "    cvt.rn.bf16.f32 %h5, %f5;\n    cvt.f32.bf16 %f6, %h5;\n"
    out = Run(body + "    st.global.f32 [%rd2], %f6;", dtype=np.float32, a=FLOATS).out
    bits = FLOATS.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16) << np.uint64(16)) & np.uint64(
        2**32 - 1
    )
    expected = np.where(np.isnan(FLOATS), np.nan, rounded.astype(np.uint32).view(np.float32))
    np.testing.assert_array_equal(out, expected)
    body = load("a", "%f5", "f32") + "    cvt.rn.f16.f32 %h5, %f5;\n    cvt.f32.f16 %f6, %h5;\n"
    out = Run(body + "    st.global.f32 [%rd2], %f6;", dtype=np.float32, a=FLOATS).out
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out, FLOATS.astype(np.float16).astype(np.float32))


def test_pairs_of_sixteen_bit_floats():
    body = load("a", "%f5", "f32") + load("b", "%f6", "f32") + "    cvt.rn.f16x2.f32 %r5, %f5, %f6;\n"
    body += "    fma.rn.f16x2 %r6, %r5, %r5, %r5;\n    st.global.u32 [%rd2], %r6;"
    a, b = np.linspace(-3, 3, 32).astype(np.float32), np.linspace(1, 5, 32).astype(np.float32)
    out = Run(body, a=a, b=b).out.view(np.float16).reshape(32, 2)
    low, high = (x.astype(np.float16).astype(np.float32) for x in (b, a))
    np.testing.assert_array_equal(out[:, 0], (low * low + low).astype(np.float16))
    np.testing.assert_array_equal(out[:, 1], (high * high + high).astype(np.float16))


@pytest.mark.parametrize(
    ("opcode", "value", "expected"),
    [
        ("cvt.s32.s8 %r6, %r5", 0x1FF, 2**32 - 1),
        ("cvt.u32.u8 %r6, %r5", 0x1FF, 255),
        ("cvt.rzi.s32.f32 %r6, %r5", 0xC0200000, 2**32 - 2),
        ("cvt.rni.s32.f32 %r6, %r5", 0x40200000, 2),
        ("popc.b32 %r6, %r5", 0xFF01, 9),
        ("clz.b32 %r6, %r5", 1, 31),
        ("brev.b32 %r6, %r5", 3, 0xC0000000),
        ("bfe.u32 %r6, %r5, 4, 8", 0xABCDE, 0xCD),
        ("bfe.s32 %r6, %r5, 4, 8", 0xABCDE, 0xFFFFFFCD),
        ("bfe.s32 %r6, %r5, 28, 8", 0x80000000, 0xFFFFFFF8),
        ("bfi.b32 %r6, 5, %r5, 8, 4", 0xFFFF, 0xF5FF),
        ("prmt.b32 %r6, %r5, 0x44332211, 0x7610", 0xAABBCCDD, 0x4433CCDD),
        ("prmt.b32 %r6, %r5, 0, 0x8888", 0x80, 0xFFFFFFFF),
        ("shf.l.wrap.b32 %r6, %r5, 1, 8", 0xAB000000, 0x1AB),
        ("lop3.b32 %r6, %r5, 12, 10, 0xE8", 6, 14 & 6 | 8),
        ("mul.wide.s16 %r6, %h5, -3", 5, 2**32 - 15),
        ("abs.s32 %r6, %r5", 2**32 - 9, 9),
        ("mad.lo.s32 %r6, %r5, 3, 4", 5, 19),
        ("neg.s32 %r6, %r5", 1, 2**32 - 1),
        ("not.b32 %r6, %r5", 0, 2**32 - 1),
    ],
)
def test_single_values(opcode, value, expected):
    body = f"    mov.u32 %r5, {value};\n    mov.b32 %f5, %r5;\n    cvt.u16.u32 %h5, %r5;\n"
    body += f"    {opcode.replace('.f32 %r6, %r5', '.f32 %r6, %f5')};\n"
    assert Run(body + "    st.global.u32 [%rd2], %r6;").out.tolist() == [expected] * 32


def test_wide_integers_and_doubles():
    a = INTEGERS.astype(np.uint64) << np.uint64(20) | np.uint64(7)
    b = OTHER.astype(np.uint64)
    assert binary("add.s64", a, b, "b64", "b64").tolist() == (a + b).tolist()
    assert binary("mul.lo.s64", a, b, "b64", "b64").tolist() == (a * b).tolist()
    body = load("a", "%f5", "f32") + "    cvt.f64.f32 %fd5, %f5;\n    mul.f64 %fd6, %fd5, 0d3FF8000000000000;\n"
    body += "    cvt.rn.f32.f64 %f6, %fd6;\n    st.global.f32 [%rd2], %f6;"
    np.testing.assert_array_equal(Run(body, dtype=np.float32, a=FLOATS).out, (FLOATS * 1.5).astype(np.float32))


def test_registers_of_sixteen_bits_and_their_pairs():
    body = """
    mov.u32 %r5, 0x12348765;
    mov.b32 {%h1, %h2}, %r5;
    add.s16 %h3, %h1, %h2;
    setp.lt.s16 %p1, %h1, %h2;
    selp.b16 %h4, %h3, %h2, %p1;
    mov.b32 %r6, {%h2, %h4};
    mov.b64 %rd5, {%r5, %r6};
    mov.b64 {%r7, %r8}, %rd5;
    st.global.u32 [%rd2], %r8;
"""
    assert Run(body).out.tolist() == [0x99991234] * 32


def test_every_opcode_names_its_section_and_its_operands():
    assert all(opcode.section.count(": ") == 1 for opcode in OPCODES.values())
    assert all(
        f"{letter}" in opcode.expression for opcode in OPCODES.values() for letter in "abcd"[: len(opcode.types) - 1]
    )


@pytest.mark.parametrize("opcode", ["add.f32", "sub.f32", "mul.rn.f32", "fma.rn.f32"])
def test_there_is_one_nan(opcode):
    """PTX ISA, Floating Point Instructions: NaN payloads are not kept."""
    first = np.full(32, 0x7FC00123, np.uint32)
    operands = "%r2, %r3, %r3" if opcode.startswith("fma") else "%r2, %r3"
    body = load("first", "%r2") + f"mov.b32 %r3, 0xffc04567; {opcode} %r5, {operands}; st.global.b32 [%rd2], %r5;"
    assert (Run(body, first=first).out == 0x7FFFFFFF).all()
