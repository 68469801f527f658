"""The operators: opcheck, both routes to a backend, what is computed, counted and refused."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import deberta_kernels as dk
from deberta_kernels import dispatch, ops
from deberta_kernels.dropout import draw_seed
from deberta_kernels.impl import torch_tiled
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec
from tests import needs

pytestmark = pytest.mark.usefixtures("counted")

NAMES = ("q", "k", "v", "pos_key", "pos_query")
SETTINGS = {"position_buckets": 8, "max_relative_positions": 16}


def loss(out, lse):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).sum().double() + lse.double().square().sum()


def op_case(name, tensors):
    """Build the arguments of the operator for one of the opcheck cases."""
    q, k, v, pos_key, pos_query = tensors(
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    )
    masks, position, extra = Masks(), PositionSpec(8, 16), {}
    key = torch.ones(2, 11, dtype=torch.bool)
    key[0, 7:] = False
    if name == "none":
        pos_key = pos_query = None
    elif name == "c2p":
        pos_query = None
    elif name == "p2c":
        pos_key = None
    elif name == "key":
        masks = Masks(key=key)
    elif name == "key+query":
        masks = Masks(key=key, query=key)
    elif name in ("pair", "pair-per-head"):
        masks = Masks(pair=torch.rand(2, 1 if name == "pair" else 3, 11, 11) > 0.3)
    elif name == "all-padding":
        masks = Masks(key=torch.zeros(2, 11, dtype=torch.bool))
    elif name == "one-token":
        q, k, v, *_ = tensors(1)
    elif name == "long":
        q, k, v, *_ = tensors(70)
    elif name == "cross":
        q, k, v, *_ = tensors(5, 9)
    elif name == "prefix":
        q, k, v, *_ = tensors(8, 11)
        position = PositionSpec(8, 16, 0, 3)
    elif name == "linear":
        position = PositionSpec(-1, 8)
    elif name == "dropout":
        extra = {"dropout_p": 0.25, "seed": torch.tensor([7])}
    elif name == "packed":
        q, k, v = (x.detach().requires_grad_() for x in tensors(20, batch=1)[:3])
        extra = {"cu_seqlens": torch.tensor([0, 6, 20], dtype=torch.int32), "max_seqlen": 14}
    elif name == "strided":
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    elif name == "expanded":
        k = k.detach()[:, :1].expand(-1, 3, -1, -1).requires_grad_()
    elif name == "frozen-tables":
        pos_key, pos_query = pos_key.detach(), pos_query.detach()
    elif name == "frozen-tokens":
        q, k, v = q.detach(), k.detach(), v.detach()
    elif name == "no-gradient":
        q, k, v, pos_key, pos_query = (x.detach() for x in (q, k, v, pos_key, pos_query))
    extra.setdefault("max_seqlen", max(q.shape[2], k.shape[2]))
    return AttentionProblem(q, k, v, pos_key, pos_query, masks, position, 0.2, **extra)


OP_CASES = [
    "both", "none", "c2p", "p2c", "bf16", "fp16", "key", "key+query", "pair", "pair-per-head", "all-padding",
    "one-token", "long", "cross", "prefix", "linear", "dropout", "packed", "strided", "expanded", "frozen-tables",
    "frozen-tokens", "no-gradient",
]  # fmt: skip


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(name, backend, tensors):
    arguments = (*op_case(name, tensors).arguments(), backend)
    torch.library.opcheck(torch.ops.deberta_kernels.attention.default, arguments)


@pytest.mark.parametrize("name", ["both", "c2p", "packed", "frozen-tables", "key", "dropout"])
@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, True, False]], ids=["all", "some"])
def test_opcheck_backward(name, needs, backend, tensors):
    problem = op_case(name, tensors)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*problem.arguments(), backend)]
    out, lse = torch.ops.deberta_kernels.attention(*arguments)
    needs = [need and x is not None for need, x in zip(needs, arguments)]
    more = (torch.randn_like(out), torch.randn_like(lse) if name == "both" else None, out, lse, *arguments, needs)
    torch.library.opcheck(torch.ops.deberta_kernels.attention_backward.default, more)


@pytest.mark.parametrize("with_reference", [False, True], ids=["backend", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_both_routes_give_the_same_bits(backend, with_reference, dropout_p, tensors, watched):
    name = "reference" if with_reference else backend
    x = tensors(19)

    def run():
        torch.manual_seed(3)
        out, lse = dk.disentangled_attention(*x, **SETTINGS, dropout_p=dropout_p, return_lse=True, backend=name)
        return (out, lse, *torch.autograd.grad(loss(out, lse), x))

    direct = run()
    with watched() as watch:
        dispatched = run()
    if not with_reference:
        assert watch.seen == ["attention", "attention_backward"]
    for name, a, b in zip(("out", "lse", *NAMES), direct, dispatched):
        assert torch.equal(a, b), name


def test_plain_eager_calls_do_not_enter_the_dispatcher_but_profiled_ones_do(backend, monkeypatch, tensors):
    x = tensors(grad=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        dk.disentangled_attention(*x, **SETTINGS, backend=backend)
    assert "deberta_kernels::attention" in {event.key for event in profiler.key_averages()}
    monkeypatch.setattr(torch.ops.deberta_kernels, "attention", None)
    dk.disentangled_attention(*x, **SETTINGS, backend=backend)


def test_out_is_a_view_of_tokens_by_heads_memory_and_not_an_autograd_view(backend, tensors, watched):
    for x in (tensors(grad=False), tensors()):
        for context in (nullcontext(), torch.no_grad(), watched()):
            with context:
                out = dk.disentangled_attention(*x, **SETTINGS, backend=backend)
            assert out.transpose(1, 2).is_contiguous()
            assert not out._is_view()
    with torch.no_grad():
        out = dk.disentangled_attention(*x, **SETTINGS, backend=backend)
    out += torch.ones(1, requires_grad=True)
    assert out.requires_grad


def test_autocast_does_not_lower_the_precision_of_the_backend(backend, tensors):
    x = tensors()

    def run(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype):
            out = dk.disentangled_attention(*x, backend=backend, **SETTINGS)
            return (out, *torch.autograd.grad(out.square().sum(), x))

    for plain, under_autocast in zip(run(False), run(True)):
        assert under_autocast.dtype == torch.float32
        assert torch.equal(plain, under_autocast)
    with torch.autocast("cpu", torch.bfloat16):
        expected = dk.disentangled_attention(*x, backend="reference", **SETTINGS)
    torch.testing.assert_close(expected, under_autocast_out := run(True)[0], atol=1e-5, rtol=1e-5)
    assert expected.dtype == under_autocast_out.dtype


@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_counts_calls_where_they_are_computed(name, tensors, watched):
    if name == "cpu":
        needs.native_library()
    x = tensors()
    with watched():
        dk.disentangled_attention(*x, backend=name, **SETTINGS)
    dk.disentangled_attention(*x, backend=name, **SETTINGS).sum().backward()
    with torch.no_grad():
        dk.disentangled_attention(*x, backend=name, **SETTINGS)
    expected = dict.fromkeys(dispatch.BACKENDS, 0) | {name: 3}
    assert dk.stats()["calls"] == expected


def test_tracing_counts_nothing(backend, tensors):
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        x = [mode.from_tensor(t) for t in tensors(grad=False)]
        out, lse = dk.disentangled_attention(*x, backend=backend, return_lse=True, **SETTINGS)
    assert (out.shape, lse.shape) == (x[0].shape, x[0].shape[:3])
    meta = [t.to("meta") for t in tensors(grad=False)]
    assert dk.disentangled_attention(*meta, backend="torch", **SETTINGS).is_meta
    assert not any(dk.stats()["calls"].values())


def test_threads_may_call_at_once(backend, tensors):
    x = tensors(33)
    expected = torch.autograd.grad(dk.disentangled_attention(*x, backend=backend, **SETTINGS).square().sum(), x)
    errors = []

    def work():
        try:
            y = [t.detach().clone().requires_grad_() for t in x]
            for _ in range(10):
                found = torch.autograd.grad(
                    dk.disentangled_attention(*y, backend=backend, **SETTINGS).square().sum(), y
                )
                assert all(torch.equal(a, b) for a, b in zip(expected, found))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert dk.stats()["calls"][backend] == 41


def test_sliced_tables_that_miss_a_reachable_row_are_refused(backend, tensors):
    q, k, v, pos_key, pos_query = (t.detach() for t in tensors(3))
    good = AttentionProblem(
        q, k, v, pos_key[:, 5:12], pos_query[:, 5:12], Masks(), PositionSpec(8, 16, 5), 0.2, max_seqlen=3
    )
    short = AttentionProblem(
        q, k, v, pos_key[:, 7:12], pos_query[:, 7:12], Masks(), PositionSpec(8, 16, 7), 0.2, max_seqlen=3
    )
    with pytest.raises(ValueError, match=r"must hold the rows \[6, 11\).*got 5 rows from first_row=7; slice with"):
        ops.attention(short, backend)
    whole = AttentionProblem(q, k, v, pos_key, pos_query, Masks(), PositionSpec(8, 16), 0.2, max_seqlen=3)
    torch.testing.assert_close(ops.attention(good, backend), ops.attention(whole, backend))


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8), (2, 0, 5, 8)], ids=["B0", "N0", "H0"])
def test_empty_input_gives_empty_output_and_zero_gradients(backend, shape, watched):
    q, k, v = (torch.empty(shape, requires_grad=True) for _ in range(3))
    pos_key, pos_query = (torch.randn(shape[1], 16, 8, requires_grad=True) for _ in range(2))
    for context in (nullcontext(), watched()):
        with context:
            out, lse = dk.disentangled_attention(
                q, k, v, pos_key, pos_query, return_lse=True, dropout_p=0.1, backend=backend, **SETTINGS
            )
            found = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, pos_key, pos_query))
        assert (out.shape, lse.shape) == (shape, shape[:3])
        assert not found[3].any()
        assert [g.shape for g in found] == [x.shape for x in (q, k, v, pos_key, pos_query)]
    assert not any(dk.stats()["calls"].values())


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8), (2, 0, 5, 8)], ids=["B0", "N0", "H0"])
def test_the_reference_drops_nothing_of_nothing(shape):
    x = torch.empty(shape, requires_grad=True)
    state = torch.get_rng_state()
    out = dk.disentangled_attention(x, x, x, dropout_p=0.1, backend="reference")
    assert torch.autograd.grad(out.sum(), x)[0].shape == out.shape == shape
    assert torch.equal(torch.get_rng_state(), state)


def test_backends_run_outside_autocast(monkeypatch, tensors):
    seen = []

    def attend(problem):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch_tiled.forward(problem)

    dispatch.load("torch")
    stand_in = SimpleNamespace(refusal=lambda problem: None, forward=attend, backward=torch_tiled.backward)
    monkeypatch.setitem(dispatch._loaded, "torch", stand_in)
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (False, True):
            dk.disentangled_attention(*tensors(grad=grad), backend="torch", **SETTINGS)
    assert seen == [False, False]


def test_seed_is_drawn_outside_the_operator(backend, tensors):
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.__name__.startswith("attention") and func.namespace == "deberta_kernels":
                seen.append(next(a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64).clone())
            return func(*args, **(kwargs or {}))

    x = tensors()
    torch.manual_seed(11)
    expected = draw_seed(x[0].device)
    torch.manual_seed(11)
    with Look():
        dk.disentangled_attention(*x, dropout_p=0.5, backend=backend, **SETTINGS).sum().backward()
    assert [torch.equal(seed, expected) for seed in seen] == [True, True]
