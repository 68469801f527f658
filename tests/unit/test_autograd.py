"""Autograd: only gradients somebody needs, checkpoints, and transforms that are right or refused by name."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import deberta_kernels as dk
from deberta_kernels import dispatch
from deberta_kernels.impl import torch_tiled

pytestmark = pytest.mark.usefixtures("counted")

NAMES = ("q", "k", "v", "pos_key", "pos_query")
SETTINGS = {"position_buckets": 8, "max_relative_positions": 16}


class Spy:
    """A backend that records what its backward was asked for."""

    def __init__(self):
        self.needs, self.dlse = [], []

    def refusal(self, problem):
        return None

    def forward(self, problem):
        return torch_tiled.forward(problem)

    def backward(self, problem, dout, dlse, out, lse, needs):
        self.needs.append(tuple(needs))
        self.dlse.append(dlse)
        found = torch_tiled.backward(problem, dout, dlse, out, lse, needs)
        assert [g is not None for g in found] == list(needs)
        return found


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    dispatch.load("torch")
    monkeypatch.setitem(dispatch._loaded, "torch", spy)
    return spy


@pytest.mark.parametrize("route", ["direct", "dispatched", "compiled"])
@pytest.mark.parametrize("wanted", [("q",), ("k", "v"), ("pos_key",), ("v", "pos_query"), NAMES], ids="+".join)
def test_only_gradients_somebody_needs_are_computed(spy, wanted, route, tensors, watched):
    torch._dynamo.reset()
    x = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, tensors())]

    def call(*x):
        return dk.disentangled_attention(*x, backend="torch", **SETTINGS)

    with watched() if route == "dispatched" else nullcontext():
        out = (torch.compile(call, fullgraph=True, backend="aot_eager") if route == "compiled" else call)(*x)
        out.sum().backward()
    assert spy.needs == [tuple(name in wanted for name in NAMES)]
    assert [t.grad is not None for t in x] == [name in wanted for name in NAMES]
    assert spy.dlse == [None]


def test_absent_tables_are_never_needed(spy, tensors):
    q, k, v, pos_key, _ = tensors()
    dk.disentangled_attention(q, k, v, pos_key, backend="torch", **SETTINGS).sum().backward()
    assert spy.needs == [(True, True, True, True, False)]


def test_nothing_is_saved_when_nothing_needs_a_gradient(backend, tensors):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        dk.disentangled_attention(*tensors(grad=False), backend=backend, **SETTINGS)
        with torch.no_grad():
            dk.disentangled_attention(*tensors(), backend=backend, **SETTINGS)
        assert packed == []
        dk.disentangled_attention(*tensors(), backend=backend, **SETTINGS)
    assert packed


@pytest.mark.parametrize("part", ["out", "lse", "both"])
def test_gradients_of_out_and_lse(backend, part, tensors):
    x = tensors(13)
    results = []
    for name in ("reference", backend):
        out, lse = dk.disentangled_attention(*x, backend=name, return_lse=True, **SETTINGS)
        value = {"out": out.square().sum(), "lse": lse.square().sum(), "both": out.sum() + lse.sum()}[part]
        results.append(torch.autograd.grad(value, x, materialize_grads=True))
    for name, expected, found in zip(NAMES, *results):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=name)


def test_gradcheck_through_the_operators(tensors, watched):
    x = tensors(6, batch=1, heads=2, head_dim=4, dtype=torch.float64)

    def call(*x):
        return dk.disentangled_attention(*x, backend="torch", return_lse=True, **SETTINGS)

    assert torch.autograd.gradcheck(call, x)
    with watched():
        assert torch.autograd.gradcheck(call, x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_repeats_the_dropout_mask(backend, use_reentrant, tensors):
    x = tensors(40)

    def call(*x):
        return dk.disentangled_attention(*x, dropout_p=0.4, backend=backend, **SETTINGS)

    torch.manual_seed(5)
    expected = torch.autograd.grad(call(*x).square().sum(), x)
    torch.manual_seed(5)
    checkpoint(call, *x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip(x, expected):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("route", ["direct", "dispatched"])
def test_double_backward_is_refused_by_name(backend, route, tensors, watched):
    x = tensors()
    with watched() if route == "dispatched" else nullcontext():
        out = dk.disentangled_attention(*x, backend=backend, **SETTINGS)
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"second derivative.*backend='reference' only"):
            first[0].sum().backward()


def transforms():
    ones = torch.ones(2, 3, 11, 8)
    return {
        "jvp": (lambda f, q: torch.func.jvp(f, (q,), (ones,)), "forward-mode"),
        "linearize": (lambda f, q: torch.func.linearize(f, q), "forward-mode"),
        "jacfwd": (lambda f, q: torch.func.jacfwd(f)(q), "forward-mode|vmap"),
        "vmap": (lambda f, q: torch.vmap(f)(q.expand(3, -1, -1, -1, -1)), "vmap"),
        "hessian": (lambda f, q: torch.func.hessian(lambda q: f(q).sum())(q), "forward-mode|second|vmap"),
        "grad of grad": (
            lambda f, q: torch.func.grad(lambda q: torch.func.grad(lambda q: f(q).sum())(q).sum())(q),
            "second derivative",
        ),
        "jacrev": (lambda f, q: torch.func.jacrev(f)(q), "vmap"),
        "functional hessian": (
            lambda f, q: torch.autograd.functional.hessian(lambda q: f(q).sum(), q),
            "second derivative",
        ),
    }


@pytest.mark.parametrize("name", transforms())
def test_transforms_are_refused_by_name(backend, name, tensors):
    q, *rest = tensors(grad=False)
    transform, text = transforms()[name]
    with pytest.raises(NotImplementedError, match=text):
        transform(lambda q: dk.disentangled_attention(q, *rest, backend=backend, **SETTINGS), q)
    out = dk.disentangled_attention(q, *rest, backend=backend, **SETTINGS)
    torch.testing.assert_close(out, dk.disentangled_attention(q, *rest, backend="reference", **SETTINGS))


def test_dual_tensors_are_refused_and_plain_ones_beside_them_are_not(backend, tensors):
    x = tensors(grad=False)
    with forward_ad.dual_level():
        for index in range(5):
            duals = [forward_ad.make_dual(t, torch.ones_like(t)) if i == index else t for i, t in enumerate(x)]
            with pytest.raises(NotImplementedError, match=r"forward-mode.*backend='reference'"):
                dk.disentangled_attention(*duals, backend=backend, **SETTINGS)
        assert dk.disentangled_attention(*x, backend=backend, **SETTINGS).shape == x[0].shape


def test_func_grad_and_batched_gradients_are_right(backend, tensors):
    q, *rest = tensors(5, batch=1, heads=1, head_dim=3, grad=False)
    rest = [*rest[:2], *(t[:, :, :3] for t in rest[2:])]

    def call(q, name=backend):
        return dk.disentangled_attention(q, *rest, backend=name, **SETTINGS)

    found = torch.func.grad(lambda q: call(q).square().sum())(q)
    expected = torch.func.grad(lambda q: call(q, "reference").square().sum())(q)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    one_by_one = torch.autograd.functional.jacobian(call, q)
    torch.testing.assert_close(torch.autograd.functional.jacobian(call, q, vectorize=True), one_by_one)
    torch.testing.assert_close(torch.func.jacrev(call, chunk_size=1)(q), one_by_one)


def test_reference_supports_every_transform(tensors):
    x = tensors(4, batch=1, heads=1, head_dim=2, dtype=torch.float64)

    def call(*x):
        return dk.disentangled_attention(*x, backend="reference", **SETTINGS)

    assert torch.autograd.gradgradcheck(call, x)
    q, *rest = (t.detach() for t in x)
    _, tangent = torch.func.jvp(lambda q: call(q, *rest), (q,), (torch.ones_like(q),))
    assert tangent.abs().max() > 0


def test_gradients_belong_to_the_mask_of_the_forward(backend, tensors):
    x = tensors()
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[:, 8:] = False
    out = dk.disentangled_attention(*x, attention_mask=mask, backend=backend, **SETTINGS)
    want = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    mask.numpy()[:, :6] = False
    assert all(map(torch.equal, want, torch.autograd.grad(out.square().sum(), x)))
