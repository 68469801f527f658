"""The tiled path equals the reference in float64, whatever the tile shape, and holds nothing that grows with N x N."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deberta_kernels.impl import reference, torch_tiled
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem, Gradients, Masks, PositionSpec

TOLERANCE = 1e-10
FP64 = {"dtype": torch.float64, "position_buckets": 16, "max_relative_positions": 24}
NAMES = ("out", "lse", *Gradients._fields)


@pytest.fixture(autouse=True, params=["one_tile", "small_tiles"])
def tiles(request, monkeypatch):
    """Run with the real limits, and with limits that cut these short problems into many groups and tiles."""
    if request.param == "small_tiles":
        monkeypatch.setattr(torch_tiled, "_CPU_SCORES", 600)
        monkeypatch.setattr(torch_tiled, "_MIN_ROWS", 3)
    return request.param


def run(backend, problem, dout, dlse, needs=None):
    """Out, lse and all gradients by name."""
    if needs is None:
        needs = (True, True, True, problem.pos_key is not None, problem.pos_query is not None)
    out, lse = backend.forward(problem)
    return dict(zip(NAMES, (out, lse, *backend.backward(problem, dout, dlse, out, lse, needs)), strict=True))


def check(problem, dout, dlse=None):
    got, want = run(torch_tiled, problem, dout, dlse), run(reference, problem, dout, dlse)
    for name in NAMES:
        mine, its = got[name], want[name]
        assert (mine is None) == (its is None), name
        if its is None:
            continue
        assert mine.shape == its.shape, name
        assert mine.dtype == its.dtype, name
        assert torch.equal(torch.isneginf(mine), torch.isneginf(its)), name
        finite = ~torch.isneginf(its)
        error = (mine - its)[finite].abs().max() if bool(finite.any()) else torch.tensor(0.0)
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"


def dlse_of(problem):
    shape = problem.q.shape[:3]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


CASES = [
    *(Case(nq=37, heads=2, head_dim=5, mask=mask, **FP64) for mask in inputs.MASKS),
    *(Case(nq=37, head_dim=5, mask=mask, dropout_p=0.3, **FP64) for mask in ("none", "holes_tokens", "sparse")),
    *(Case(nq=29, head_dim=4, terms=terms, mask="holes", dropout_p=0.2, **FP64) for terms in inputs.TERMS),
    *(Case(nq=21, head_dim=6, layout=layout, **FP64) for layout in inputs.LAYOUTS),
    *(Case(nq=21, head_dim=6, dout=dout, mask="heads", **FP64) for dout in inputs.DOUTS),
    *(
        Case(nq=nq, nk=nk, head_dim=4, mask=mask, reachable=True, **FP64)
        for nq, nk in ((1, 1), (1, 40), (40, 1), (13, 40), (40, 13))
        for mask in ("none", "right", "sparse")
    ),
    *(
        Case(nq=nq, nk=nk, head_dim=4, prefix_length=prefix, terms=terms, mask="sparse+holes", **FP64)
        for nq, nk, prefix in ((19, 24, 5), (30, 12, 4), (7, 7, 7))
        for terms in inputs.TERMS
    ),
    Case(nq=19, nk=24, head_dim=4, prefix_length=5, dropout_p=0.3, reachable=True, **FP64),
    *(
        Case(batch=5, nq=23, head_dim=4, packed=True, dropout_p=p, terms=terms, reachable=True, **FP64)
        for p in (0.0, 0.3)
        for terms in inputs.TERMS
    ),
    *(
        Case(nq=70, head_dim=4, dtype=torch.float64, position_buckets=buckets, max_relative_positions=maximum)
        for buckets, maximum in ((-1, 9), (0, 200), (2, 4), (3, 9), (17, 8), (32, 20), (256, 512))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_reference(case):
    problem = inputs.problem(case)
    check(problem, inputs.dout(case, problem))


@pytest.mark.parametrize(
    "case",
    [Case(nq=20, mask=mask, dropout_p=p, **FP64) for mask in ("none", "right_tokens", "sparse") for p in (0, 0.3)],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("expanded", [False, True])
def test_gradient_of_lse(case, expanded):
    problem = inputs.problem(case)
    dlse = dlse_of(problem)[:1, :1, :1].expand(problem.q.shape[:3]) if expanded else dlse_of(problem)
    check(problem, inputs.dout(case, problem), dlse)


@pytest.mark.parametrize("padding", ["key", "query", "pair"])
def test_rows_with_nothing_allowed(padding):
    case = Case(nq=18, batch=3, **FP64)
    problem = inputs.problem(case)
    keep = {"key": (3, 18), "query": (3, 18), "pair": (3, 1, 18, 18)}[padding]
    mask = torch.ones(keep, dtype=torch.bool)
    mask[1] = False
    problem = replace(problem, masks=Masks(**{padding: mask}))
    check(problem, inputs.dout(case, problem), dlse_of(problem))
    out, lse = torch_tiled.forward(problem)
    mean = problem.v[1].mean(1, keepdim=True).expand(out[1].shape)
    assert (out[1] - mean).abs().max() <= TOLERANCE
    assert bool(torch.isneginf(lse[1]).all())


def test_infinite_gradient_of_an_infinite_lse_does_not_spread():
    case = Case(nq=12, batch=2, mask="right_tokens", **FP64)
    problem = inputs.problem(case)
    _, lse = torch_tiled.forward(problem)
    dlse = torch.where(torch.isneginf(lse), float("nan"), dlse_of(problem))
    got = run(torch_tiled, problem, inputs.dout(case, problem), dlse)
    want = run(torch_tiled, problem, inputs.dout(case, problem), dlse.nan_to_num(0.0))
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


@pytest.mark.parametrize("mask", ["holes", "holes_tokens"])
def test_nan_in_padding_stays_in_padding(mask):
    case = Case(nq=19, mask=mask, **FP64)
    problem = inputs.problem(case)
    padding = ~problem.masks.key[:, None, :, None]
    names = ("k", "v") if problem.masks.query is None else ("q", "k", "v")
    dirty = replace(problem, **{name: getattr(problem, name).masked_fill(padding, float("nan")) for name in names})
    valid = ~padding if problem.masks.query is not None else torch.ones_like(padding)
    dout = torch.where(valid, inputs.dout(case, problem), 0.0)
    got, want = run(torch_tiled, dirty, dout, None), run(torch_tiled, problem, dout, None)
    rows = valid.expand(problem.q.shape)
    assert torch.equal(got["out"][rows], want["out"][rows])
    assert all(torch.equal(got[name], want[name]) for name in NAMES[1:])


def test_only_what_is_needed_is_returned():
    case = Case(nq=11, mask="right", **FP64)
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    full = run(torch_tiled, problem, dout, None)
    for bits in range(32):
        needs = tuple(bool(bits >> place & 1) for place in range(5))
        got = run(torch_tiled, problem, dout, None, needs)
        for name, needed in zip(Gradients._fields, needs, strict=True):
            assert (got[name] is not None) == needed
            assert not needed or torch.equal(got[name], full[name])


def test_rows_that_no_distance_reaches_get_zero_gradient():
    case = Case(nq=5, **FP64)
    problem = inputs.problem(case)
    got = run(torch_tiled, problem, inputs.dout(case, problem), None)
    for table in (got["dpos_key"], got["dpos_query"]):
        used = table.abs().sum((0, 2)) != 0
        assert used.nonzero().flatten().tolist() == list(range(12, 21))


@pytest.mark.parametrize(("batch", "nq"), [(0, 5), (2, 0)])
def test_empty_problems(batch, nq):
    tensors = [torch.ones(batch, 3, n, 4) for n in (nq, 5, 5)]
    table = torch.ones(3, 8, 4)
    problem = AttentionProblem(*tensors, table, table, Masks(), PositionSpec(4, 6), 1.0, max_seqlen=5)
    got = run(torch_tiled, problem, torch.ones(batch, 3, nq, 4), None)
    assert got["out"].shape == (batch, 3, nq, 4)
    assert got["lse"].shape == (batch, 3, nq)
    for name, like in zip(Gradients._fields, (*tensors, table, table), strict=True):
        assert torch.equal(got[name], torch.zeros_like(like)), name


def test_packed_sequences_may_be_empty():
    case = Case(batch=1, nq=12, **FP64)
    problem = replace(inputs.problem(case), cu_seqlens=torch.tensor([0, 0, 5, 5, 12], dtype=torch.int32))
    check(problem, inputs.dout(case, problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_dtypes_and_layouts_of_the_results(dtype, packed):
    case = Case(nq=20, head_dim=8, dtype=dtype, packed=packed)
    problem = inputs.problem(case)
    got = run(torch_tiled, problem, inputs.dout(case, problem), None)
    assert got["lse"].dtype == torch.float32
    assert got["lse"].is_contiguous()
    for name in ("out", "dq", "dk", "dv"):
        assert got[name].dtype == dtype
        assert got[name].transpose(1, 2).is_contiguous()
    for name in ("dpos_key", "dpos_query"):
        assert got[name].dtype == dtype
        assert got[name].is_contiguous()


def test_autocast_and_default_dtype_change_nothing():
    case = Case(nq=20, head_dim=8, mask="right_tokens", dropout_p=0.2)
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    want = run(torch_tiled, problem, dout, None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            got = run(torch_tiled, problem, dout, None)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_dropout_without_a_seed_is_refused():
    problem = replace(inputs.problem(Case(nq=4, dropout_p=0.5, **FP64)), seed=None)
    with pytest.raises(ValueError, match="seed must be given when dropout_p is not 0"):
        torch_tiled.forward(problem)


def test_nothing_is_refused():
    assert torch_tiled.refusal(inputs.problem(Case(nq=4))) is None


class Largest(TorchDispatchMode):
    """A mode that records the elements of the largest storage any operation returned, views of anything included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


