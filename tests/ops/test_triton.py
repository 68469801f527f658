"""What only the Triton kernels have: gathers along diagonals, zones, tile lists, tile sizes, variants, memory.

In Triton's interpreter, which runs the source: what holds here holds for AMD, whose machine code is executed nowhere,
and for tile sizes of no table. What NVIDIA's machine code computes, tests/ptx/kernels and the operator tests tell.
"""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch

from deberta_kernels import dispatch, dropout, env, notices
from deberta_kernels.impl import torch_tiled
from deberta_kernels.impl import triton as backend
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.position import delta
from deberta_kernels.testing import backends, budget, inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec
from tests import needs

if not env.triton_interpreted():
    pytest.skip("TRITON_INTERPRET is not set (make test-triton)", allow_module_level=True)
triton = needs.package("triton")
tl = triton.language

from deberta_kernels.impl.triton import execute, launch, tables, tuning
from deberta_kernels.impl.triton.kernels import primitives, tile_list

TARGET = next(t for t in backends.TARGETS if t.name == "triton_interpreted")
CPU = torch.device("cpu")
KEY = "sm_90"


@triton.jit
def rotate_kernel(x_ptr, index_ptr, rows_ptr, columns_ptr, TILE: tl.constexpr):
    offs = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x, index = tl.load(x_ptr + offs), tl.load(index_ptr + offs)
    tl.store(rows_ptr + offs, primitives.along_rows(x, index, TILE))
    tl.store(columns_ptr + offs, primitives.along_columns(x, index, TILE))


@triton.jit
def indices_kernel(difference_ptr, total_ptr, TILE: tl.constexpr):
    offs = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(difference_ptr + offs, primitives.difference(TILE))
    tl.store(total_ptr + offs, primitives.total(TILE))


@triton.jit
def kept_kernel(seed_ptr, kept_ptr, batch_head, i0, j0, threshold, KEYS_FIRST: tl.constexpr, TILE: tl.constexpr):
    offs = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    keep = primitives.kept(seed_ptr, batch_head, i0, j0, threshold, KEYS_FIRST, TILE)
    tl.store(kept_ptr + offs, keep.to(tl.int32))


