"""The copy engine: tiles from a tensor map's fields, and sums into global memory."""

import re

import numpy as np
import pytest
from ptx.errors import PtxError
from ptx.machine import Machine, Memory
from ptx.tensor_map import tensor_map

from tests.ptx.small_kernels import module

BARRIER = 8192
WAIT = f"""
again:
    mbarrier.try_wait.parity.shared::cta.b64 %p9, [memory+{BARRIER}], 0;
    @!%p9 bra again;
"""
TILE = (
    f"""
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [memory+{BARRIER}], 1;
    @%p1 fence.mbarrier_init.release.cluster;
    bar.sync 0;
    mov.b64 %rd5, map;
    cvta.param.u64 %rd5, %rd5;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+{BARRIER}], BYTES;
    @%p1 cp.async.bulk.tensor.RANKd.shared::cluster.global.mbarrier::complete_tx::bytes
        [memory], [%rd5, {{COORDINATES}}], [memory+{BARRIER}];
"""
    + WAIT
)
# Copy shared memory to the output.
DUMP = """
    shl.b32 %r5, %r1, 2;
dump:
    ld.shared.b32 %r6, [%r5];
    cvt.u64.u32 %rd6, %r5;
    add.s64 %rd6, %rd1, %rd6;
    st.global.b32 [%rd6], %r6;
    add.u32 %r5, %r5, 128;
    setp.lt.u32 %p2, %r5, BYTES;
    @%p2 bra dump;
"""


def run(tensor, box, at, swizzle=0, body=TILE + DUMP, sizes=None, change=lambda text: text, seed=0, bytes_=None):
    """Copy a box of a tensor, innermost dimension last in numpy, and return shared memory afterwards."""
    size = int(np.prod(box)) * tensor.itemsize
    text = body.replace("BYTES", str(size if bytes_ is None else bytes_)).replace("RANK", str(tensor.ndim))
    text = module(change(text.replace("COORDINATES", ", ".join(map(str, at)))))
    text = text.replace(".param .u64 out", ".param .u64 out, .param .align 64 .b8 map[128]")
    out = np.zeros(size, np.uint8)
    encoded = tensor_map(
        tensor.ctypes.data, tensor.itemsize, sizes or tensor.shape[::-1], tensor.strides[-2::-1], box, swizzle
    )
    arguments = np.array([out.ctypes.data], np.uint64).tobytes().ljust(64, b"\0") + encoded
    memory = [Memory(out.ctypes.data, out.nbytes), Memory(tensor.ctypes.data, tensor.nbytes, 2, writable=False)]
    machine = Machine(text, shared_bytes=16384)
    machine.launch((1,), arguments, memory, seed=seed)
    return out.view(tensor.dtype), machine


def aligned(shape, dtype=np.uint16):
    """Return numbers in order, on a boundary of 64 bytes."""
    memory = np.zeros(int(np.prod(shape)) + 64, dtype)
    start = -memory.ctypes.data % 64 // memory.itemsize
    found = memory[start : start + int(np.prod(shape))].reshape(shape)
    found[...] = np.arange(found.size).reshape(shape) + 1
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tile_of_three_dimensions(seed):
    x = aligned((3, 10, 32))
    out, machine = run(x, (16, 4, 2), (8, 5, 1), seed=seed)
    assert out.tolist() == x[1:3, 5:9, 8:24].reshape(-1).tolist()
    sectors = [int(c[3]) for name, c in zip(machine.program.opcodes, machine.counts) if "bulk" in name]
    assert sectors == [8]


def test_outside_the_tensor_are_zeros():
    x = aligned((6, 16))
    out, _ = run(x, (16, 4), (-4, 4))
    expected = np.zeros((4, 16), np.uint16)
    expected[:2, 4:] = x[4:, :12]
    assert out.reshape(4, 16).tolist() == expected.tolist()
    out, _ = run(x, (16, 4), (12, -3))
    assert out.reshape(4, 16).tolist() == [[0] * 16] * 3 + [[*x[0, 12:], *[0] * 12]]


