"""The scalar opcodes: what one lane computes from its registers, as a C++ expression.

Each has the title of its section in the PTX ISA, chapter "Instructions", since numbers move between versions. Types are
those of the register that is set and of those that the expression reads (a, b, c, d). Helpers such as `bfi` are in
cpp/integers.h and cpp/floats.h.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPP_TYPES", "OPCODES", "WIDE", "Opcode"]

CPP_TYPES = {
    "u8": "uint8_t", "s8": "int8_t", "u16": "uint16_t", "s16": "int16_t", "u32": "uint32_t", "s32": "int32_t",
    "u64": "uint64_t", "s64": "int64_t", "f32": "float", "f64": "double", "pred": "bool",
}  # fmt: skip
WIDE = frozenset(("u64", "s64", "f64"))


@dataclass(frozen=True)
class Opcode:
    """What an opcode computes.

    Attributes:
        section: title in the PTX ISA.
        types: of the result, then of the sources.
        expression: in C++, of a, b, c and d.
    """

    section: str
    types: tuple[str, ...]
    expression: str


OPCODES: dict[str, Opcode] = {}


def _add(section: str, names: str, types: str, expression: str) -> None:
    for name in names.split():
        OPCODES[name] = Opcode(section, tuple(types.split()), expression)


def _integers(bits: int) -> None:
    """Add what there is for integers of 32 and 64 bits."""
    u, s, arithmetic = f"u{bits}", f"s{bits}", "Integer Arithmetic Instructions: "
    for name, sign in (("add", "+"), ("sub", "-")):
        _add(arithmetic + name, f"{name}.{u} {name}.{s}", f"{u} {u} {u}", f"a {sign} b")
    _add(arithmetic + "mul", f"mul.lo.{u} mul.lo.{s}", f"{u} {u} {u}", "a * b")
    _add(arithmetic + "mad", f"mad.lo.{u} mad.lo.{s}", f"{u} {u} {u} {u}", "a * b + c")
    for kind in (u, s):
        _add(arithmetic + "div", f"div.{kind}", f"{kind} {kind} {kind}", "quotient(a, b)")
        _add(arithmetic + "rem", f"rem.{kind}", f"{kind} {kind} {kind}", "remainder(a, b)")
        _add(arithmetic + "min", f"min.{kind}", f"{kind} {kind} {kind}", "a < b ? a : b")
        _add(arithmetic + "max", f"max.{kind}", f"{kind} {kind} {kind}", "a > b ? a : b")
    _add(arithmetic + "neg", f"neg.{s}", f"{u} {u}", "0 - a")
    _add(arithmetic + "abs", f"abs.{s}", f"{u} {s}", f"a < 0 ? 0 - {CPP_TYPES[u]}(a) : {CPP_TYPES[u]}(a)")
    last = bits - 1
    shift = "Logic and Shift Instructions: "
    _add(shift + "shl", f"shl.b{bits}", f"{u} {u} u32", f"b > {last} ? 0 : a << b")
    _add(shift + "shr", f"shr.b{bits} shr.{u}", f"{u} {u} u32", f"b > {last} ? 0 : a >> b")
    _add(shift + "shr", f"shr.{s}", f"{s} {s} u32", f"a >> (b > {last} ? {last}u : b)")


def _moves_and_logic() -> None:
    for bits in (16, 32, 64):
        u, s = f"u{bits}", f"s{bits}"
        names = [f"b{bits}", u, s, *([f"f{bits}"] if bits > 16 else [])]
        _add("Data Movement and Conversion Instructions: mov", " ".join(f"mov.{n}" for n in names), f"{u} {u}", "a")
        _add("Comparison and Selection Instructions: selp", " ".join(f"selp.{n}" for n in names), f"{u} {u} {u} pred",
             "c ? a : b")  # fmt: skip
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            _add(f"Logic and Shift Instructions: {name}", f"{name}.b{bits}", f"{u} {u} {u}", f"a {sign} b")
        _add("Logic and Shift Instructions: not", f"not.b{bits}", f"{u} {u}", "~a")
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        _add(f"Logic and Shift Instructions: {name}", f"{name}.pred", "pred pred pred", f"a {sign} b")
    _add("Logic and Shift Instructions: not", "not.pred", "pred pred", "!a")
    _add("Data Movement and Conversion Instructions: mov", "mov.pred", "pred pred", "a")
    _add("Logic and Shift Instructions: shl", "shl.b16", "u16 u16 u32", "b > 15 ? 0 : a << b")
    _add("Logic and Shift Instructions: shr", "shr.u16 shr.b16", "u16 u16 u32", "b > 15 ? 0 : a >> b")
    _add("Logic and Shift Instructions: shr", "shr.s16", "s16 s16 u32", "a >> (b > 15 ? 15 : b)")


def _more_integers() -> None:
    section = "Integer Arithmetic Instructions: "
    for bits, double in ((16, 32), (32, 64)):
        for sign in "us":
            half, whole = f"{sign}{bits}", f"{sign}{double}"
            wide = f"{CPP_TYPES[whole]}(a) * b"
            _add(section + "mul", f"mul.wide.{half}", f"{whole} {half} {half}", wide)
            _add(section + "mad", f"mad.wide.{half}", f"{whole} {half} {half} {whole}", f"{wide} + c")
            _add(section + "mul", f"mul.hi.{half}", f"{half} {half} {half}", f"({wide}) >> {bits}")
    for name, expression in (("add", "a + b"), ("sub", "a - b"), ("mul.lo", "a * b")):
        _add(section + name.removesuffix(".lo"), f"{name}.u16 {name}.s16", "u16 u16 u16", expression)
    _add(section + "neg", "neg.s16", "u16 u16", "0 - a")
    for kind in ("u16", "s16"):
        _add(section + "min", f"min.{kind}", f"{kind} {kind} {kind}", "a < b ? a : b")
        _add(section + "max", f"max.{kind}", f"{kind} {kind} {kind}", "a > b ? a : b")
    _add(section + "popc", "popc.b32", "u32 u32", "__builtin_popcount(a)")
    _add(section + "popc", "popc.b64", "u32 u64", "__builtin_popcountll(a)")
    _add(section + "clz", "clz.b32", "u32 u32", "a ? __builtin_clz(a) : 32")
    _add(section + "brev", "brev.b32", "u32 u32", "reversed(a)")
    _add(section + "bfe", "bfe.u32", "u32 u32 u32 u32", "bfe_unsigned(a, b, c)")
    _add(section + "bfe", "bfe.s32", "s32 s32 u32 u32", "bfe_signed(a, b, c)")
    _add(section + "bfi", "bfi.b32", "u32 u32 u32 u32 u32", "bfi(a, b, c, d)")
    section = "Logic and Shift Instructions: "
    _add(section + "shf", "shf.l.wrap.b32", "u32 u32 u32 u32", "shf_left(a, b, c & 31)")
    _add(section + "shf", "shf.r.wrap.b32", "u32 u32 u32 u32", "shf_right(a, b, c & 31)")
    _add(section + "shf", "shf.l.clamp.b32", "u32 u32 u32 u32", "shf_left(a, b, c > 32 ? 32 : c)")
    _add(section + "shf", "shf.r.clamp.b32", "u32 u32 u32 u32", "shf_right(a, b, c > 32 ? 32 : c)")
    _add(section + "lop3", "lop3.b32", "u32 u32 u32 u32 u32", "lop3(a, b, c, d)")
    _add("Data Movement and Conversion Instructions: prmt", "prmt.b32", "u32 u32 u32 u32", "prmt(a, b, c)")


_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def _comparisons() -> None:
    section = "Comparison and Selection Instructions: setp"
    for name, sign in _COMPARISONS.items():
        for bits in (16, 32, 64):
            _add(section, f"setp.{name}.s{bits}", f"pred s{bits} s{bits}", f"a {sign} b")
            _add(section, f"setp.{name}.u{bits} setp.{name}.b{bits}", f"pred u{bits} u{bits}", f"a {sign} b")
        for kind in ("f32", "f64"):
            ordered = f"a {sign} b" if name != "ne" else "a < b || a > b"
            _add(section, f"setp.{name}.{kind} setp.{name}.ftz.{kind}", f"pred {kind} {kind}", ordered)
            # "u" is also true of a NaN.
            _add(section, f"setp.{name}u.{kind}", f"pred {kind} {kind}", f"{ordered} || a != a || b != b")
        for kind, read in (("f16", "from_f16"), ("bf16", "from_bf16")):
            ordered = f"{read}(a) {sign} {read}(b)"
            if name != "ne":
                _add(section, f"setp.{name}.{kind}", "pred u16 u16", ordered)
    for kind in ("f32", "f64"):
        _add(section, f"setp.nan.{kind}", f"pred {kind} {kind}", "a != a || b != b")
        _add(section, f"setp.num.{kind}", f"pred {kind} {kind}", "a == a && b == b")


def _floats() -> None:
    section = "Floating Point Instructions: "
    binary = {"add": "a + b", "sub": "a - b", "mul": "a * b"}
    for name, expression in binary.items():
        for kind in ("f32", "f64"):
            _add(section + name, f"{name}.{kind} {name}.rn.{kind}", f"{kind} {kind} {kind}", expression)
        flushed = expression.replace("a", "flush(a)").replace("b", "flush(b)")
        _add(section + name, f"{name}.ftz.f32 {name}.rn.ftz.f32", "f32 f32 f32", f"flush({flushed})")
    _add(section + "fma", "fma.rn.f32", "f32 f32 f32 f32", "__builtin_fmaf(a, b, c)")
    _add(section + "fma", "fma.rn.ftz.f32", "f32 f32 f32 f32", "flush(__builtin_fmaf(flush(a), flush(b), flush(c)))")
    _add(section + "fma", "fma.rn.f64", "f64 f64 f64 f64", "__builtin_fma(a, b, c)")
    _add(section + "div", "div.rn.f32 div.full.f32 div.approx.f32", "f32 f32 f32", "a / b")
    _add(section + "div", "div.full.ftz.f32 div.approx.ftz.f32", "f32 f32 f32", "flush(flush(a) / flush(b))")
    _add(section + "div", "div.rn.f64", "f64 f64 f64", "a / b")
    for kind in ("f32", "f64"):
        _add(section + "neg", f"neg.{kind}", f"{kind} {kind}", "-a")
    _add(section + "neg", "neg.ftz.f32", "f32 f32", "-flush(a)")
    _add(section + "abs", "abs.f32", "f32 f32", "__builtin_fabsf(a)")
    _add(section + "abs", "abs.ftz.f32", "f32 f32", "__builtin_fabsf(flush(a))")
    _add(section + "abs", "abs.f64", "f64 f64", "__builtin_fabs(a)")
    for name, function in (("max", "larger"), ("min", "smaller")):
        _add(section + name, f"{name}.f32", "f32 f32 f32", f"{function}(a, b)")
        _add(section + name, f"{name}.ftz.f32", "f32 f32 f32", f"{function}(flush(a), flush(b))")
        _add(section + name, f"{name}.f64", "f64 f64 f64", f"f{name}(a, b)")
        _add(section + name, f"{name}.NaN.f32", "f32 f32 f32", f"a != a || b != b ? NAN : {function}(a, b)")
    _add(section + "rcp", "rcp.rn.f32 rcp.approx.f32", "f32 f32", "1.0f / a")
    _add(section + "rcp", "rcp.approx.ftz.f32", "f32 f32", "flush(1.0f / flush(a))")
    _add(section + "sqrt", "sqrt.rn.f32 sqrt.approx.f32 sqrt.approx.ftz.f32", "f32 f32", "sqrtf(a)")
    _add(section + "rsqrt", "rsqrt.approx.f32 rsqrt.approx.ftz.f32", "f32 f32", "1.0f / sqrtf(a)")
    _add(section + "ex2", "ex2.approx.f32", "f32 f32", "exp2_approx(a)")
    _add(section + "ex2", "ex2.approx.ftz.f32", "f32 f32", "exp2_approx_flushed(a)")
    _add(section + "lg2", "lg2.approx.f32", "f32 f32", "log2_approx(a)")
    _add(section + "lg2", "lg2.approx.ftz.f32", "f32 f32", "log2_approx(flush(a))")


def _half_floats() -> None:
    section = "Half Precision Floating Point Instructions: "
    for kind in ("f16", "bf16"):
        read, write = f"from_{kind}", f"to_{kind}"
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
            _add(
                section + name, f"{name}.{kind} {name}.rn.{kind}", "u16 u16 u16", f"{write}({read}(a) {sign} {read}(b))"
            )
            pairs = f"of_pairs<{read}, {write}>([](float x, float y, float) {{ return x {sign} y; }}, a, b)"
            _add(section + name, f"{name}.{kind}x2 {name}.rn.{kind}x2", "u32 u32 u32", pairs)
        fused = f"{write}(__builtin_fmaf({read}(a), {read}(b), {read}(c)))"
        _add(section + "fma", f"fma.rn.{kind}", "u16 u16 u16 u16", fused)
        pairs = (
            f"of_pairs<{read}, {write}>([](float x, float y, float z) {{ return __builtin_fmaf(x, y, z); }}, a, b, c)"
        )
        _add(section + "fma", f"fma.rn.{kind}x2", "u32 u32 u32 u32", pairs)
        _add(section + "neg", f"neg.{kind}", "u16 u16", "a ^ 0x8000")
        for name, function in (("max", "larger"), ("min", "smaller")):
            _add(section + name, f"{name}.{kind}", "u16 u16 u16", f"{write}({function}({read}(a), {read}(b)))")


def _conversions() -> None:
    section = "Data Movement and Conversion Instructions: cvt"
    integers = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us"]
    for to in integers:
        # A result of 8 bits fills a register of 16.
        held = {"u8": "u16", "s8": "s16"}.get(to, to)
        for source in integers:
            _add(section, f"cvt.{to}.{source}", f"{held} {source}", f"{CPP_TYPES[to]}(a)")
    for kind in ("f32", "f64"):
        for number in integers[2:]:
            _add(section, f"cvt.rn.{kind}.{number}", f"{kind} {number}", f"{CPP_TYPES[kind]}(a)")
    for number in integers[4:]:
        _add(section, f"cvt.rzi.{number}.f32", f"{number} f32", f"float_to<{CPP_TYPES[number]}>(a)")
        _add(section, f"cvt.rni.{number}.f32", f"{number} f32", f"float_to<{CPP_TYPES[number]}>(nearbyintf(a))")
    _add(section, "cvt.f64.f32", "f64 f32", "a")
    _add(section, "cvt.rn.f32.f64", "f32 f64", "float(a)")
    for kind in ("f16", "bf16"):
        _add(section, f"cvt.f32.{kind}", "f32 u16", f"from_{kind}(a)")
        _add(section, f"cvt.f64.{kind}", "f64 u16", f"from_{kind}(a)")
        _add(section, f"cvt.rn.{kind}.f32", "u16 f32", f"to_{kind}(a)")
        _add(section, f"cvt.rn.{kind}x2.f32", "u32 f32 f32", f"uint32_t(to_{kind}(a)) << 16 | to_{kind}(b)")
    _add(section, "cvt.rna.tf32.f32", "u32 u32", "(a + 0x1000) & 0xffffe000")
    for space in ("shared", "param", "local"):
        section = "Data Movement and Conversion Instructions: cvta"
        window = {"shared": "kSharedWindow", "param": "kParamWindow", "local": "kLocalWindow"}[space]
        _add(section, f"cvta.{space}.u64", "u64 u64", f"a | {window}")
        _add(section, f"cvta.to.{space}.u64", "u64 u64", "a & ~kWindowMask")
    _add("Data Movement and Conversion Instructions: cvta", "cvta.to.global.u64 cvta.global.u64", "u64 u64", "a")


_integers(32)
_integers(64)
_moves_and_logic()
_more_integers()
_comparisons()
_floats()
_half_floats()
_conversions()
