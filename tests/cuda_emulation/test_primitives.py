"""The emulation itself, against what PTX and the CUDA guide document, and against what it must find wrong.

The tables of fragments and swizzles here are written after the figures of the PTX ISA ("Register Fragments and Shared
Memory Matrix Layouts" of wgmma.mma_async) and of the CUDA guide ("Tensor Map Swizzle Modes"), not after the code.
"""

import ctypes

import numpy as np
import pytest
import torch

from deberta_kernels.impl.cuda.arguments import TensorMap, box_of
from tests.cuda_emulation import harness


@pytest.fixture(scope="module")
def library():
    return harness.library()


def pointer(x):
    return ctypes.c_void_p(x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data)


def fragment_of_operand(a):
    """Return the registers of all threads for a (64, 64) first operand, (128, 16) of two elements each."""
    registers = np.zeros((128, 4, 4, 2), dtype=np.uint16)
    for thread, step, register, half in np.ndindex(128, 4, 4, 2):
        warp, lane = divmod(thread, 32)
        group, member = divmod(lane, 4)
        # Figure of matrix fragment A: a0 and a1 in row groupID, a2 and a3 in groupID + 8, a4 to a7 eight columns on.
        row = warp * 16 + group + (8 if register in (1, 3) else 0)
        column = member * 2 + half + (8 if register >= 2 else 0)
        registers[thread, step, register, half] = a[row, 16 * step + column]
    return registers


def matrix_of_accumulators(d):
    """Return the (64, 64) matrix that accumulators (128, 32) of all threads hold."""
    matrix = np.zeros((64, 64), dtype=np.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for register in range(32):
            # Figure of matrix fragment D: d0 and d1 in one row, d2 and d3 eight rows on; d4 begins the next 8 columns.
            row = 16 * warp + lane // 4 + (8 if register % 4 >= 2 else 0)
            column = 8 * (register // 4) + 2 * (lane % 4) + register % 2
            matrix[row, column] = d[thread, register]
    return matrix


@pytest.mark.parametrize(
    ("thread", "register", "row", "column"),
    [(0, 0, 0, 0), (0, 1, 0, 1), (0, 2, 8, 0), (0, 4, 0, 8), (3, 0, 0, 6), (4, 0, 1, 0), (31, 3, 15, 7),
     (32, 0, 16, 0), (127, 31, 63, 63)],
)  # fmt: skip
def test_accumulators_lie_as_in_the_figure(thread, register, row, column):
    d = np.zeros((128, 32), dtype=np.float32)
    d[thread, register] = 1
    assert np.argwhere(matrix_of_accumulators(d)).tolist() == [[row, column]]


def test_products_of_all_forms_are_those_of_the_matrices(library):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64, 64), generator=generator).to(torch.bfloat16) for _ in range(2))
    maps = (TensorMap * 3)()
    base = -ctypes.addressof(maps) % 64
    aligned = (TensorMap * 2).from_buffer(maps, base)
    for target, x in zip(aligned, (a, b)):
        harness.encoder(library)(target, x.dtype, box_of(x[None], (2, 1, 0)))
    bits = a.view(torch.int16).numpy().view(np.uint16)
    registers = np.ascontiguousarray(fragment_of_operand(bits))
    found = np.zeros((3, 128, 32), dtype=np.float32)
    error = library.emulated_products(ctypes.byref(aligned), pointer(registers), pointer(found))
    assert error == b""
    wide_a, wide_b = a.float().numpy(), b.float().numpy()
    for d, expected in zip(found, (wide_a @ wide_b.T, wide_a @ wide_b.T, wide_a @ wide_b)):
        assert np.array_equal(matrix_of_accumulators(d), expected)  # small integers: sums are exact


@pytest.mark.parametrize(("x", "y"), [(0, 0), (0, 40), (64, -3), (64, 90)])
def test_copies_swizzle_and_fill_with_zeros(library, x, y):
    tensor = torch.arange(100 * 128, dtype=torch.int16).view(1, 100, 128)
    maps = (TensorMap * 2)()
    aligned = TensorMap.from_buffer(maps, -ctypes.addressof(maps) % 64)
    harness.encoder(library)(aligned, tensor.dtype, box_of(tensor, (2, 1, 0)))
    found = np.zeros(64 * 64, dtype=np.uint16)
    assert library.emulated_copy(ctypes.byref(aligned), x, y, pointer(found)) == b""
    found = found.reshape(64, 8, 8)  # rows, 16-byte units, elements
    for row in range(64):
        for unit in range(8):
            # CUDA guide, CU_TENSOR_MAP_SWIZZLE_128B: unit u of row r of a group of 8 lies at u XOR r.
            inside = 0 <= y + row < 100
            expected = tensor[0, y + row, x + 8 * unit :][:8].numpy() if inside else np.zeros(8)
            assert np.array_equal(found[row, unit ^ (row % 8)], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_elements_convert_as_torch_does(library, dtype):
    is_bfloat16 = int(dtype == torch.bfloat16)
    every = torch.arange(-(1 << 15), 1 << 15, 7).to(torch.int16).view(dtype)
    for bits, value in zip((every.view(torch.int16).int() & 0xFFFF).tolist(), every.float().tolist()):
        found = library.emulated_value(is_bfloat16, bits)
        assert found == value or (found != found and value != value)
        if value == value:
            assert library.emulated_bits(is_bfloat16, ctypes.c_float(value)) == bits
    halfway = (every[:-1].float() + every[1:].float()) / 2
    for value in halfway[halfway.isfinite()].tolist():
        expected = int(torch.tensor(value).to(dtype).view(torch.int16)) & 0xFFFF
        assert library.emulated_bits(is_bfloat16, ctypes.c_float(value)) == expected


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 65, 64, dtype=torch.float16)[:, 1:].view(-1)[1:-63].view(1, 63, 64), "multiple of 16"),
        (torch.zeros(1, 64, 100, dtype=torch.float16)[..., :64], "multiples of 16"),
        (torch.zeros(1, 1, 64, dtype=torch.float16).expand(1, 64, 64), "positive multiples"),
        (torch.zeros(1, 64, 128, dtype=torch.float16)[..., ::2], "128 bytes wide"),
    ],
)
def test_maps_that_the_driver_refuses_are_refused(library, x, message):
    with pytest.raises(harness.EmulationError, match=message):
        harness.encoder(library)(TensorMap(), x.dtype, box_of(x, (2, 1, 0)))
