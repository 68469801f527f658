"""What the Triton backend decides before any kernel runs: tables, zones, tiles, refusals. None of it needs triton."""

import importlib.metadata
import itertools
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deberta_kernels.impl import triton as backend
from deberta_kernels.impl.gpu_tables import Window
from deberta_kernels.impl.triton import tables, tuning
from deberta_kernels.position import delta
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

CPU = torch.device("cpu")
# Real models, small spans, linear positions, and maxima so small that delta falls and rises.
SPECS = st.sampled_from((
    (256, 512), (32, 128), (8, 20), (3, 9), (2, 8), (512, 2048), (0, 64), (-1, 16), (0, 1), (64, 20), (16, 5),
    (256, 100), (32, 15),
)).map(lambda pair: PositionSpec(*pair))  # fmt: skip
TILES = st.sampled_from((16, 32, 64))
LENGTHS = st.integers(1, 1500)
STEP = 16


def every_distance(found):
    return torch.arange(found.first, found.first + found.delta.numel())


@given(SPECS)
def test_device_tables_hold_delta_and_its_inverse(spec):
    found = tables.device_tables(100, spec, CPU)
    expected = delta(every_distance(found), spec)
    assert torch.equal(found.delta.long(), expected)
    bounds = found.bounds.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == found.delta.numel()
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        positions = found.order[start:stop].long()
        assert bool((expected[positions] == row).all())
        assert bool((positions.diff() > 0).all())
    assert found.order.sort().values.tolist() == list(range(found.order.numel()))


