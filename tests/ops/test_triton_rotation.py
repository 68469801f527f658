"""What near tiles read of what is staged for them: the integers of `rotation`, in Triton's interpreter.

It computes no bfloat16: the products and gathers around these integers are executed in tests/ptx/kernels.
"""

import pytest
import torch

from deberta_kernels import env
from tests import needs

if not env.triton_interpreted():
    pytest.skip("TRITON_INTERPRET is not set (make test-triton)", allow_module_level=True)
triton = needs.package("triton")
tl = triton.language

from deberta_kernels.impl.triton.kernels import primitives, rotation


@triton.jit
def pairs_kernel(
    rows_ptr, columns_ptr, entry_ptr, pair_ptr, ROWS: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    by_rows, by_columns, entry, pair = rotation.pairs(ROWS, TILE, PACKED)
    tl.store(rows_ptr + offs, by_rows)
    tl.store(columns_ptr + offs, by_columns)
    tl.store(entry_ptr + offs, entry.to(tl.int32))
    if PACKED:
        offs = tl.arange(0, ROWS)[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
    tl.store(pair_ptr + offs, pair.to(tl.int32))


@triton.jit
def content_kernel(high_ptr, low_ptr, before_ptr, pair_ptr, out_ptr, ROWS: tl.constexpr, TILE: tl.constexpr):
    words = tl.arange(0, ROWS)[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
    low = rotation.shifted(tl.load(low_ptr + words), tl.load(before_ptr + words), TILE, True)
    term = rotation.content_term(tl.load(high_ptr + words), low, tl.load(pair_ptr + words), TILE, True)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * TILE + tl.arange(0, TILE)[None, :], term)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_pairs_of_a_near_tile_read_what_was_staged_for_them(tile, groups, packed):
    rows, bits = groups * tile, 16 if packed else 32
    shapes = [(rows, tile)] * 3 + [(rows, tile // 2 if packed else tile)]
    by_rows, by_columns, entry, pair = (torch.empty(shape, dtype=torch.int32) for shape in shapes)
    pairs_kernel[(1,)](by_rows, by_columns, entry, pair, ROWS=rows, TILE=tile, PACKED=packed)
    row, col = torch.arange(rows)[:, None], torch.arange(tile)[None, :]
    group, r = row // tile * tile, row % tile
    y = (r - col) % tile
    address = getattr(primitives.staging_address, "fn", primitives.staging_address)
    assert torch.equal(by_rows.long(), address(row, y, tile, bits))
    assert torch.equal(by_columns.long(), address(group + (tile - 1 - y if packed else y), col + 0 * row, tile, bits))
    assert torch.equal(entry.bool(), (tile - 1 - r if packed else r) + col < tile)
    assert torch.equal((pair if not packed else pair.view(torch.int16)).bool(), r >= col)


@pytest.mark.parametrize("groups", [1, 2])
def test_content_to_position_is_chosen_among_words_of_two_columns(groups):
    tile = 16
    rows = groups * tile
    high, low, before = (torch.randn(rows, tile).bfloat16() for _ in range(3))
    row, col = torch.arange(rows)[:, None], torch.arange(tile)[None, :]
    is_high = row % tile >= col
    found = torch.empty(rows, tile)
    words = [x.contiguous().view(torch.int32) for x in (high, low, before, -is_high.to(torch.int16))]
    content_kernel[(1,)](*words, found, ROWS=rows, TILE=tile)
    assert torch.equal(found, torch.where(is_high, high, torch.where(row < tile, low, before)).float())
