"""Reading PTX: names, scopes, places of parameters, and messages that say what is not known."""

import re

import pytest
from ptx.errors import PtxSyntaxError, UnknownOpcode
from ptx.machine import Machine
from ptx.parser import NEWEST, entries, parse

from tests.ptx.small_kernels import Run, module


def test_parameters_lie_where_their_sizes_and_alignments_put_them():
    text = """
.visible .entry two(.param .u32 a, .param .u64 .ptr .global .align 1 b, .param .u16 c, .param .align 64 .b8 d[100])
.reqntid 128, 1
{ ret; }
.entry other() { ret; }
"""
    kernel = parse(text, "two")
    assert [(p.name, p.offset, p.size) for p in kernel.parameters] == [
        ("a", 0, 4),
        ("b", 8, 8),
        ("c", 16, 2),
        ("d", 64, 100),
    ]
    assert kernel.parameter_bytes == 164
    assert kernel.threads == 128
    assert entries(text) == ["two", "other"]
    with pytest.raises(ValueError, match="expected one kernel named third, the module has two, other"):
        parse(text, "third")


def test_statements_know_their_lines_and_comments_are_no_code():
    kernel = parse(".entry k() {\n/* mov.u32\n */ .reg .b32 %r<3>; // ret;\n\n@!%p1 mov.u32 %r1,\n 7;\nret; }")
    first, last = kernel.statements
    assert (first.opcode, first.operands, first.guard, first.negated, first.line) == (
        "mov.u32",
        ["%r1", "7"],
        "%p1",
        True,
        5,
    )
    assert (last.opcode, last.line) == ("ret", 7)


def test_names_of_an_inner_scope_are_its_own():
    body = """
    mov.u32 %r5, 0;
    { .reg .b32 x; mov.u32 x, 1; again: add.u32 %r5, %r5, x; bra.uni over; add.u32 %r5, %r5, 100; over: }
    { .reg .b32 x; mov.u32 x, 10; again: add.u32 %r5, %r5, x; bra.uni over; add.u32 %r5, %r5, 100; over: }
    st.global.u32 [%rd2], %r5;
"""
    assert Run(body).out.tolist() == [11] * 32


def test_shared_arrays_come_before_dynamic_memory():
    text = module(".shared .f64 b;\nret;").replace(".extern .shared", ".shared .align 8 .b8 a[20];\n.extern .shared")
    kernel = parse(text)
    assert kernel.shared == {"a": 0, "b": 24, "memory": 1024}
    assert kernel.shared_bytes == 1024
    assert Machine(text, shared_bytes=100).shared_bytes == 1124


def test_an_unknown_opcode_is_named_with_its_line_and_what_to_do():
    text = module("    mov.u32 %r5, 1;\n    tcgen05.mma.cta_group::1.kind::f16 [%r5], %rd1;")
    line = next(i for i, found in enumerate(text.split("\n"), 1) if "tcgen05" in found)
    wanted = f"PTX line {line}: opcode tcgen05.mma.cta_group::1.kind::f16 is unknown; add it to tools/ptx/opcodes.py"
    with pytest.raises(UnknownOpcode, match=re.escape(wanted)) as caught:
        Machine(text)
    assert caught.value.opcode.startswith("tcgen05")


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("add.rz.f32 %f1, %f1, %f1;", "is unknown with these modifiers, only as add.rn.f32, "),
        ("ld.global.future.u32 %r1, [%rd1];", "is unknown in this form; add it to tools/ptx/instructions.py"),
        ("barrier.cluster.arrive;", "is unknown in this form; add it to tools/ptx/instructions.py"),
        ("call.uni other, ();", "is unknown; add it to tools/ptx/opcodes.py, or to tools/ptx/instructions.py when"),
        ("tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1}];", "is unknown; add it to tools/ptx/opcodes.py"),
    ],
)
def test_an_opcode_is_told_from_its_modifiers(instruction, message):
    opcode = instruction.split()[0].rstrip(";")
    with pytest.raises(UnknownOpcode, match=re.escape(f"opcode {opcode} {message}")):
        Machine(module(instruction))


def test_ptx_of_a_newer_isa_is_refused_with_what_to_do():
    text = module("").replace(".version 8.7", ".version 10.1")
    wanted = "PTX line 2: PTX of ISA 10.1, and this machine knows 9.4; read what changed since in the chapter Release"
    with pytest.raises(PtxSyntaxError, match=re.escape(wanted)):
        Machine(text)
    assert NEWEST == (9, 4)
    Machine(text.replace(".version 10.1", ".version 9.4"))


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        (".reqnctapercluster 2", "the directive .reqnctapercluster of a kernel is unknown; add what it means to"),
        (".explicitcluster", "the directive .explicitcluster of a kernel is unknown"),
        (".reqntid 32, 2", "blocks have one dimension here"),
        (".maxntid 32", None),
    ],
)
def test_kernels_of_clusters_and_of_several_dimensions_are_refused(directive, message):
    text = module("", threads=32).replace(".reqntid 32", directive)
    if message is None:
        Machine(text, threads=32)
        return
    with pytest.raises(PtxSyntaxError, match=rf"PTX line \d+: {re.escape(message)}"):
        Machine(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bra nowhere;", "there is no label nowhere"),
        (".callprototype _ ();", "the directive .callprototype is unknown"),
        ("add.s64 %rd5, %r5, %rd6;", "%r5 is declared as .b32 and used as .u64"),
        ("add.s32 %r5, %r6;", "expected 3 operands"),
        ("add.s32 %r5, %r6, elsewhere;", "elsewhere is no register, number, parameter or shared array"),
        ("ld.global.u32 %r5, [%rd1*4];", "is no address"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2}, %rd1, %rd2, 1, 1, 1, 0, 0;",
            "expected 4 registers",
        ),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2,%r3,%r4}, %rd1, %rd2, 1, -1, 1, 0, 0;", "negated"),
        ("mbarrier.arrive.shared.b64 %rd5, [%r5];", "returns a state"),
        ("( )", "neither an instruction nor a declaration"),
    ],
)
def test_what_cannot_be_read_is_refused(body, message):
    with pytest.raises(PtxSyntaxError, match=re.escape(message)):
        Machine(module(body))


def test_threads_must_be_whole_warps():
    with pytest.raises(ValueError, match="multiple of 32 from 32 to 1024, got 40"):
        Machine(module("", threads=40))
