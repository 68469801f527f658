"""The host's side of the CUDA backward, without a GPU: arguments, buffers, the fold of table gradients, refusals."""

import ctypes
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deberta_kernels.impl import common, cuda, gpu_tables
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.impl.cuda import arguments, backward_arguments, driver, modules
from deberta_kernels.impl.cuda.backward_arguments import BackwardArguments, BackwardParams, plan
from deberta_kernels.testing import budget, inputs
from deberta_kernels.testing.inputs import Case
from tests.unit import cuda_contract
from tests.unit.cuda_contract import INFO

BF16, FP16 = torch.bfloat16, torch.float16
ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
# Saturated from distance 64 on: tiles of all zones within 400 tokens.
SHORT = {"position_buckets": 16, "max_relative_positions": 64}
ALL = (True,) * 5
STREAM = 77


@pytest.fixture
def module(monkeypatch):
    """Put the contract in the place of the compiled kernels."""
    found = cuda_contract.Module(BF16)

    def load(which, x):
        assert which == "backward"
        found.dtype = x.dtype
        return cuda._Loaded(found, INFO)

    class Driver:
        encode = staticmethod(cuda_contract.encode)

    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(cuda, "_stream", lambda device: STREAM)
    monkeypatch.setattr(driver, "driver", Driver)
    return found


@contextmanager
def deterministically(enabled=True):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def drawn(case, with_dlse=False):
    """Return a problem with what a backward gets, and its truth."""
    problem = inputs.problem(case)
    dlse = torch.randn(problem.q.shape[:3], generator=torch.Generator().manual_seed(3)) if with_dlse else None
    truth = budget.truth(problem, inputs.dout(case, problem), dlse)
    out, lse = (truth.oracle[name].to(dtype) for name, dtype in (("out", case.dtype), ("lse", torch.float32)))
    return problem, truth, out, lse


