"""Tensor maps as the machine reads them: the fields of cuTensorMapEncodeTiled in 128 bytes of our own.

What a driver writes is opaque; here it is struct TensorMap of cpp/bulk.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["SWIZZLES", "TENSOR_MAP_SIZE", "tensor_map"]

_MAGIC = 0x50414D54
_FIELDS = struct.Struct("<4I Q 4Q 5I 5I")
TENSOR_MAP_SIZE = _FIELDS.size
# CUtensorMapSwizzle: bytes of a row that is swizzled.
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}
_MOST_BOX = 256


def tensor_map(
    address: int, element_bytes: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> bytes:
    """Return a tensor map.

    Args:
        address: of the tensor.
        element_bytes: of an element.
        sizes: of the dimensions, the innermost first.
        strides: in bytes, of the dimensions but the innermost.
        box: sizes of a tile.
        swizzle: bytes of a swizzled row: 0 for none, 32, 64 or 128.

    Raises:
        ValueError: what the driver would refuse.
    """
    rank = len(sizes)
    if not 1 <= rank <= 5 or len(strides) != rank - 1 or len(box) != rank:
        raise ValueError(
            f"a tensor map has 1 to 5 sizes, as many of a box, one stride less; got {sizes}, {box}, {strides}."
        )
    if address % 16 or any(stride % 16 for stride in strides):
        raise ValueError(f"address and strides must be multiples of 16 bytes, got {address:#x} and {list(strides)}.")
    if any(not 1 <= n <= _MOST_BOX for n in box):
        raise ValueError(f"a box has 1 to {_MOST_BOX} elements along each dimension, got {list(box)}.")
    row = box[0] * element_bytes
    if row % 16 or (swizzle and row > swizzle):
        raise ValueError(f"rows of a box must be multiples of 16 bytes and at most {swizzle or 'any'}, got {row}.")
    if any(not 1 <= n < 2**32 for n in sizes):
        raise ValueError(f"sizes must be positive, got {list(sizes)}.")

    def filled(values: Sequence[int], count: int) -> list[int]:
        return [*values, *[0] * (count - len(values))]

    fields = (_MAGIC, rank, element_bytes, swizzle, address, *filled(strides, 4), *filled(sizes, 5), *filled(box, 5))
    return _FIELDS.pack(*fields).ljust(128, b"\0")
