"""The position table is Hugging Face's, bit for bit, and what it promises to kernels holds by brute force."""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deberta_v2 import modeling_deberta_v2 as upstream

from deberta_kernels import position
from deberta_kernels.position import attention_span, delta, log_bucket, position_index, reachable_rows
from deberta_kernels.types import PositionSpec

BUCKETS = (16, 32, 64, 128, 256, 320, 512, 0)
MAXIMA = (64, 128, 256, 512, 1024, 2048, 4096)
# Beyond the grid: tiny and odd counts, a first logarithm of zero, fewer distances than buckets, linear tables.
ODD = ((2, 2), (2, 8), (3, 9), (5, 7), (6, 4), (16, 5), (17, 100), (33, 20), (64, 2), (-1, 1), (-1, 200), (8, 0))
GRID = [(buckets, maximum) for buckets in BUCKETS for maximum in MAXIMA] + list(ODD)
SOME = [(256, 512), (512, 4096), (32, 64), (0, 128), (256, 64), (320, 128), *ODD]
FURTHEST = 8191


@pytest.fixture(autouse=True)
def fresh_tables():
    position._cached_index.cache_clear()
    position._cached_rows.cache_clear()
    yield
    position._cached_index.cache_clear()
    position._cached_rows.cache_clear()


def theirs(distance, buckets, maximum):
    """The bucket as `build_relative_position` computes it."""
    if buckets > 0 and maximum > 0:
        distance = upstream.make_log_bucket_position(distance, buckets, maximum)
    return distance.to(torch.long)


def their_delta(distance, buckets, maximum):
    span = buckets if buckets > 0 else maximum
    return torch.clamp(theirs(distance, buckets, maximum) + span, 0, 2 * span - 1)


@pytest.mark.parametrize(("buckets", "maximum"), GRID)
def test_buckets_and_rows_equal_hugging_face_for_lengths_up_to_8192(buckets, maximum):
    distance = torch.arange(-FURTHEST, FURTHEST + 1)
    spec = PositionSpec(buckets, maximum)
    want = their_delta(distance, buckets, maximum)
    assert torch.equal(log_bucket(distance, buckets, maximum), theirs(distance, buckets, maximum))
    assert torch.equal(delta(distance, spec), want)
    index = position_index(FURTHEST + 1, spec)
    assert index.delta.dtype == torch.int32
    assert torch.equal(index.delta[distance.clamp(-index.reach, index.reach) + index.reach].long(), want)


@pytest.mark.parametrize("length", [1, 2, 64, 131, 513, 700, 1200])
def test_rows_equal_those_of_hugging_faces_matrix(length):
    tokens = torch.zeros(1, length, 1)
    want = torch.clamp(upstream.build_relative_position(tokens, tokens, 256, 512)[0] + 256, 0, 511)
    positions = torch.arange(length)
    assert torch.equal(delta(positions[:, None] - positions, PositionSpec(256, 512)), want)


def test_rows_of_the_released_models():
    rows = delta(torch.tensor([0, 131, -131, 505, 506, -511, -512]), PositionSpec(256, 512)).tolist()
    assert rows == [256, 387, 125, 510, 511, 1, 0]