@settings(max_examples=60)
@given(SPECS, LENGTHS, LENGTHS, st.integers(0, 80), TILES, st.integers(1, tuning.MOST_GROUPS))
def test_far_tiles_are_saturated_and_near_tiles_inside_the_tables(spec, nq, nk, prefix, tile, groups):
    """The zones of every pair of tiles, against delta itself."""
    prefix = min(prefix, nk - 1)
    found = tables.device_tables(max(nq, nk), spec, CPU)
    covered = found.window(nq, nk - prefix)
    start = prefix // STEP * STEP
    shift = prefix - start
    left, right = tables.near_reach(found.ends, shift, tile)
    for queries in range(0, -(-nq // tile), groups):
        for keys in range(-(-(nk - start) // tile)):
            x0 = (queries - keys) * tile + shift
            distances = torch.arange(x0 - tile + 1, x0 + groups * tile)
            rows = delta(distances, spec)
            if queries - left < keys < queries + groups - 1 + right:
                first = x0 - tile + covered.offset
                assert first >= 0
                assert first + (groups + 1) * tile <= covered.rows
            elif keys < queries:
                assert bool((rows == found.high_row).all())
            else:
                assert bool((rows == found.low_row).all())


@given(SPECS, st.integers(-600, 600), TILES)
def test_a_rotated_pair_of_blocks_holds_delta_of_every_pair(spec, x0, tile):
    found = tables.device_tables(1, spec, CPU)
    first, last = found.first, found.first + found.delta.numel() - 1
    x0 = min(max(x0, first + tile), last - tile)
    r, c = torch.arange(tile)[:, None], torch.arange(tile)[None, :]
    y = (r - c) % tile
    row = torch.where(r >= c, x0 + y, x0 - tile + y)
    assert torch.equal(found.delta.long()[row - first], delta(x0 + r - c, spec))
    # What the products are selected by: in (query, y) and in (y, key), which block a row comes from.
    assert torch.equal((r >= c)[r, c], (y <= r)[r, c])
    assert torch.equal(r >= c, y + c < tile)


def test_prepared_tables_are_kept_only_where_they_are_small():
    usual = tables.device_tables(1, PositionSpec(), CPU)
    full = usual.full_window()
    assert (full.first, full.rows) == (-512 - tables.MARGIN, 506 + 512 + 2 * tables.MARGIN)
    assert tables.device_tables(1, PositionSpec(0, 30_000), CPU).full_window() is None


def test_window_is_cut_to_the_distances_that_the_lengths_reach():
    usual = tables.device_tables(1, PositionSpec(), CPU)
    assert usual.window(10, 20) == Window(-19 - tables.MARGIN, 28 + 2 * tables.MARGIN)
    assert usual.window(5000, 5000) == usual.full_window()


def write_table(folder, key, *entries):
    names = ("direction", "dtype", "head_dim", "tile", "num_warps", "num_stages")
    (folder / f"{key}.json").write_text(json.dumps({"entries": [dict(zip(names, entry)) for entry in entries]}))


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(tuning, "_shrunk", {})
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_tiles_come_from_the_table_then_its_nearest_entry_then_the_default(configs):
    write_table(configs, "sm_90", ("forward", "bfloat16", 64, 32, 8, 3), ("forward", "bfloat16", 128, 16, 8, 1))
    measured = tuning.TileConfig(32, 8, 3)
    assert tuning.config("sm_90", torch.bfloat16, 64, "forward") == measured
    assert tuning.config("sm_90", torch.bfloat16, 48, "forward") == measured
    assert tuning.config("sm_90", torch.bfloat16, 120, "forward") == tuning.TileConfig(16, 8, 1)
    default = tuning.TileConfig(64, 4, 2)
    assert tuning.config("sm_90", torch.bfloat16, 64, "backward") == default
    assert tuning.config("sm_80", torch.bfloat16, 64, "forward") == default
    assert tuning.config("sm_80", torch.bfloat16, 64, "backward") == tuning.TileConfig(32, 4, 2)
    # Exact float32 products hold their operands in registers, except in the interpreter.
    assert tuning.config("sm_80", torch.float32, 64, "forward") == tuning.TileConfig(32, 8, 1)
    assert tuning.config("sm_80", torch.float32, 128, "backward").tile == 16
    assert tuning.config("cpu", torch.float32, 64, "backward").tile == 64
    # A tile measured for smaller heads may not fit a larger one.
    assert tuning.config("sm_90", torch.bfloat16, 256, "forward").tile == 32


def test_candidates_start_with_the_default_and_stay_within_the_margin_of_the_tables():
    found = tuning.candidates("unknown", torch.float16, 64, "forward")
    assert found[0] == tuning.config("unknown", torch.float16, 64, "forward")
    assert len(set(found)) == len(found)
    assert all(c.tile <= tuning.LARGEST_TILE for c in found)


@pytest.mark.parametrize(("direction", "other"), [tuning.DIRECTIONS, tuning.DIRECTIONS[::-1]])
def test_tiles_shrink_until_nothing_is_left_and_are_remembered(configs, direction, other):
    arguments = ("sm_90", torch.bfloat16, 64, direction)
    seen, others = [tuning.config(*arguments)], tuning.config(*arguments[:3], other)
    while tuning.shrunk(*arguments, seen[-1]) is not None:
        seen.append(tuning.config(*arguments))
    assert [c.tile for c in seen] == sorted((c.tile for c in seen), reverse=True)
    assert [c.queries for c in seen] == sorted((c.queries for c in seen), reverse=True)
    assert (seen[-1].tile, seen[-1].num_stages, seen[-1].groups) == (16, 1, 1)
    assert tuning.config(*arguments[:3], other) == others


def problem(device="meta", dtype=torch.float16, head_dim=64, scale=0.1, nq=8):
    q = torch.empty(1, 2, nq, head_dim, dtype=dtype, device=device)
    return AttentionProblem(q, q, q, None, None, Masks(), PositionSpec(), scale)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float64}, "it computes float32, bfloat16 and float16, not float64"),
        ({"head_dim": 300}, "head_dim 300 is more than 256"),
        ({"scale": -1.0}, "the scale is not positive"),
        ({"device": "meta"}, "it runs on cuda tensors, not meta"),
    ],
    ids=["float64", "head_dim", "scale", "device"],
)
def test_refusals_name_the_limit(monkeypatch, arguments, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.refusal(problem(**arguments)) == reason


def test_interpreter_takes_cpu_tensors_and_refuses_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_triton_refusal", lambda: None)
    assert backend.refusal(problem("cpu")) is None
    assert backend.refusal(problem("cpu", torch.bfloat16)) == "Triton's interpreter does not compute bfloat16"
    assert "it runs on cpu tensors, not meta" in backend.refusal(problem("meta"))


def test_a_call_without_queries_compiles_nothing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "deberta_kernels.impl.triton.execute", None)  # importing it is an error
    monkeypatch.delattr(backend, "execute", raising=False)
    assert "does not import" in backend._compile_refusal(problem("cpu"))
    assert backend._compile_refusal(problem("cpu", nq=0)) is None


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "triton is not installed (pip install 'triton>=3.6')"), ("3.5.1", "triton 3.5.1 is older than 3.6"),
     ("3.6.0+git1", None), ("3.10.0", None)],
)  # fmt: skip
def test_missing_or_old_triton_is_named(monkeypatch, version, reason):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert backend._triton_refusal.__wrapped__() == reason


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "compute capability 7.5 is not one of 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"),
        ((13, 0), "compute capability 13.0 is not one of 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"),
        ((8, 0), None),
        ((12, 0), None),
    ],
)
def test_gpus_the_kernels_were_not_compiled_for_are_refused_by_their_capability(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backend._capability_refusal.__wrapped__(torch.device("cuda")) == reason
