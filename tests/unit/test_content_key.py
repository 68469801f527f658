"""The content key of a weight: any edit of its elements changes it, whatever the version counter says."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deberta_kernels import native
from deberta_kernels.models import position_tables as positions
from deberta_kernels.models.position_tables import content_key
from tests import needs


@pytest.fixture(autouse=True, params=["with the library", "without the library"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read weights by the native library's checksum, and by PyTorch."""
    if request.param == "without the library":
        monkeypatch.setattr(native, "opened", lambda: None)
    else:
        needs.native_library()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7,), (64, 33)])
def test_the_content_key_changes_with_any_element(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    key = content_key(tensor)
    assert content_key(tensor.clone()) == key
    tensor.data.view(-1)[-1] = -3
    assert content_key(tensor) != key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(768, 768), (512, 1024), (33, 7)])
def test_the_content_key_sees_every_kind_of_swap(dtype, shape):
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)
    key = content_key(weight)
    swaps = [((1,), (2,)), ((..., 1), (..., 2)), ((3, 4), (3, 5)), ((0, 0), (-1, -1))]
    for left, right in swaps:
        edited = weight.clone()
        edited.data[left], edited.data[right] = weight[right], weight[left]
        assert content_key(edited) != key
        edited.data.copy_(weight)
        assert content_key(edited.data.clone()) == key


def test_the_content_key_does_not_depend_on_the_mode_it_is_read_in():
    weight = torch.randn(64, 64)
    positions._secret_numbers.cache_clear()
    key, state = content_key(weight), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert content_key(weight) == key
    assert not positions._secret_numbers().is_inference()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_content_key_reads_views_at_odd_offsets():
    storage = torch.arange(64.0)
    for start in range(1, 5):
        view = storage[start : start + 11]
        key = content_key(view)
        view.data[4] = -1
        assert content_key(view) != key


def test_no_content_key_where_reading_is_not_cheap_or_not_possible():
    assert content_key(torch.ones(4, 4).t()[1:]) is None
    assert content_key(torch.ones(4, device="meta")) is None
    assert content_key(torch.ones(4).to_sparse()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_content_key_sees_signs_change_in_pairs(dtype):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    key = content_key(weight)
    for columns in ([1, 3], [1, 5, 9, 13], list(range(64))):
        edited = weight.clone()
        edited.data[:, columns] *= -1
        assert content_key(edited) != key


def flipped(weight, changes):
    """Return a copy of a float32 weight with bits of some of its 64-bit words flipped: word -> bits."""
    edited = weight.clone()
    words = edited.view(torch.int64).view(-1)
    for word, bits in changes.items():
        words[word] ^= bits if bits < 1 << 63 else bits - (1 << 64)
    return edited


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16, 32, 64, 512, 1024])
def test_no_change_of_two_words_cancels(distance):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(7))
    key = content_key(weight)
    for shift in range(34):
        for bits in (1 << 63, 1 << 31, 1 << 63 | 1 << 31):
            assert content_key(flipped(weight, {3: bits, 3 + distance: bits | 1 << shift})) != key


def test_the_content_key_is_another_one_in_every_process_and_the_same_in_a_fork():
    weight = torch.ones(3000)
    code = (
        "import os, sys, torch\n"
        "from deberta_kernels import native\n"
        "from deberta_kernels.models.position_tables import content_key\n"
        f"if {native.opened() is None}: native.opened = lambda: None\n"
        "weight = torch.ones(3000)\n"
        "key = content_key(weight)\n"
        "print(key, flush=True)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(content_key(weight) != key)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0]
    assert len({run.stdout for run in runs} | {f"{content_key(weight)}\n"}) == 3


def test_threads_share_the_key():
    weight = torch.randn(300, 40)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: content_key(weight), range(64)))) == 1


@pytest.mark.parametrize("left", [0, 64])
def test_no_content_key_of_memory_that_was_freed_or_cut(left):
    weight = torch.ones(600, 16)
    row = weight[1:2]
    weight.untyped_storage().resize_(left)
    assert content_key(weight) is None
    assert content_key(row) is None