@triton.jit
def reach_kernel(out_ptr, shift, low_end, high_start, TILE: tl.constexpr):
    left, right = primitives.near_reach(shift, low_end, high_start, TILE)
    tl.store(out_ptr, left)
    tl.store(out_ptr + 1, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_gathers_through_staged_tiles_pick_the_right_elements(tile, dtype):
    x = torch.randn(tile, tile).to(dtype)
    index = torch.randint(tile, (tile, tile), dtype=torch.int32)
    rows, columns = torch.empty_like(x), torch.empty_like(x)
    rotate_kernel[(1,)](x, index, rows, columns, TILE=tile)
    assert torch.equal(rows, x.gather(1, index.long()))
    assert torch.equal(columns, x.gather(0, index.long()))


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_factored_indices_are_differences_and_sums(tile):
    found = torch.empty(2, tile, tile, dtype=torch.int32)
    indices_kernel[(1,)](found[0], found[1], TILE=tile)
    r, c = torch.arange(tile)[:, None], torch.arange(tile)[None, :]
    assert torch.equal(found[0].long(), (r - c) % tile)
    assert torch.equal(found[1].long(), (r + c) % tile)


@pytest.mark.parametrize("keys_first", [False, True])
def test_dropout_bits_are_those_of_the_contract(keys_first):
    seed, p, tile, i0, j0, batch_head = torch.tensor([1 << 61 | 12345]), 0.3, 32, 70, 48, 7
    found = torch.empty(tile, tile, dtype=torch.int32)
    kept_kernel[(1,)](
        seed, found, batch_head, i0, j0, dropout.threshold(p), KEYS_FIRST=keys_first, TILE=tile
    )  # fmt: skip
    rows, columns = range(i0, i0 + tile), range(j0, j0 + tile)
    expected = dropout.keep_mask(seed, p, range(batch_head, batch_head + 1), rows, columns)[0]
    assert torch.equal(found.bool(), expected.T if keys_first else expected)


def test_kernels_and_planner_agree_where_the_near_zone_ends():
    for pair, tile in itertools.product(((256, 512), (3, 9), (0, 1), (16, 5)), (16, 64)):
        known = tables.device_tables(1, PositionSpec(*pair), CPU)
        for shift in (0, 5, 15):
            found = torch.empty(2, dtype=torch.int32)
            reach_kernel[(1,)](found, shift, *known.ends, TILE=tile)
            assert tuple(found.tolist()) == tables.near_reach(known.ends, shift, tile)


def test_expanded_tables_hold_the_row_of_every_distance():
    spec = PositionSpec(16, 64)
    pos_key = torch.randn(2, 32, 24)
    expanded = backend.prepare(pos_key, None, spec)
    known = tables.device_tables(1, spec, CPU)
    distances = torch.arange(known.first, known.first + known.delta.numel())
    assert torch.equal(expanded[0, :, :, :24], pos_key[:, delta(distances, spec)])
    assert not expanded[0, :, :, 24:].any()
    assert not expanded[1].any()


@pytest.mark.parametrize("prefix", [0, 21])
def test_tile_lists_name_empty_full_and_partial_tiles(prefix):
    tile, length = 16, 150
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, 40:90] = False
    mask[1] = False
    mask[2, :3] = False
    start, tiles = prefix // 16 * 16, []
    tiles += [range(j, min(j + tile, prefix)) for j in range(0, prefix, tile)]
    tiles += [range(max(j, prefix), min(j + tile, length)) for j in range(start, length, tile)]
    size = len(tiles) + 1
    found = torch.zeros(3, tile_list.ROWS.value, size, dtype=torch.int32)
    list_tiles = tile_list._disentangled_tile_list_kernel[(3,)]
    list_tiles(mask.view(torch.uint8), found, length, length, prefix, size, 0, TILE=tile)
    for b in range(3):
        counts = [int(mask[b, list(tokens)].sum()) for tokens in tiles]
        assert found[b, 6, :-1].tolist() == counts
        kinds = {0: [c > 0 for c in counts], 2: [c == tile for c in counts], 4: [0 < c < tile for c in counts]}
        for row, flags in kinds.items():
            assert found[b, row].tolist() == [0, *itertools.accumulate(flags)]
            listed = [n for n, flag in enumerate(flags) if flag]
            assert found[b, row + 1, : len(listed)].tolist() == listed


LONG = (
    Case(batch=1, heads=1, nq=60, nk=1180, head_dim=16, mask="holes"),
    Case(batch=1, heads=1, nq=1130, nk=64, head_dim=16, dtype=torch.float16, dropout_p=0.1),
    Case(batch=1, heads=1, nq=50, nk=1200, head_dim=16, prefix_length=21, terms="p2c"),
    Case(batch=2, heads=1, nq=40, nk=300, head_dim=16, position_buckets=8, max_relative_positions=20, mask="sparse"),
    Case(batch=1, heads=1, nq=1150, nk=60, head_dim=16, prefix_length=3, reachable=True),
    Case(batch=1, heads=1, nq=70, nk=1110, head_dim=16, dtype=torch.float16, mask="left"),
    Case(batch=3, heads=1, nq=330, head_dim=16, dtype=torch.float16, packed=True, position_buckets=8,
         max_relative_positions=20),
)  # fmt: skip


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
def test_all_zones_stay_within_the_budget(case):
    problem = inputs.problem(case)
    torch.manual_seed(case.seed)
    budget.check(TARGET.run, problem, inputs.dout(case, problem), label=case.id)


@pytest.mark.parametrize("tile", [16, 32])
def test_every_tile_size_stays_within_the_budget(monkeypatch, tile):
    monkeypatch.setattr(tuning, "config", lambda *_: tuning.TileConfig(tile, 4, 1))
    case = Case(batch=1, heads=1, nq=3 * tile + 5, head_dim=16, mask="right", position_buckets=8,
                max_relative_positions=20)  # fmt: skip
    problem = inputs.problem(case)
    budget.check(TARGET.run, problem, inputs.dout(case, problem), label=case.id)


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_float32_products_are_as_exact_as_those_of_torch(monkeypatch, setting):
    seen, matmul = set(), torch.backends.cuda.matmul
    monkeypatch.setattr(launch, "run", lambda step: seen.add(step.constants.get("PRECISION", setting)))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        backend.forward(inputs.problem(Case(batch=1, heads=1, nq=8, head_dim=16)))
    finally:
        matmul.fp32_precision = before
    assert seen == {setting}


