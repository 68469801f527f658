"""bfloat16 and float16 layers multiplied in float32, as on processors without instructions for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.linear import products as ways
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from tests.integrations.linears import LINEARS, TABLES, gradients_of, states_of


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Take the processor for one without instructions for narrow products; record the dtype of each widened one."""
    seen: list[torch.dtype] = []
    original = ways.widened

    def recording(x: torch.Tensor, weight: Any, bias: Any, dtype: torch.dtype, gelu: bool = False) -> torch.Tensor:
        seen.append(dtype)
        return original(x, weight, bias, dtype, gelu)

    monkeypatch.setattr(ways, "lacks_products", lambda dtype: dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(ways, "widened", recording)
    return seen


NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_widened_states_are_within_the_budget(
    dtype, everywhere, build, batch, in_double, assert_within_budget, widening
):
    model, inputs = build().to(dtype), batch(4, 41)
    truth, eager = states_of(in_double(model), inputs), states_of(model, inputs)
    dk.patch_all(strict=True) if everywhere else dk.patch(model, strict=True)
    for layer, state in enumerate(states_of(model, inputs)):
        assert state.dtype == dtype
        assert_within_budget(f"state {layer}", state, eager[layer], truth[layer])
    assert widening == [dtype] * ((LINEARS + TABLES) * model.config.num_hidden_layers)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", NARROW)
def test_widened_gradients_are_within_the_budget(
    autocast, dtype, build, batch, in_double, assert_within_budget, widening
):
    model, inputs = build().train(), batch(4, 41)
    if not autocast:
        model = model.to(dtype)

    def gradients() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return gradients_of(model, inputs)

    truth, eager = gradients_of(in_double(model), inputs), gradients()
    dk.patch(model, strict=True)
    for name, gradient in gradients().items():
        assert gradient.dtype == eager[name].dtype
        assert_within_budget(name, gradient.to(dtype), eager[name].to(dtype), truth[name])
    assert widening == [dtype] * ((LINEARS + TABLES) * model.config.num_hidden_layers)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_checkpoints_keep_every_bit_of_widened_products(autocast, reentrant, build, batch, widening):
    model, inputs = build(hidden_dropout_prob=0.1).train(), batch()
    model = model if autocast else model.bfloat16()
    dk.patch(model, strict=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = {name: gradient.clone() for name, gradient in gradients_of(model, inputs).items()}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for name, gradient in gradients_of(model, inputs).items():
            assert torch.equal(gradient, expected[name]), name
    assert widening


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight bias"])
def test_widened_gradients_nobody_needs_are_left_out(wanted, widening):
    layer, x = nn.Linear(24, 40).bfloat16().requires_grad_(False), torch.randn(2, 5, 24).bfloat16()
    for name, tensor in {"x": x, "weight": layer.weight, "bias": layer.bias}.items():
        tensor.requires_grad_(name in wanted)
    apply_linear(layer, x).sum().backward()
    found = {name: t.grad for name, t in (("x", x), *layer.named_parameters())}
    assert {name for name, gradient in found.items() if gradient is not None} == set(wanted.split())
    x.grad = None
    layer.zero_grad()
    layer(x).sum().backward()
    for name, t in (("x", x), *layer.named_parameters()):
        if t.grad is not None:
            torch.testing.assert_close(found[name], t.grad)
    assert len(widening) == 1


def test_second_derivatives_of_widened_products_are_right(widening):
    layer, x = nn.Linear(6, 5).bfloat16(), torch.randn(3, 6).bfloat16().requires_grad_()
    found = []
    for call in (layer, lambda x: apply_linear(layer, x)):
        inputs = (x, layer.weight, layer.bias)
        first = torch.autograd.grad(call(x).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    assert found[0][0].abs().max() > 0
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_dtype_of_a_widened_product(x_dtype, widening):
    layer, x = nn.Linear(24, 40), torch.randn(3, 24).to(x_dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in (apply_linear, lambda layer, x: apply_linear_gelu(layer, nn.GELU(), x)):
            assert call(layer, x).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        ours, eager = apply_linear(layer, x), layer(x)
    truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert (ours - truth).abs().max() <= (eager - truth).abs().max()
    assert len(widening) == 3


def test_modules_that_are_not_plain_are_not_widened(widening):
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    layer.register_forward_hook(lambda module, args, out: out + 1)
    with torch.no_grad():
        assert torch.equal(apply_linear(layer, x), layer(x))
    assert widening == []


def test_the_option_turns_widening_off(build, batch, widening):
    model, inputs = build().bfloat16(), batch()
    dk.patch(model, fast_linears=False)
    states_of(model, inputs)
    assert widening == []