# Run deterministically as well: far zones, several blocks of keys, packed sequences.
BOTH = [
    Case(batch=2, heads=1, nq=330, dtype=BF16, **SHORT),
    Case(batch=3, heads=1, nq=390, dtype=FP16, packed=True, dropout_p=0.2, **SHORT),
]
CASES = [
    *(Case(batch=2, heads=2, nq=n, dtype=dtype) for n, dtype in ((1, BF16), (64, FP16), (65, BF16), (130, FP16))),
    *BOTH,
    Case(batch=1, heads=1, nq=300, dtype=BF16, position_buckets=0, max_relative_positions=40),
    Case(batch=1, heads=2, nq=40, nk=330, dtype=BF16, **SHORT),
    Case(batch=1, heads=2, nq=330, nk=40, dtype=FP16, **SHORT),
    *(Case(batch=2, heads=2, nq=70, dtype=BF16, terms=terms) for terms in ("c2p", "p2c", "none")),
    *(Case(batch=3, heads=2, nq=70, dtype=BF16, mask=mask) for mask in inputs.MASKS if mask != "none"),
    Case(batch=2, heads=1, nq=300, dtype=FP16, mask="right_tokens", **SHORT),
    *(Case(batch=2, heads=1, nq=90, nk=90 + prefix, prefix_length=prefix, dtype=BF16) for prefix in (1, 16, 70, 130)),
    Case(batch=1, heads=1, nq=20, nk=149, prefix_length=21, dtype=BF16),  # a block more for where the blocks begin
    Case(batch=2, heads=1, nq=350, nk=371, prefix_length=21, mask="holes", dtype=FP16, **SHORT),
    Case(batch=4, heads=2, nq=150, dtype=BF16, packed=True),
    Case(batch=2, heads=2, nq=100, dtype=BF16, dropout_p=0.3, mask="sparse"),
    Case(batch=1, heads=2, nq=50, dtype=BF16, reachable=True),
    *(Case(batch=2, heads=2, nq=70, dtype=BF16, layout=layout) for layout in inputs.LAYOUTS),
    *(Case(batch=2, heads=2, nq=70, dtype=FP16, dout=dout) for dout in inputs.DOUTS if dout != "randn"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_are_within_the_budget(module, case):
    problem, truth, out, lse = drawn(case, with_dlse=case.mask == "none")
    for deterministic in (False, True) if case in BOTH else (False,):
        with deterministically(deterministic):
            found = cuda.backward(problem, truth.dout, truth.dlse, out, lse, ALL)
        results = {name: x for name, x in found._asdict().items() if x is not None}
        report = budget.measure({"out": out, "lse": lse, **results}, truth, case.id)
        assert report.ok, str(report)


def test_far_tiles_and_blocks_that_share_a_head_are_among_the_cases():
    plans = [plan(inputs.problem(case), INFO, False) for case in CASES]
    assert sum(found.is_far for found in plans) >= 6
    assert sum(found.groups > 1 for found in plans) >= 6


def test_a_launch_names_kernel_grid_and_stream(module):
    problem, truth, out, lse = drawn(Case(batch=2, heads=3, nq=200, dtype=FP16, mask="blocks", dropout_p=0.2))
    cuda.backward(problem, truth.dout, None, out, lse, ALL)
    kernel, conversion = "disentangled_backward_fp16_d64_pair_dropout", "disentangled_backward_dq_fp16_d64"
    assert module.launched == [(kernel, 2 * 3 * 2, STREAM), (conversion, 2 * 3 * 4, STREAM)]
    module.launched.clear()
    with deterministically():
        cuda.backward(problem, truth.dout, None, out, lse, ALL)
    assert module.launched == [(kernel, 2 * 3, STREAM), (conversion, 2 * 3 * 4, STREAM)]


@pytest.mark.parametrize("only", range(5), ids=["dq", "dk", "dv", "dpos_key", "dpos_query"])
def test_gradients_that_nobody_needs_are_none(module, only):
    problem, truth, out, lse = drawn(Case(batch=1, heads=2, nq=70, dtype=BF16))
    every = cuda.backward(problem, truth.dout, None, out, lse, ALL)
    module.launched.clear()
    found = cuda.backward(problem, truth.dout, None, out, lse, tuple(i == only for i in range(5)))
    assert [x is not None for x in found] == [i == only for i in range(5)]
    assert torch.equal(found[only], every[only])
    assert len(module.launched) == (2 if only == 0 else 1)  # dq alone has a kernel that can be left out


def test_gradients_have_the_layout_of_their_inputs(module):
    problem, truth, out, lse = drawn(Case(batch=2, heads=2, nq=40, nk=60, dtype=BF16))
    found = cuda.backward(problem, truth.dout, None, out, lse, ALL)
    for x, given in zip(found, (problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query), strict=True):
        assert x.shape == given.shape
        assert x.dtype == given.dtype
    assert all(x.transpose(1, 2).is_contiguous() for x in found[:3])


def test_tables_without_a_key_that_has_a_position_get_zeros(module):
    case = Case(batch=1, heads=2, nq=30, nk=20, prefix_length=20, dtype=BF16)
    problem, truth, out, lse = drawn(case)
    found = cuda.backward(problem, truth.dout, None, out, lse, ALL)
    assert not found.dpos_key.any()
    assert not found.dpos_query.any()
    report = budget.measure({"out": out, "lse": lse, **found._asdict()}, truth, case.id)
    assert report.ok, str(report)


def test_inputs_are_left_alone(module):
    problem, truth, out, lse = drawn(Case(batch=2, heads=2, nq=70, dtype=BF16, mask="holes_tokens"), with_dlse=True)
    given = [problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query, truth.dout, truth.dlse, out, lse]
    before = [x.clone() for x in given]
    cuda.backward(problem, truth.dout, truth.dlse, out, lse, ALL)
    assert all(torch.equal(x, kept) for x, kept in zip(given, before, strict=True))


# ---- Sizes


def filled(case, deterministic=False):
    problem, truth, out, lse = drawn(case)
    return BackwardArguments(
        problem, truth.dout, None, out, lse, INFO, cuda_contract.encode, deterministic=deterministic
    )


def test_sums_are_as_large_as_the_kernel_expects():
    found = filled(Case(batch=3, heads=2, nq=330, dtype=BF16, **SHORT))
    p, rows = found.params, found.params.table_rows
    assert (p.row_tiles, p.key_blocks, p.groups) == (6, 3, 3)
    assert found._dtables.shape == (1, 1, 2, 2, rows // 64, 64 * 64)
    assert found._far_sums.shape == (2, 2, 2, 3 * 3 * 2, 64)
    assert (p.dtables_stride_b, p.dtables_stride_consumer) == (0, 0)
    sizes = {x.data_ptr(): x.numel() for x, writable in found.memory if writable}
    assert sizes[p.dq_sums] == 3 * 6 * 2 * 64 * 64


def test_a_deterministic_launch_keeps_the_sums_of_samples_and_consumers_apart():
    found = filled(Case(batch=3, heads=2, nq=330, dtype=BF16, **SHORT), deterministic=True)
    p, one = found.params, 2 * 2 * found.params.table_rows * 64
    assert p.groups == 1
    assert (p.dtables_stride_b, p.dtables_stride_consumer) == (2 * one, one)
    assert found._dtables.numel() == 3 * 2 * one == found.plan.table_bytes(64) // 4


def test_packed_sequences_have_tiles_of_their_own_and_tables_of_the_longest():
    case = Case(batch=5, heads=1, nq=100, dtype=BF16, packed=True)
    found = filled(case)
    p, tokens = found.params, found.problem.q.shape[2]
    sizes = {x.data_ptr(): x.numel() for x, writable in found.memory if writable}
    assert sizes[p.dq_sums] == (tokens // 64 + 5) * 64 * 64
    one = replace(found.problem, cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32), max_seqlen=tokens)
    assert p.table_rows < plan(one, INFO, False).table_rows


@pytest.mark.parametrize("nq", [1, 100, 512, 1500])
@pytest.mark.parametrize("prefix", [0, 5, 16, 130])
def test_near_tiles_cover_whole_blocks_of_a_table(nq, prefix):
    """The distance of a tile's first pair, j - i, is a multiple of 64 less what keys begin before the prefix ends."""
    problem = inputs.problem(Case(batch=1, heads=1, nq=nq, nk=nq + prefix, prefix_length=prefix, dtype=BF16))
    found = plan(problem, INFO, False)
    assert found.table_rows % 64 == 0
    assert (found.first + prefix % 16) % 64 == 0
    assert found.first <= max(1 - nq, -found.ends[1]) - INFO.table_margin
    assert found.first + found.table_rows > min(nq - 1, -found.ends[0]) + INFO.table_margin


@pytest.mark.parametrize(("nq", "is_far"), [(512, False), (1024, True)])
def test_what_only_far_tiles_read_is_made_for_them_alone(nq, is_far):
    found = filled(Case(batch=1, heads=1, nq=nq, dtype=BF16))
    p = found.params
    assert [bool(x) for x in (p.far_constants, p.far_sums, p.q_far.opaque[0])] == [is_far] * 3


# ---- The struct


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")
@pytest.mark.parametrize(
    "layout",
    [arguments.ForwardParams, arguments.ForwardInfo, BackwardParams, backward_arguments.BackwardInfo],
    ids=lambda layout: layout.__name__,
)
def test_structs_are_packed_as_the_compiler_packs_them(tmp_path, layout):
    names = [name for name, _ in layout._fields_]
    lines = [f'  std::printf("%zu %zu\\n", offsetof(S, {n}), sizeof(S::{n}));' for n in names]
    program = ["#include <cstddef>", "#include <cstdio>", '#include "params.h"', f"using S = dk::{layout.__name__};"]
    (tmp_path / "main.cpp").write_text("\n".join([*program, "int main() {", *lines, "}"]))
    command = [COMPILER, "-std=c++17", f"-I{ROOT / 'csrc' / 'cuda'}", "-o", str(tmp_path / "main")]
    subprocess.run([*command, str(tmp_path / "main.cpp")], check=True)
    text = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True).stdout
    said = [tuple(map(int, line.split())) for line in text.splitlines()]
    assert said == [(getattr(layout, name).offset, getattr(layout, name).size) for name in names]


def test_sizes_and_names_are_those_of_the_sources():
    text = {name: (ROOT / "csrc" / "cuda" / name).read_text() for name in ("schedule.h", "layout.h", "names.h")}
    assert f"constexpr int kPrefixStep = {gpu_tables.PREFIX_STEP};" in text["schedule.h"]
    assert f"constexpr int kTile = {backward_arguments._TILE};" in text["layout.h"]
    assert f"constexpr int kWarpgroup = {backward_arguments.CONVERSION_THREADS};" in text["layout.h"]
    assert re.findall(r"using (\w+) = dk::", text["names.h"]) == list(modules.DTYPES)


def test_every_number_of_a_problem_is_in_the_struct():
    found = filled(
        Case(batch=2, heads=3, nq=70, nk=91, prefix_length=21, dtype=BF16, mask="sparse+holes", dropout_p=0.2)
    )
    p, problem = found.params, found.problem
    assert ctypes.addressof(p) % arguments.ALIGNMENT == 0
    assert (p.batch, p.heads, p.nq, p.nk, p.prefix) == (2, 3, 70, 91, 21)
    assert (p.low_end, p.high_start) == found.plan.ends
    assert (p.scale, p.qk_scale) == (problem.scale, problem.scale * common.LOG2E)
    assert (p.dropout_threshold, p.keep_scale) == (13107, 65536 / (65536 - 13107))
    assert p.seed == problem.seed.data_ptr()
    assert (p.k, p.v) == (problem.k.data_ptr(), problem.v.data_ptr())
    assert (p.pair_mask, p.pair_mask_stride_h) == (problem.masks.pair.data_ptr(), 0)
    assert p.cu_seqlens == 0


# ---- Refusals


def test_the_backward_names_what_it_does_not_compute(module):
    assert cuda.backward_refusal(inputs.problem(Case(batch=1, heads=1, nq=20, dtype=BF16))) is None
    wide = inputs.problem(Case(batch=1, heads=1, nq=20, head_dim=128, dtype=BF16))
    assert cuda.backward_refusal(wide) == "head_dim 128 is not 64"


def test_a_deterministic_backward_with_too_large_sums_is_refused(module):
    q = torch.empty(1, 12, 1, 64, dtype=BF16).expand(400, 12, 512, 64)
    small = inputs.problem(Case(batch=1, heads=12, nq=1, dtype=BF16))
    call = replace(small, q=q, k=q, v=q, max_seqlen=512)
    assert cuda.backward_refusal(call) is None
    with deterministically():
        reason = cuda.backward_refusal(call)
        assert cuda.backward_refusal(replace(call, pos_key=None, pos_query=None)) is None
        assert cuda.backward_refusal(small) is None
    size = plan(call, INFO, True).table_bytes(64) >> 20
    assert reason == f"the sums of its deterministic backward would take {size} MiB, more than 1024"


def test_without_a_driver_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(driver, "_opened", lambda: (None, "the NVIDIA driver is not there"))
    monkeypatch.setattr(cuda, "_loaded", Attempts())
    monkeypatch.setattr(cuda, "_ordinal", lambda device: 0)
    problem, truth, out, lse = drawn(Case(batch=1, heads=1, nq=20, dtype=BF16))
    assert cuda.backward_refusal(problem) == "the NVIDIA driver is not there"
    with pytest.raises(RuntimeError, match=r"^the CUDA kernels cannot be loaded: the NVIDIA driver is not there$"):
        cuda.backward(problem, truth.dout, None, out, lse, ALL)
