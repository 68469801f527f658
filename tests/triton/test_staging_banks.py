"""Count shared-memory bank conflicts of the staging layout, with the address function that the kernels use.

A bias tile is staged by the lanes that hold it as accumulators of a product, and read back along diagonals by the
same lanes. A warp's access costs as many cycles as the most distinct 32-bit words any of the 32 banks has to give.
"""

import itertools
from collections import defaultdict

import pytest
import torch

from tests import needs

needs.package("triton")

from deberta_kernels.impl.triton.kernels import primitives

TILES = (16, 32, 64, 128)
BANKS = 32
# The accumulators of m16n8 products: a lane holds rows lane / 4 and 8 more, columns 2 * (lane % 4) and the next.
LANES = [(lane >> 2, 2 * (lane & 3)) for lane in range(32)]


def plain(function):
    """Return the Python function behind a jitted one."""
    return getattr(function, "fn", function)


def address(row, column, tile, bits):
    return int(plain(primitives.staging_address)(row, column, tile, bits))


def conflicts(words):
    """Return how many cycles one access of a warp takes."""
    banks = defaultdict(set)
    for word in words:
        banks[word % BANKS].add(word)
    return max(map(len, banks.values()))


def accesses(tile):
    """Yield the 32 (row, column) pairs of every access of a warp: one accumulator element of each lane."""
    for row, column, lower, odd in itertools.product(range(0, tile, 16), range(0, tile, 8), (0, 8), (0, 1)):
        yield [(row + lower + r, column + c + odd) for r, c in LANES]


def worst(tile, bits, place, where=address):
    """Return the most cycles of any access; `place` turns an accumulator's (row, column) into what is touched."""
    halves = bits == 16
    return max(
        conflicts([where(*place(row, column), tile, bits) >> halves for row, column in pairs])
        for pairs in accesses(tile)
    )


PLACES = {
    "store": lambda tile: lambda row, column: (row, column),
    "read along rows": lambda tile: lambda row, column: (row, (row - column) % tile),
    "read along columns": lambda tile: lambda row, column: ((row - column) % tile, column),
    "read along rows, transposed": lambda tile: lambda row, column: (row, (row + column) % tile),
    "read along columns, transposed": lambda tile: lambda row, column: ((row + column) % tile, column),
}


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("access", PLACES)
def test_no_access_conflicts(access, tile, bits):
    assert worst(tile, bits, PLACES[access](tile)) == 1


def two_tiles(kind, tile):
    """Return what `slanted` says: where an element is read in two tiles beside or above each other."""
    return lambda row, column: {0: tile + row - column, 1: tile + column - row, 2: row + column}[kind]


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_no_access_to_two_tiles_conflicts(kind, tile, bits):
    index = two_tiles(kind, tile)

    def beside(row, column, tile, bits):
        return address(row, column, 2 * tile, bits)

    assert worst(tile, bits, lambda row, column: (row, index(row, column)), beside) == 1
    assert worst(tile, bits, lambda row, column: (index(row, column), column)) == 1
    assert worst(tile, bits, lambda row, column: (row, tile + column), beside) == 1
    assert worst(tile, bits, lambda row, column: (tile + row, column)) == 1


def test_the_simulator_sees_the_conflicts_of_rows_laid_out_plainly():
    def row_major(row, column, tile, bits):
        return row * tile + column

    assert worst(64, 32, PLACES["store"](64), row_major) == 8
    assert worst(64, 16, PLACES["store"](64), row_major) == 8
    assert worst(64, 16, PLACES["read along rows"](64), row_major) > 2


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("tile", TILES)
def test_every_element_has_an_address_of_its_own(tile, bits):
    found = {address(row, column, tile, bits) for row in range(tile) for column in range(tile)}
    assert found == set(range(tile * tile))


class Elements:
    """A tensor with the few methods of Triton's that `staged` uses."""

    def __init__(self, values, bits):
        self.values = values
        self.dtype = type("dtype", (), {"primitive_bitwidth": bits})

    def reshape(self, *shape):
        return Elements(self.values.reshape(*shape), self.dtype.primitive_bitwidth)

    def permute(self, *order):
        return Elements(self.values.permute(*order), self.dtype.primitive_bitwidth)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("tile", TILES)
def test_staging_puts_every_element_where_the_address_says(tile, bits):
    values = torch.arange(tile * tile).reshape(tile, tile)
    order = plain(primitives.staged)(Elements(values, bits), tile, tile).values
    for row, column in itertools.product(range(tile), range(tile)):
        assert order[address(row, column, tile, bits)] == values[row, column]
    values = torch.arange(2 * tile * tile).reshape(tile, 2 * tile)
    order = plain(primitives.staged)(Elements(values, bits), tile, 2 * tile).values
    for row, column in itertools.product(range(tile), range(2 * tile)):
        assert order[address(row, column, 2 * tile, bits)] == values[row, column]
