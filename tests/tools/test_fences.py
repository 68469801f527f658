"""Finding matrix instructions that may read what an asynchronous copy wrote before a fence has made it visible."""

import pytest
from offline.fences import unfenced

WAIT = "cp.async.wait_group \t0;"
FENCE = "fence.proxy.async.shared::cta;"
READ = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;"


def lines(*given):
    return "\n\t".join(given)


@pytest.mark.parametrize(
    "kernel",
    [
        lines(WAIT, "bar.sync 0;", FENCE, READ, READ),
        lines(WAIT, FENCE, "bar.sync 0;", READ),
        lines(WAIT + FENCE, READ),
        lines("cp.async.wait_all;", FENCE, "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;"),
        lines(READ, WAIT, "ret;"),
        lines(WAIT, "bra.uni $L__2;", "$L__1:", READ, "$L__2:", "ret;"),
        lines(WAIT, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1};"),
    ],
)
def test_fenced_kernels_have_none(kernel):
    assert unfenced(kernel) == 0


@pytest.mark.parametrize(
    ("kernel", "count"),
    [
        (lines(WAIT, "bar.sync 0;", READ, READ), 2),
        (lines(FENCE, WAIT, READ), 1),
        (lines(WAIT, "fence.proxy.async.global;", READ), 1),
        (lines(WAIT, f"// {FENCE}", READ), 1),
        (lines("cp.async.wait_all;", "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;"), 1),
        # One of two paths has a fence.
        (lines(WAIT, "@%p1 bra $L__1;", FENCE, "$L__1:", READ), 1),
        # Around a loop: the wait stands behind the product.
        (lines("$L__1: // loop", READ, WAIT, "@!%p1 bra $L__1;", "ret;"), 1),
        (lines(WAIT, "@%p1 ret;", READ), 1),
    ],
)
def test_a_path_without_a_fence_is_found(kernel, count):
    assert unfenced(kernel) == count