@pytest.mark.parametrize("terms", ["c2p+p2c", "c2p"])
def test_prepared_tables_give_the_same_bits(terms):
    case = Case(batch=1, heads=2, nq=70, head_dim=20, terms=terms)
    problem = inputs.problem(case)
    prepared = backend.prepare(problem.pos_key, problem.pos_query, problem.position)
    dout = inputs.dout(case, problem)
    expected = budget.evaluate(TARGET.run, problem, dout)
    found = budget.evaluate(TARGET.run, replace(problem, prepared=prepared), dout)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_tables_prepared_for_others_are_refused():
    problem = inputs.problem(Case(batch=1, heads=2, nq=8, head_dim=16))
    with pytest.raises(
        ValueError, match=r"prepared must be what prepare returned for these tables, got shape \(1, 2\)"
    ):
        backend.forward(replace(problem, prepared=torch.zeros(1, 2)))


def features():
    """Every combination of what a call can have."""
    names = ("terms", "mask", "dropout_p", "prefix_length", "packed")
    options = (
        inputs.TERMS,
        ("none", "right", "right_tokens", "sparse", "sparse+holes"),
        (0.0, 0.1),
        (0, 5),
        (False, True),
    )
    for values in itertools.product(*options):
        chosen = dict(zip(names, values))
        if chosen["packed"] and (chosen["prefix_length"] or chosen["mask"] != "none"):
            continue
        yield chosen


def test_eight_variants_of_a_kernel_serve_every_call_of_a_head_size():
    seen = {}
    for chosen, lengths in itertools.product(features(), ({"nq": 5}, {"nq": 70, "layout": "heads_first"})):
        problem = inputs.problem(Case(batch=2, heads=2, head_dim=16, **chosen, **lengths))
        plan = launch.forward_launches(problem, KEY)
        out, lse = plan.results
        backward = launch.backward_launches(problem, out, None, out, lse, (True,) * 5, KEY)
        for step in (*plan.launches, *backward.launches):
            name = step.kernel.fn.__name__
            constants = {k: v for k, v in step.constants.items() if k != "TILE" or "expand" not in name}
            seen.setdefault(name, set()).add(tuple(sorted(constants.items())))
    assert {name: len(variants) for name, variants in seen.items() if len(variants) > 8} == {}
    assert len(seen["_disentangled_fwd_kernel"]) == 8
    assert len(seen["_disentangled_bwd_dq_kernel"]) == 8


def scratch_bytes(steps, known):
    """Bytes of the tensors that launches use beside inputs and outputs."""
    found = {}
    for step in steps:
        for value in step.arguments.values():
            if isinstance(value, torch.Tensor) and not any(value is x for x in known):
                base = value if value._base is None else value._base
                if not any(base is x for x in known):
                    found[id(base)] = base.numel() * base.element_size()
    return sum(found.values())


def test_memory_stays_far_below_what_scores_or_gathered_tables_would_take():
    batch, heads, length, head_dim = 2, 12, 8192, 64

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = (empty(batch, length, heads, head_dim).transpose(1, 2) for _ in range(3))
    table = empty(heads, 512, head_dim)
    mask = empty(batch, length, dtype=torch.bool)
    problem = AttentionProblem(
        q, k, v, table, table, Masks(mask, mask), PositionSpec(), 0.1, max_seqlen=length
    )  # fmt: skip
    plan = launch.forward_launches(problem, KEY)
    out, lse = plan.results
    known = [x if x._base is None else x._base for x in (q, k, v, out, table, mask)]
    assert scratch_bytes(plan.launches, known) <= 8e6
    backward = launch.backward_launches(problem, out, None, out, lse, (True,) * 5, KEY)
    known += [x if x._base is None else x._base for x in (*backward.results, lse)]
    assert scratch_bytes(backward.launches, known) <= 45e6