def largest_of(backend, length, **settings):
    case = Case(batch=1, heads=1, nq=length, head_dim=2, position_buckets=16, max_relative_positions=24, **settings)
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    with Largest() as seen:
        run(backend, problem, dout, None)
    return seen.elements


@pytest.mark.parametrize(
    "settings", [{}, {"mask": "right_tokens"}, {"dropout_p": 0.2, "mask": "right"}, {"terms": "none"}], ids=str
)
def test_the_largest_tensor_grows_with_n_and_not_with_n_squared(monkeypatch, settings):
    monkeypatch.setattr(torch_tiled, "_CPU_SCORES", 1 << 12)
    monkeypatch.setattr(torch_tiled, "_MIN_ROWS", 16)
    short, long = (largest_of(torch_tiled, length, **settings) for length in (512, 2048))
    assert long <= 4.1 * short
    assert long <= 64 * 2048
    assert largest_of(reference, 512, **settings) >= 512 * 512, "the probe sees what a dense backend allocates"


def test_the_largest_tensor_stays_within_the_budget_of_scores(monkeypatch):
    monkeypatch.setattr(torch_tiled, "_CPU_SCORES", 1 << 18)
    monkeypatch.setattr(torch_tiled, "_MIN_ROWS", 16)
    case = Case(batch=4, heads=4, nq=300, head_dim=8, mask="right_tokens", dropout_p=0.1)
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    with Largest() as seen:
        run(torch_tiled, problem, dout, None)
    # Dropout draws for whole words of eight keys.
    assert seen.elements <= torch_tiled._CPU_SCORES * 1.05
