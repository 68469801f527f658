"""wgmma: operands by matrix descriptors in all layouts, fragments, and the rules about registers, fences and waits."""

import numpy as np
import pytest
from ptx.errors import PtxError

from tests.ptx.small_kernels import Run

MODES = {128: 1, 64: 2, 32: 3, 0: 0}


def halves(x, kind):
    return (
        (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        if kind == "bf16"
        else x.astype(np.float16).view(np.uint16)
    )


def k_major(x, swizzle):
    """Lay out (rows, 16): rows of `swizzle` bytes with 16-byte pieces swizzled, or core matrices of 8 x 16 bytes.

    Returns the memory, and leading and stride byte offsets.
    """
    rows = len(x)
    if not swizzle:  # neighbours along k 128 bytes apart, along rows 256
        return x.reshape(rows // 8, 8, 2, 8).transpose(0, 2, 1, 3).reshape(-1), 128, 256
    memory = np.zeros((rows, swizzle // 16, 8), np.uint16)
    # The pattern repeats after 8 rows of 128 bytes: what counts is the number of the 128-byte line.
    for row in range(rows):
        line = row * swizzle // 128
        for piece in range(2):
            place = piece ^ line % 8 if swizzle == 128 else swizzled(row, piece, swizzle)
            memory[row, place] = x[row, 8 * piece : 8 * piece + 8]
    return memory.reshape(-1), 16, 8 * swizzle


def swizzled(row, piece, swizzle):
    """Return where in its row a piece lies: bits 4 and on of the address, changed by bits 7 and on."""
    address = row * swizzle + piece * 16
    return (address ^ (address >> 7 & swizzle // 16 - 1) << 4) % swizzle // 16


def mn_major(x, swizzle):
    """Lay out (rows, 16) with rows running along memory; returns memory, leading and stride byte offsets."""
    rows, span = len(x), (swizzle or 16) // 2
    memory = np.zeros((rows // span, 2, 8, span // 8, 8), np.uint16)  # blocks of rows, of k, k, pieces, rows
    for row in range(rows):
        for k in range(16):
            piece = row % span // 8
            memory[row // span, k // 8, k % 8, swizzled(k % 8, piece, swizzle) if swizzle else 0, row % 8] = x[row, k]
    block = 8 * span * 2
    # Without a swizzle it is the stride that leads from rows to rows.
    return memory.reshape(-1), *((block, 2 * block) if not swizzle else (2 * block, block))


def descriptor(start, lead, stride, swizzle):
    return start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | MODES[swizzle] << 62


FILL = """
    ld.param.u64 %rd5, [a];
    mov.u32 %r5, 0;
fill:
    mad.lo.u32 %r6, %r1, 16, %r5;
    cvt.u64.u32 %rd6, %r6;
    add.s64 %rd6, %rd5, %rd6;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd6];
    st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};
    add.u32 %r5, %r5, 2048;
    setp.lt.u32 %p1, %r5, SIZE;
    @%p1 bra fill;
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""
COLUMNS = 32


def store(columns):
    """Return instructions that store what a thread has of a result."""
    lines = [f"    st.global.f32 [%rd7+{4 * i}], %f{100 + i};\n" for i in range(columns // 2)]
    return "".join([f"    mul.wide.u32 %rd7, %r1, {2 * columns};\n    add.s64 %rd7, %rd1, %rd7;\n", *lines])


STORE = store(COLUMNS)
WAIT = "    wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;\n"


def product(a, b, accumulate="0", kind="f16", tail="1, 1, 0, 0", columns=COLUMNS):
    depth = 8 if kind == "tf32" else 16
    opcode = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"
    results = "{" + ", ".join(f"%f{100 + i}" for i in range(columns // 2)) + "}"
    return f"    {opcode} {results}, {a}, {b}, {accumulate}, {tail};\n"


def fragments(out, columns=COLUMNS):
    """Put registers together.

    d_i of a thread lies in row 16 * warp + lane / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
    """
    d = np.zeros((64, columns), np.float32)
    t = np.arange(128)
    for i in range(columns // 2):
        d[16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2] = out.reshape(128, -1)[
            :, i
        ]
    return d


def operands(kind="f16", columns=COLUMNS):
    g = np.random.default_rng(3)
    a, b = g.integers(-8, 9, (64, 16)).astype(np.float32), g.integers(-8, 9, (columns, 16)).astype(np.float32)
    return a, b, halves(a, kind), halves(b, kind)


def run(body, memory, columns=COLUMNS, **more):
    padded = np.zeros(-(-memory.nbytes // 2048) * 1024, np.uint16)
    padded[: memory.size] = memory
    fill = FILL.replace("SIZE", str(padded.nbytes))
    if "{fill}" in body:
        body = body.replace("{fill}", fill)
    else:
        body = fill + body
    return Run(body, out=64 * columns, dtype=np.float32, threads=128, shared=65536, a=padded, **more)


def multiplied(layouts, swizzles, kind, columns):
    """Return what a product makes of operands in these layouts, and what it should."""
    a, b, half_a, half_b = operands(kind, columns)
    memory_a, lead_a, stride_a = (mn_major if layouts[0] else k_major)(half_a, swizzles[0])
    memory_b, lead_b, stride_b = (mn_major if layouts[1] else k_major)(half_b, swizzles[1])
    start = -(-memory_a.nbytes // 1024) * 1024
    memory = np.concatenate([memory_a, np.zeros(start // 2 - memory_a.size, np.uint16), memory_b])
    first, second = descriptor(0, lead_a, stride_a, swizzles[0]), descriptor(start, lead_b, stride_b, swizzles[1])
    asked = product(first, second, kind=kind, tail=f"1, 1, {layouts[0]}, {layouts[1]}", columns=columns)
    out = run("    wgmma.fence.sync.aligned;\n" + asked + WAIT + store(columns), memory, columns).out
    return fragments(out, columns), a @ b.T


@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_descriptors(swizzle, transposed, kind):
    found, expected = multiplied(transposed, (swizzle, swizzle), kind, 64)
    np.testing.assert_array_equal(found, expected)


# All that the kernels use, and the largest.
@pytest.mark.parametrize("columns", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("transposed", [0, 1])
def test_numbers_of_columns(columns, transposed):
    # A swizzled row of a transposed matrix holds up to 64 columns.
    swizzle = {8: 0, 16: 32, 32: 64}.get(columns, 128) if transposed else 128
    found, expected = multiplied((0, transposed), (128, swizzle), "bf16", columns)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("columns", [8, 64])
def test_products_of_tf32(registers, columns):
    g = np.random.default_rng(3)
    a, b = g.integers(-99, 99, (64, 8)).astype(np.float32), g.integers(-99, 99, (columns, 8)).astype(np.float32)
    # Bits below those of tf32 do not count.
    bits_a, bits_b = a.view(np.uint32) | 0xFFF, b.view(np.uint32) | 0xFFF
    memory_b, lead, stride = k_major(bits_b.view(np.uint16), 128)
    memory_a, _, _ = k_major(bits_a.view(np.uint16), 128)
    first, body = descriptor(memory_b.nbytes, lead, stride, 128), ""
    t = np.arange(128)
    # a_i: row = groupID, + 8 for odd i; column = threadID_in_group, + 4 for i >= 2.
    words = [bits_a[16 * (t // 32) + t % 32 // 4 + 8 * (i % 2), t % 4 + 4 * (i // 2)] for i in range(4)]
    if registers:
        first = "{%r20, %r21, %r22, %r23}"
        body = "    ld.param.u64 %rd10, [x];\n    mul.wide.u32 %rd11, %r1, 16;\n    add.s64 %rd10, %rd10, %rd11;\n"
        body += f"    ld.global.v4.b32 {first}, [%rd10];\n"
    asked = product(first, descriptor(0, lead, stride, 128), kind="tf32", tail="1, 1", columns=columns)
    body += "    wgmma.fence.sync.aligned;\n" + asked + WAIT + store(columns)
    out = run(body, np.concatenate([memory_b, memory_a]), columns, x=np.stack(words, 1)).out
    np.testing.assert_array_equal(fragments(out, columns), a @ b.T)


def simple():
    """Return memory with b at 0, its descriptor, and both operands, a being in rows of 128 bytes behind it."""
    a, b, half_a, half_b = operands()
    memory_b, lead, stride = k_major(half_b, 128)
    memory_a, _, _ = k_major(half_a, 128)
    memory = np.concatenate([memory_b, memory_a])
    return a, b, memory, descriptor(memory_b.nbytes, lead, stride, 128), descriptor(0, lead, stride, 128)


def test_an_operand_from_registers_and_accumulation():
    a, b, half_a, half_b = operands()
    memory, lead, stride = k_major(half_b, 128)
    t = np.arange(128)
    row, column = 16 * (t // 32) + t % 32 // 4, 2 * (t % 4)
    pairs = [half_a[row + 8 * (i // 2 % 2), column + i % 2 + 8 * (i // 4)] for i in range(8)]
    words = np.stack(pairs, 1).reshape(128, 4, 2).astype(np.uint32)
    body = "    ld.param.u64 %rd10, [x];\n    mul.wide.u32 %rd11, %r1, 16;\n    add.s64 %rd10, %rd10, %rd11;\n"
    body += "    ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd10];\n    wgmma.fence.sync.aligned;\n"
    d = descriptor(0, lead, stride, 128)
    body += product("{%r20, %r21, %r22, %r23}", d, "0", tail="1, 1, 0")
    body += "    setp.eq.u32 %p5, %r1, %r1;\n" + product("{%r20, %r21, %r22, %r23}", d, "%p5", tail="1, 1, 0")
    out = run(body + WAIT + STORE, memory, x=words[:, :, 0] | words[:, :, 1] << 16).out
    np.testing.assert_array_equal(fragments(out), 2 * (a @ b.T))


@pytest.mark.parametrize("late", [(), (0,), (3,)])
def test_groups_are_waited_for_in_order(late):
    a, b, memory, first, second = simple()
    other = product(first, second).replace("%f1", "%f2")
    body = "    wgmma.fence.sync.aligned;\n" + product(first, second) + "    wgmma.commit_group.sync.aligned;\n" + other
    body += "    wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 1;\n" + STORE
    out = run(body + "    wgmma.wait_group.sync.aligned 0;\n    mov.f32 %f1, %f200;\n", memory, late=late).out
    np.testing.assert_array_equal(fragments(out), a @ b.T)
    with pytest.raises(PtxError, match=r"reads a register of the wgmma at line \d+, which is in flight"):
        run(body + "    mov.f32 %f1, %f200;\n", memory, late=late)


def broken(change, message, **more):
    _, _, memory, first, second = simple()
    body = "{fill}    wgmma.fence.sync.aligned;\n" + product(first, second) + WAIT + STORE
    run(body, memory)
    changed = change(body, first, second)
    assert changed != body
    with pytest.raises(PtxError, match=message):
        run(changed, memory, **more)


FENCE = "    wgmma.fence.sync.aligned;\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda body, *_: body.replace("    wgmma.wait_group.sync.aligned 0;\n", ""),
            "reads a register of the wgmma at line",
        ),
        (
            lambda body, *_: body.replace("    wgmma.commit_group.sync.aligned;\n", ""),
            "reads a register of the wgmma at line",
        ),
        (lambda body, *_: body.replace(FENCE, ""), "a register that was accessed after the last wgmma.fence"),
        (
            lambda body, *_: body.replace(FENCE, FENCE + "    mov.f32 %f103, 0f00000000;\n"),
            "accessed after the last wgmma.fence",
        ),
        (
            lambda body, *_: body.replace(FENCE, FENCE + "    add.f32 %f1, %f103, %f103;\n"),
            "accessed after the last wgmma.fence",
        ),
        (
            lambda body, *_: body.replace("    wgmma.commit", "    mov.f32 %f103, 0f00000000;\n    wgmma.commit", 1),
            "writes a register of the wgmma",
        ),
        (
            lambda body, a, b: body.replace(
                FENCE, "    setp.lt.u32 %p6, %r1, 32;\n    selp.b64 %rd9, 0, " + str(b) + ", %p6;\n" + FENCE
            ).replace(f", {b}, 0", ", %rd9, 0"),
            "ask for different products",
        ),
        (lambda body, a, b: body.replace(f", {b}, 0", f", {b | 1 << 49}, 0"), "base offset"),
        (
            lambda body, a, b: body.replace(
                FENCE, "    setp.eq.u32 %p6, %r2, 9;\n    selp.b64 %rd9, 0, " + str(b) + ", %p6;\n" + FENCE
            ).replace(f", {b}, 0", ", %rd9, 0"),
            "lanes of a warp disagree about a matrix descriptor",
        ),
        (lambda body, a, b: body.replace(f", {b}, 0", f", {b | 0x3000}, 0"), "wgmma operand out of range|nobody wrote"),
        (
            lambda body, *_: body.replace("    wgmma.mma", "    setp.lt.u32 %p6, %r2, 3;\n    @%p6 wgmma.mma"),
            "divergence at a barrier: wgmma is for",
        ),
        (
            lambda body, *_: body.replace("    wgmma.mma", "    setp.lt.u32 %p6, %r1, 96;\n    @%p6 wgmma.mma"),
            "deadlock: .* a product",
        ),
    ],
)
def test_rules_of_products(change, message):
    broken(change, message)


def drop_fence(memory_fill):
    return memory_fill.replace("    fence.proxy.async.shared::cta;\n", "")


def test_the_async_proxy_needs_its_fence_on_either_side_of_the_barrier(monkeypatch):
    a, b, memory, first, second = simple()
    rest = "    wgmma.fence.sync.aligned;\n" + product(first, second) + WAIT + STORE
    after = FILL.replace(
        "    fence.proxy.async.shared::cta;\n    bar.sync 0;", "    bar.sync 0;\n    fence.proxy.async.shared::cta;"
    )
    size = str(-(-memory.nbytes // 2048) * 2048)
    padded = np.zeros(int(size) // 2, np.uint16)
    padded[: memory.size] = memory
    common = {"out": 128 * COLUMNS // 2, "dtype": np.float32, "threads": 128, "shared": 32768, "a": padded}
    out = Run(after.replace("SIZE", size) + rest, **common).out
    np.testing.assert_array_equal(fragments(out), a @ b.T)
    with pytest.raises(
        PtxError, match=r"race: wgmma operand of shared memory .* wrote; a fence.proxy.async is missing"
    ):
        Run(drop_fence(FILL).replace("SIZE", size) + rest, **common)
    with pytest.raises(PtxError, match="race: wgmma operand of shared memory"):
        Run(FILL.replace("    bar.sync 0;\n", "").replace("SIZE", size) + rest, **common)


def test_operands_are_read_until_the_wait():
    def overwrite(body, *_):
        return body.replace("    wgmma.wait", "    st.shared.b32 [memory], 0;\n    wgmma.wait")

    which = "(a product of warpgroup 0 read|warp . lane 31 wrote)"
    broken(overwrite, f"race: (store|wgmma operand) of shared memory at byte 0, which {which}")


@pytest.mark.parametrize("barrier", ["", "    bar.sync 1;\n"], ids=["own wait", "all have waited"])
def test_a_wait_says_nothing_of_what_other_warps_multiply(barrier):
    """Each warp computes rows of its own, and may be late with them."""
    _, _, memory, first, second = simple()
    wait = "    wgmma.wait_group.sync.aligned 0;\n"
    store = "    setp.eq.u32 %p6, %r1, 0;\n    @%p6 st.shared.b32 [memory], 0;\n"
    body = "{fill}    wgmma.fence.sync.aligned;\n" + product(first, second) + WAIT + STORE
    changed = body.replace(wait, wait + barrier + store)
    assert changed != body
    if barrier:
        run(changed, memory)
        return
    with pytest.raises(PtxError, match=r"race: (store|wgmma operand) of shared memory at byte 0, which"):
        run(changed, memory)
