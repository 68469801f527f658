"""Why a kernel does not need a barrier, wait or fence: one small program for each reason, and one that needs it."""

import numpy as np
import pytest
from ptx.program import Program
from ptx.redundant.reasons import CLASSES, reason

from tests.ptx.small_kernels import module

STORE, LOAD = "st.shared.b32 [memory], %r1;", "ld.shared.b32 %r5, [memory];"
PRODUCT = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd10, %rd11, 1, 1, 1, 0, 0;"""
COPY = "cp.async.cg.shared.global [memory], [%rd1], 16;"
LOOP = "again: {body} setp.lt.u32 %p1, %r1, 3; @%p1 bra again;"

# The instruction asked about is written as <...>.
PROGRAMS = {
    "no access between": f"{STORE} <bar.sync 0;> bar.sync 0; {LOAD}",
    "loads alone": f"bar.sync 0; {LOAD} <bar.sync 0;> {LOAD}",
    "other bytes": f"{STORE} <bar.sync 0;> {LOAD}",
    "next group": f"{COPY} <cp.async.commit_group;> {COPY} cp.async.commit_group; cp.async.wait_group 0;",
    "later group": (
        f"{PRODUCT} <wgmma.commit_group.sync.aligned;> wgmma.wait_group.sync.aligned 0; {PRODUCT} "
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    ),
    "nothing in flight": "cp.async.wait_group 0; <cp.async.wait_group 0;>",
    "nothing started": f"@%p2 bra over; {COPY} cp.async.commit_group; over: <cp.async.wait_group 0;>",
    "later wait": f"{COPY} cp.async.commit_group; <cp.async.wait_group 0;> cp.async.wait_group 0;",
    "nothing written": f"{STORE} fence.proxy.async; {LOAD} <fence.proxy.async;>  {PRODUCT}",
    "fence behind": f"{STORE} <fence.proxy.async;> {STORE} fence.proxy.async; {PRODUCT}",
    "another fence": f"fence.proxy.async; {STORE} <fence.proxy.async;> {PRODUCT}",
    "registers untouched": f"wgmma.fence.sync.aligned; {PRODUCT} <wgmma.fence.sync.aligned;> {PRODUCT}",
}
NEEDED = {
    "the last commit": f"{COPY} <cp.async.commit_group;> cp.async.wait_group 0;",
    "the last wait": f"{COPY} cp.async.commit_group; <cp.async.wait_group 0;> {LOAD}",
    "a weaker wait before": f"{COPY} cp.async.commit_group; cp.async.wait_group 1; <cp.async.wait_group 0;>",
    "a wait of some paths": f"{COPY} @%p2 bra over; cp.async.wait_group 0; over: <cp.async.wait_group 0;>",
    "the first fence": f"{STORE} <fence.proxy.async;> {PRODUCT}",
    "the first fence of products": f"<wgmma.fence.sync.aligned;> {PRODUCT}",
}


def reason_in(text, executed=1):
    """Return the reason of what is marked; of what stands before a label "over:" nothing is executed."""
    start = text.index("<")
    program = Program(module(text.replace("<", "").replace(">", "")))
    opcode = text[start + 1 :].split(";")[0].split()[0]
    earlier = text[:start].count(opcode)
    found = [i for i, name in enumerate(program.opcodes) if name == opcode][earlier]
    counts = np.full(len(program.opcodes), executed)
    return reason(program, found, counts)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_reason_is_told(name):
    assert reason_in(PROGRAMS[name], executed=int(name != "nothing started")) == name


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_needed_has_no_reason(name):
    assert reason_in(NEEDED[name]) == ""


def test_a_loop_is_a_path_to_itself():
    body = LOOP.format(body=f"{COPY} cp.async.commit_group; <cp.async.wait_group 0;>")
    assert reason_in(body) == ""


def test_every_class_has_an_example():
    assert PROGRAMS.keys() == CLASSES.keys()