@pytest.mark.parametrize("swizzle", [128, 64, 32])
def test_swizzled_rows(swizzle):
    columns = swizzle // 2
    x = aligned((16, columns))
    out, _ = run(x, (columns, 16), (0, 0), swizzle)
    pieces = x.reshape(16, swizzle // 16, 8)
    expected = np.zeros((16 * swizzle // 16, 8), np.uint16)
    for row in range(16):
        for piece in range(swizzle // 16):
            address = row * swizzle + 16 * piece
            expected[(address ^ (address >> 7 & swizzle // 16 - 1) << 4) // 16] = pieces[row, piece]
    assert out.tolist() == expected.reshape(-1).tolist()


def without(line):
    return lambda text: re.sub(rf".*(?:{line}).*\n", "", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"change": without("@!%p9 bra again|mbarrier.try_wait")},
            "race: load of shared memory at byte \\d+, which a copy for the mbarrier at byte 8192 wrote",
        ),
        (
            {"change": without("fence.mbarrier_init")},
            "no fence.mbarrier_init or fence.proxy.async follows its mbarrier.init",
        ),
        ({"bytes_": 300}, "deadlock"),
        (
            {"change": lambda text: text.replace("[memory], [%rd5", "[memory+64], [%rd5")},
            "misaligned target of a tile copy: 128 bytes",
        ),
        ({"change": lambda text: text.replace("[memory], [%rd5", "[memory+16256], [%rd5")}, "tile copy out of range"),
        (
            {"change": lambda text: text.replace("[%rd5, {", "[%rd5+64, {")},
            "a tensor map beyond the parameters|where there is none",
        ),
        ({"change": lambda text: text.replace("map;", "out;")}, "the address of a tensor map, where there is none"),
        (
            {"change": lambda text: text.replace("tensor.2d", "tensor.3d").replace("{0, 0}", "{0, 0, 0}")},
            "a copy of 3 dimensions from a tensor map of 2",
        ),
        ({"sizes": (16, 600)}, "tile copy out of range: 32 bytes at byte 9600"),
        (
            {
                "change": lambda text: text.replace(
                    "    mov.b64 %rd5", "    st.shared.b32 [memory], 7;\n    bar.warp.sync -1;\n    mov.b64 %rd5"
                )
            },
            "race: tile copy of shared memory .* wrote; a fence.proxy.async is missing",
        ),
        (
            {"change": lambda text: text[: text.index("again:")] + text[text.index("shl.b32") :][:0]},
            "the block ends while a tile copy of warp 0 is in flight",
        ),
    ],
)
def test_tiles_that_are_wrong(changes, message):
    x = aligned((300, 16))
    small = {"at": (0, 0), "box": (16, 256)} if "sizes" not in changes else {"at": (0, 298), "box": (16, 4)}
    if "sizes" not in changes:
        small["box"] = (16, 8)
    run(x, small["box"], small["at"])
    with pytest.raises(PtxError, match=message):
        run(x, small["box"], small["at"], **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 2, (64, 64), (128,), (8, 8), 0), "address and strides must be multiples of 16"),
        ((16, 2, (64, 64), (120,), (8, 8), 0), "address and strides must be multiples of 16"),
        ((16, 2, (64, 64), (128,), (4, 8), 0), "rows of a box must be multiples of 16 bytes"),
        ((16, 2, (64, 64), (128,), (64, 8), 64), "rows of a box .* at most 64, got 128"),
        ((16, 2, (64, 64), (128,), (64, 300), 0), "a box has 1 to 256 elements"),
        ((16, 2, (64, 0), (128,), (64, 8), 0), "sizes must be positive"),
        ((16, 2, (64, 64), (), (64, 8), 0), "a tensor map has 1 to 5 sizes"),
    ],
)
def test_tensor_maps_that_a_driver_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tensor_map(*arguments)


SUM = """
    setp.eq.u32 %p1, %r1, 0;
    shl.b32 %r5, %r1, 2;
    cvt.rn.f32.u32 %f5, %r1;
    st.shared.f32 [%r5], %f5;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [memory], 128;
    @%p1 cp.async.bulk.commit_group;
    @%p1 cp.async.bulk.wait_group.read 0;
    bar.sync 0;
    st.shared.f32 [%r5], %f5;
"""


def add(change=lambda text: text, grid=2, size=128):
    memory = np.zeros(256, np.uint8)
    out = memory[-memory.ctypes.data % 16 :][:size].view(np.float32)
    machine = Machine(module(change(SUM)), shared_bytes=256)
    machine.launch((grid,), np.array([out.ctypes.data], np.uint64).tobytes(), [Memory(out.ctypes.data, out.nbytes)])
    return out


def test_sums_of_several_blocks():
    assert add(grid=3).tolist() == [3 * i for i in range(32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("wait_group"), "race: store of shared memory at byte \\d+, which a reduction of warp 0 read"),
        (
            lambda text: without("wait_group")(text)[: text.rindex("    bar.sync")].rsplit("    bar.sync", 1)[0],
            "the block ends while a reduction of warp 0 is in flight|ends without waiting for its reductions",
        ),
        (without("commit_group"), "race: store of shared memory at byte \\d+, which a reduction of warp 0 read"),
        (without("fence.proxy"), "race: reduction of shared memory .* wrote; a fence.proxy.async is missing"),
        (lambda text: text.replace("bar.sync 0;", "", 1), "race: reduction of shared memory"),
        (lambda text: text.replace("[%rd1]", "[%rd1+4]"), "misaligned target of a reduction"),
        (lambda text: text.replace("[memory], 128", "[memory+8], 128"), "misaligned source of a reduction"),
        (lambda text: text.replace("[memory], 128", "[memory], 120"), "misaligned size of a reduction"),
        (
            lambda text: text.replace("[memory], 128", "[memory+192], 128"),
            "reduction out of range: 128 bytes at byte 192",
        ),
        (
            lambda text: text.replace("[%rd1]", "[%rd1+16]"),
            "reduction out of range: 128 bytes at byte 16 of memory range 0",
        ),
    ],
)
def test_sums_that_are_wrong(change, message):
    with pytest.raises(PtxError, match=message):
        add(change)
