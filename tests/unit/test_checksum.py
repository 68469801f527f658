"""The keyed checksum of the native library: the formula that its proof is about, in every variant."""

import ctypes
import random
import struct

import pytest
import torch

from deberta_kernels import native

pytestmark = pytest.mark.skipif(native.opened() is None, reason=f"{native.unavailable()}")
VARIANTS = native.library_status()["variants"]
LINE, BLOCK, PRIME = 64, 4096, 2**61 - 1
SIZES = [0, 1, 7, 8, 63, 64, 65, 127, 128, 1000, 4032, 4095, 4096, 4097, 4160, 12345]


def formula(content: bytes, key: bytes) -> bytes:
    """Compute the checksum as csrc/cpu/checksum.h describes it."""
    points = [(point >> 3) % PRIME for point in struct.unpack("=2Q", key[-16:])]
    values = [len(content)] * 2
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        block += bytes(-len(block) % LINE)
        words = struct.unpack(f"={len(block) // 4}I", block)
        for which in range(2):
            keys = struct.unpack_from(f"={len(words)}I", key, which * LINE)
            sums = [(word + own) % 2**32 for word, own in zip(words, keys, strict=True)]
            nh = sum(a * b for a, b in zip(sums[::2], sums[1::2], strict=True)) % 2**64
            for half in (nh % 2**32, nh >> 32):
                values[which] = (values[which] * points[which] + half) % PRIME
    return struct.pack("=2Q", *values)


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_variant_computes_the_formula(isa, size):
    content = random.Random(size).randbytes(size)
    library = native.need()
    with native.use_isa(isa):
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        assert library.checksum(tensor) == formula(content, bytes(library.checksum_key))


@pytest.mark.parametrize("isa", VARIANTS)
def test_the_carries_of_extreme_words_and_keys_are_right(isa):
    library, size = native.need(), 2 * BLOCK + 72
    ones, result = b"\xff" * size, (ctypes.c_uint64 * 2)()
    for key in (b"\xff" * len(library.checksum_key), bytes(len(library.checksum_key))):
        library.handle.dk_cpu_checksum(ones, size, key, result, library.variants[isa])
        assert bytes(result) == formula(ones, key)


def test_other_keys_give_other_checksums():
    library, content = native.need(), bytes(1000)
    seen = set()
    for seed in range(20):
        key, result = random.Random(seed).randbytes(len(library.checksum_key)), (ctypes.c_uint64 * 2)()
        library.handle.dk_cpu_checksum(content, len(content), key, result, library.variants[library.isa])
        seen.add(bytes(result))
    assert len(seen) == 20
