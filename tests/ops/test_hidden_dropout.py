"""Dropout of hidden states: the draws that were promised, the same backward, and only where nobody could notice."""

import math

import pytest
import torch
from torch import nn

from deberta_kernels import dropout as contract
from deberta_kernels import native
from deberta_kernels.linear import hidden_dropout
from deberta_kernels.linear.hidden_dropout import drop_and_add
from tests import needs

needs.native_library()
STATUS = native.library_status()


@pytest.fixture(params=STATUS["variants"])
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def expected_keep(seed, p, shape):
    """Draw as the contract says, in PyTorch."""
    count = math.prod(shape)
    zero = torch.zeros(1, dtype=torch.int64)
    words = contract.philox(torch.tensor([seed]), (torch.arange((count + 7) // 8), zero, zero, zero + 1))
    draws = [(word >> shift) & 0xFFFF for word in words for shift in (0, 16)]
    return (torch.stack(draws, -1).flatten()[:count] >= contract.threshold(p)).view(shape)


@pytest.fixture
def seeds(monkeypatch):
    """Record the seeds that are drawn."""
    drawn = []

    def recording(device):
        drawn.append(int(contract.draw_seed(device)))
        return torch.tensor([drawn[-1]])

    monkeypatch.setattr(hidden_dropout, "draw_seed", recording)
    return drawn


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("residual_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (63,), (2, 32), (65,), (3, 5, 48), (20011,)], ids=str)
def test_draws_and_values_are_those_of_the_contract(shape, dtype, residual_dtype, isa, seeds):
    x = torch.randn(shape).to(dtype)
    residual = None if residual_dtype is None else torch.randn(shape).to(residual_dtype)
    found = drop_and_add(nn.Dropout(0.3), x, residual)
    assert found.dtype == (dtype if residual is None else torch.promote_types(dtype, residual_dtype))
    keep = expected_keep(seeds[0], 0.3, shape)
    exact = x.double() * keep * contract.keep_scale(0.3) + (0.0 if residual is None else residual.double())
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(found.dtype).eps, atol=3e-7)
    if residual is None:
        assert torch.equal(found == 0, ~keep | (x == 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_go_where_values_came_from(dtype, seeds):
    x = torch.randn(4, 50).to(dtype).requires_grad_()
    residual = torch.randn(4, 50).requires_grad_()
    out = drop_and_add(nn.Dropout(0.4), x, residual)
    dout = torch.randn_like(out)
    out.backward(dout)
    factor = expected_keep(seeds[0], 0.4, x.shape) * contract.keep_scale(0.4)
    torch.testing.assert_close(x.grad, (dout * factor).to(dtype))
    assert torch.equal(residual.grad, dout)
    assert len(seeds) == 1


def test_frozen_parts_get_no_gradient():
    x, residual = torch.randn(8), torch.randn(8, requires_grad=True)
    drop_and_add(nn.Dropout(0.4), x, residual).sum().backward()
    assert x.grad is None
    assert residual.grad is not None
    assert not drop_and_add(nn.Dropout(0.4), x, x).requires_grad


def test_second_derivatives_are_right(seeds):
    x = torch.randn(6, requires_grad=True)
    first = torch.autograd.grad(drop_and_add(nn.Dropout(0.4), x).pow(3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0]
    factor = expected_keep(seeds[0], 0.4, x.shape) * contract.keep_scale(0.4)
    torch.testing.assert_close(second, 6 * factor**3 * x.detach())


def test_gradients_of_many_outputs_at_once_are_right(seeds):
    x = torch.randn(5)
    found = torch.autograd.functional.jacobian(lambda x: drop_and_add(nn.Dropout(0.4), x), x, vectorize=True)
    factor = expected_keep(seeds[0], 0.4, x.shape) * contract.keep_scale(0.4)
    torch.testing.assert_close(found, factor.float().diag())


def test_gradients_may_be_mapped_over(seeds):
    x = torch.randn(5, requires_grad=True)
    out = drop_and_add(nn.Dropout(0.4), x)
    found = torch.func.vmap(lambda dout: torch.autograd.grad(out, x, dout)[0])(torch.eye(5))
    factor = expected_keep(seeds[0], 0.4, x.shape) * contract.keep_scale(0.4)
    torch.testing.assert_close(found, factor.float().diag())


def test_keep_rate_is_what_was_asked_for():
    torch.manual_seed(0)
    x, p, draws = torch.ones(1_000_000), 0.1, 10_000_000
    kept = sum(int((drop_and_add(nn.Dropout(p), x) != 0).sum()) for _ in range(10))
    rate = 1 - contract.threshold(p) / 65536
    assert abs(kept / draws - rate) <= 4 * math.sqrt(rate * (1 - rate) / draws)
    assert abs(rate - (1 - p)) < 1 / 65536


def test_seeds_come_from_torchs_generator():
    x, found = torch.randn(100), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(drop_and_add(nn.Dropout(0.5), x))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_threads_change_no_bit():
    x, before, found = torch.randn(100_000), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            found.append(drop_and_add(nn.Dropout(0.5), x, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_layouts_do_not_matter(seeds):
    x, residual = torch.randn(12, 10).t(), torch._neg_view(torch.randn(10, 12))
    found = drop_and_add(nn.Dropout(0.5), x, residual)
    keep = expected_keep(seeds[0], 0.5, (10, 12))
    torch.testing.assert_close(found, x * keep * 2 + residual)


def test_values_that_are_not_finite_are_never_hidden():
    x = torch.full((64,), float("nan"))
    assert drop_and_add(nn.Dropout(0.5), x).isnan().all()
    x[:] = float("inf")
    found = drop_and_add(nn.Dropout(0.5), x)
    assert (found.isinf() | found.isnan()).all()  # infinity times 0 is NaN, as in PyTorch


def _hooked():
    layer = nn.Dropout(0.5)
    layer.register_forward_hook(lambda module, args, out: out)
    return layer


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.5).eval(), nn.Dropout(0.0), nn.Dropout(1.0), nn.AlphaDropout(0.5), nn.Identity(), _hooked()],
    ids=lambda layer: f"{type(layer).__name__}-{getattr(layer, 'p', None)}-{layer.training}",
)
def test_other_modules_are_called(layer, seeds):
    x, residual = torch.randn(4, 8), torch.randn(4, 8)
    torch.manual_seed(0)
    found = drop_and_add(layer, x, residual)
    torch.manual_seed(0)
    assert torch.equal(found, layer(x) + residual)
    assert seeds == []


@pytest.mark.parametrize(
    ("x", "residual"),
    [
        (torch.randn(4, 8, dtype=torch.float64), None),
        (torch.randn(4, 8), torch.randn(4, 8, dtype=torch.float64)),
        (torch.randn(4, 8), torch.randn(8)),
        (torch.randn(0, 8), None),
    ],
    ids=["float64", "float64 residual", "broadcast", "empty"],
)
def test_other_tensors_go_through_the_module(x, residual, seeds):
    layer = nn.Dropout(0.5)
    torch.manual_seed(0)
    found = drop_and_add(layer, x, residual)
    torch.manual_seed(0)
    assert torch.equal(found, layer(x) if residual is None else layer(x) + residual)
    assert seeds == []


def test_a_forward_replaced_for_the_class_is_called(monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x + 1)
    assert torch.equal(drop_and_add(nn.Dropout(0.5), torch.zeros(3)), torch.ones(3))
