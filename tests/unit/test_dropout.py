"""The dropout counter is Philox4x32-10 as published, and its draws are fair, independent and reproducible."""

import math

import pytest
import torch

from deberta_kernels.dropout import draw_seed, keep_mask, keep_scale, philox, threshold

# counter, key, words: the known answers of Random123 1.14, tests/kat_vectors, philox4x32 10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def as_seed(low, high):
    value = (high << 32) | low
    return torch.tensor([value - (1 << 64) if value >= 1 << 63 else value])


def philox_of_integers(seed, counter):
    """The algorithm in Python integers, where nothing wraps by itself."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept(seed, p, batch_head, i, j):
    word = philox_of_integers(seed, (j >> 3, i, batch_head, 0))[(j & 7) >> 1]
    return (word >> (16 * (j & 1))) & 0xFFFF >= threshold(p)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_random123(counter, key, words):
    got = philox(as_seed(*key), tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in got) == words
    assert philox_of_integers(key[0] | key[1] << 32, counter) == words


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 - 1, 2**32, 2**63 - 1, 0x1234_5678_9ABC_DEF0])
def test_mask_follows_the_counter_layout(seed):
    batch_heads, rows, cols = [0, 3, 70_000], [0, 1, 500], [0, 1, 2, 6, 7, 8, 9, 63, 64, 4097]
    got = keep_mask(torch.tensor([seed]), 0.4, *(torch.tensor(x) for x in (batch_heads, rows, cols)))
    want = [[[kept(seed, 0.4, b, i, j) for j in cols] for i in rows] for b in batch_heads]
    assert got.tolist() == want


@pytest.mark.parametrize("cols", [range(8), range(1), range(3, 4), range(5, 30), range(8, 16), range(7, 9), range(0)])
def test_ranges_give_what_tensors_give(cols):
    seed, batch_heads, rows = torch.tensor([99]), range(2, 5), range(10, 14)
    by_range = keep_mask(seed, 0.5, batch_heads, rows, cols)
    by_tensor = keep_mask(seed, 0.5, *(torch.tensor(list(x), dtype=torch.int64) for x in (batch_heads, rows, cols)))
    assert by_range.shape == (3, 4, len(cols))
    assert torch.equal(by_range, by_tensor)


def test_a_range_with_a_step_is_taken_element_by_element():
    seed = torch.tensor([5])
    every = keep_mask(seed, 0.5, range(2), range(3), range(40))
    assert torch.equal(keep_mask(seed, 0.5, range(2), range(0, 3, 2), range(1, 40, 3)), every[:, ::2, 1::3])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.0003])
def test_keep_rate_within_4_sigma_over_ten_million_draws(p):
    batch_heads, rows, cols = 10, 500, 2000
    count = sum(
        int(keep_mask(torch.tensor([1234 + head]), p, range(head, head + 1), range(rows), range(cols)).sum())
        for head in range(batch_heads)
    )
    draws, rate = batch_heads * rows * cols, 1 - threshold(p) / 65536
    assert abs(count - draws * rate) <= 4 * math.sqrt(draws * rate * (1 - rate))


@pytest.mark.parametrize("pair", ["head", "row", "seed", "high_seed", "neighbour", "half_word", "group"])
def test_masks_of_different_counters_are_uncorrelated(pair):
    rows, cols = range(512), range(1024)

    def mask(seed=7, head=0, rows=rows, cols=cols):
        return keep_mask(torch.tensor([seed]), 0.5, range(head, head + 1), rows, cols)[0]

    first, second = {
        "head": lambda: (mask(), mask(head=1)),
        "row": lambda: (mask()[:-1], mask()[1:]),
        "seed": lambda: (mask(), mask(seed=8)),
        "high_seed": lambda: (mask(), mask(seed=7 + (1 << 32))),
        "neighbour": lambda: (mask()[:, :-1], mask()[:, 1:]),
        "half_word": lambda: (mask()[:, ::2], mask()[:, 1::2]),
        "group": lambda: (mask()[:, :-8], mask()[:, 8:]),
    }[pair]()
    agree = int((first == second).sum())
    draws = first.numel()
    assert abs(agree - draws / 2) <= 4 * math.sqrt(draws) / 2


def test_threshold_and_scale():
    assert [threshold(p) for p in (0.0, 1e-9, 0.1, 0.5, 0.999999)] == [0, 0, 6554, 32768, 65535]
    assert keep_scale(0.0) == 1.0
    assert keep_scale(0.5) == 2.0
    for p in (0.0, 0.1, 0.3, 0.999999):
        assert keep_scale(p) * (1 - threshold(p) / 65536) == pytest.approx(1.0, abs=1e-15)


def test_nothing_is_dropped_at_zero():
    assert bool(keep_mask(torch.tensor([3]), 0.0, range(2), range(50), range(50)).all())


def test_seed_follows_torchs_generator():
    torch.manual_seed(11)
    first, second = draw_seed("cpu"), draw_seed("cpu")
    torch.manual_seed(11)
    assert torch.equal(draw_seed("cpu"), first)
    assert not torch.equal(first, second)
    assert first.shape == (1,)
    assert first.dtype == torch.int64


def test_seeds_use_both_words_of_the_key():
    torch.manual_seed(0)
    seeds = torch.cat([draw_seed("cpu") for _ in range(64)])
    assert bool((seeds >= 0).all())
    for bit in range(63):
        assert 0 < int(((seeds >> bit) & 1).sum()) < 64, f"bit {bit} never changes"