def test_tiles_shrink_where_the_device_lacks_shared_memory(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(tuning, "_shrunk", {})
    case = Case(batch=1, heads=1, nq=70, head_dim=16)
    problem = inputs.problem(case)
    tried = []

    def run(step, original=launch.run):
        tried.append(step.constants["TILE"])
        if "HAS_BIAS" in step.constants and step.constants["TILE"] > 32:
            raise OutOfResources(200_000, 100_000, "shared memory")
        original(step)

    monkeypatch.setattr(launch, "run", run)
    out, _ = backend.forward(problem)
    torch.testing.assert_close(out, torch_tiled.forward(problem)[0], rtol=0, atol=1e-5)
    assert tried[-1] == 32
    tried.clear()
    backend.forward(problem)
    assert 64 not in tried[1:]


def test_device_without_room_for_the_smallest_tiles_is_an_error(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def run(step):
        raise OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(tuning, "_shrunk", {})
    monkeypatch.setattr(launch, "run", run)
    problem = inputs.problem(Case(batch=1, heads=1, nq=8, head_dim=16))
    with pytest.raises(RuntimeError, match=r"does not fit this device even with its smallest tiles .*backend='torch'"):
        backend.forward(problem)


def test_what_does_not_compile_is_a_refusal_found_out_once(monkeypatch):
    calls = []

    def build(step):
        calls.append(step)
        raise RuntimeError("first line\nptxas died")

    monkeypatch.setattr(launch, "build", build)
    monkeypatch.setattr(execute, "_compiled", Attempts())
    problem = inputs.problem(Case(batch=1, heads=1, nq=8, head_dim=16))
    for _ in range(2):
        reason = execute.compile_refusal(problem)
        assert reason == "its kernels do not compile for cpu (RuntimeError: ptxas died)"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (32, None),
        (8, "the forward kernel for head_dim 16 in torch.float32 does not fit this device even with its smallest"),
    ],
)
def test_memory_for_the_tiles_is_looked_at_when_the_backend_is_chosen(monkeypatch, largest, expected):
    from triton.runtime.errors import OutOfResources

    def build(step):
        if "HAS_BIAS" in step.constants and step.constants["TILE"] > largest:
            raise OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(tuning, "_shrunk", {})
    monkeypatch.setattr(launch, "build", build)
    monkeypatch.setattr(execute, "_compiled", Attempts())
    reason = execute.compile_refusal(inputs.problem(Case(batch=1, heads=1, nq=8, head_dim=16)))
    if expected is None:
        assert reason is None
        assert tuning.config("cpu", torch.float32, 16, "forward").tile == largest
    else:
        assert reason.startswith(expected)


def test_failed_compilation_is_one_warning_and_the_next_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "order", lambda device_type: ("triton", "torch"))
    monkeypatch.setattr(
        backend, "_compile_refusal", lambda problem: "its kernels do not compile for sm_90 (ptxas died)"
    )
    monkeypatch.setattr(notices, "_warned", set())
    problem = inputs.problem(Case(batch=1, heads=1, nq=8, head_dim=16))
    with pytest.warns(dispatch.DebertaKernelsWarning, match=r"runs backend 'torch'.*do not compile for sm_90"):
        assert dispatch.choose(problem) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(problem) == "torch"
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run this call: its kernels do not compile"):
        dispatch.choose(problem, "triton")


def test_one_term_that_nobody_needs_is_not_computed():
    problem = inputs.problem(Case(batch=1, heads=1, nq=8, head_dim=16))
    out, lse = launch.forward_launches(problem, KEY).results
    plan = launch.backward_launches(problem, out, None, out, lse, (True, True, True, False, False), KEY)
    names = [step.kernel.fn.__name__ for step in plan.launches]
    assert "_disentangled_bwd_position_kernel" not in names
    assert "_disentangled_fold_kernel" not in names
    assert not any(step.constants.get("FUSED") for step in plan.launches)
    assert plan.results[3:] == (None, None)