@pytest.mark.parametrize("buckets", [32, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtype_changes_nothing(dtype, buckets):
    distance = torch.arange(-2000, 2001)
    want = theirs(distance, buckets, 512)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got, index = log_bucket(distance, buckets, 512), position_index(2001, PositionSpec(buckets, 512))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, want)
    assert torch.equal(index.delta, position_index(2001, PositionSpec(buckets, 512)).delta)


def test_default_device_and_modes_leave_the_cache_real():
    spec = PositionSpec(64, 300)
    want = their_delta(torch.arange(-576, 577), 64, 300)
    for context in (torch.device("meta"), FakeTensorMode(), torch.inference_mode(), torch.no_grad()):
        position._cached_index.cache_clear()
        position._cached_rows.cache_clear()
        with context:
            index = position_index(400, spec)
            rows = reachable_rows(300, 200, spec)
        assert type(index.delta) is torch.Tensor
        assert index.delta.device.type == "cpu"
        assert not index.delta.is_inference()
        x = torch.arange(-index.reach, index.reach + 1)
        assert torch.equal(index.delta.long(), want[x + 576])
        used = want[torch.arange(-199, 300) + 576]
        assert rows == (int(used.min()), int(used.max()) + 1)


@pytest.mark.parametrize("length", [0, 1, 100, 511, 512, 513, 1500, 5000])
@pytest.mark.parametrize(("buckets", "maximum"), SOME)
def test_table_keeps_its_promises(buckets, maximum, length):
    spec = PositionSpec(buckets, maximum)
    index = position_index(length, spec)
    table = their_delta(torch.arange(-index.reach, index.reach + 1), buckets, maximum).tolist()
    assert index.reach % 64 == 0
    assert index.delta.is_contiguous()
    assert index.delta.tolist() == table
    furthest = 20_000
    everywhere = their_delta(torch.arange(-furthest, furthest + 1), buckets, maximum).tolist()
    low = next(x for x in range(-index.reach, index.reach) if table[x + index.reach + 1] != table[0])
    high = next(x for x in range(index.reach, -index.reach, -1) if table[x + index.reach - 1] != table[-1])
    assert (index.low_end, index.high_start) == (low, high)
    if index.reach < length + 64:
        beyond = range(index.reach - 64, furthest + 1)
        assert {everywhere[furthest + x] for x in beyond} == {table[-1]}
        assert {everywhere[furthest - x] for x in beyond} == {table[0]}
    steps = [after - before for before, after in pairwise(table)]
    assert index.smooth == (set(steps) <= {0, 1})


def test_short_tables_stay_short_and_unsaturated_ones_grow():
    assert position_index(100_000, PositionSpec(256, 512)).reach == 576
    assert position_index(100_000, PositionSpec(0, 64)).reach == 128
    assert position_index(3000, PositionSpec(512, 16_384)).reach >= 3064


def test_which_tables_are_smooth():
    smooth = {spec: position_index(2048, PositionSpec(*spec)).smooth for spec in [(256, 512), (0, 100), (256, 64)]}
    assert smooth == {(256, 512): True, (0, 100): True, (256, 64): False}


def test_lengths_of_one_power_of_two_share_a_table():
    spec = PositionSpec(256, 512)
    assert position_index(1025, spec) is position_index(2048, PositionSpec(256, 512, first_row=3, prefix_length=2))
    assert position_index(1025, spec) is not position_index(1024, spec)


@pytest.mark.parametrize(("buckets", "maximum"), SOME)
def test_reachable_rows_are_those_in_use(buckets, maximum):
    for nq, nk in ((1, 1), (2, 1), (1, 2), (64, 64), (3, 200), (200, 3), (511, 512), (1300, 1300)):
        used = their_delta(torch.arange(-(nk - 1), nq), buckets, maximum)
        want = (int(used.min()), int(used.max()) + 1)
        assert reachable_rows(nq, nk, PositionSpec(buckets, maximum, first_row=5)) == want


def test_reachable_rows_of_64_tokens_are_127():
    assert reachable_rows(64, 64, PositionSpec(256, 512)) == (193, 320)


def scaled_by_rows(x):
    start, stop = reachable_rows(x.shape[0], x.shape[0], PositionSpec(256, 512))
    return x * start + stop


@pytest.mark.parametrize(("dynamic", "rows"), [(False, (250, 263)), (True, (0, 512))])
def test_reachable_rows_compile_without_graph_breaks(dynamic, rows):
    torch._dynamo.reset()
    compiled = torch.compile(scaled_by_rows, fullgraph=True, backend="eager", dynamic=dynamic)
    assert torch.equal(compiled(torch.ones(7)), torch.full((7,), float(sum(rows))))


def test_span():
    assert attention_span(256, 512) == 256
    assert attention_span(0, 300) == 300
    assert attention_span(-1, 300) == 300


def test_settings_without_a_table_are_refused_by_name():
    with pytest.raises(ValueError, match="position_buckets must be at least 2"):
        attention_span(1, 512)
    with pytest.raises(ValueError, match="max_relative_positions must be positive"):
        delta(torch.arange(3), PositionSpec(0, 0))
