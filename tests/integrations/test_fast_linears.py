"""Linear layers computed in other ways: the same values, only where nothing could notice, undone like every patch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels import env, native
from deberta_kernels.linear import hidden_dropout
from deberta_kernels.linear import products as ways
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from deberta_kernels.proof.budget import allowance
from tests import needs
from tests.integrations.linears import LINEARS, TABLES, gradients_of, record_products, states_of

needs.vector_library()
STATUS = native.library_status()
MULTIPLIES_BFLOAT16 = STATUS["loaded"] and env.multiplies_bfloat16(STATUS["isa"])


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the activation of each product that PyTorch does not compute."""
    return record_products(monkeypatch)


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("everywhere", [True, False])
def test_hidden_states_are_within_the_budget(
    unpad, conv, everywhere, build, batch, in_double, assert_within_budget, products
):
    model, inputs = build(conv_kernel_size=conv), batch(4, 41)
    truth, eager = states_of(in_double(model), inputs), states_of(model, inputs)
    if everywhere:
        dk.patch_all(unpad=unpad, strict=True, fast_linears=True)
    else:
        dk.patch(model, unpad=unpad, strict=True, fast_linears=True)
    for layer, state in enumerate(states_of(model, inputs)):
        assert_within_budget(f"state {layer}", state, eager[layer], truth[layer])
    assert len(products) == (LINEARS + TABLES) * model.config.num_hidden_layers
    assert products.count("gelu") == model.config.num_hidden_layers
    (dk.unpatch_all if everywhere else lambda: dk.unpatch(model))()
    products.clear()
    assert all(map(torch.equal, states_of(model, inputs), eager))
    assert products == []


def test_the_option_can_be_changed_and_survives_copies(build, batch, products):
    model, inputs = build(), batch()
    for wanted, count in ((True, LINEARS * 2), (False, 0), (True, LINEARS * 2)):
        dk.patch(model, fast_linears=wanted)
        for candidate in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            states_of(candidate, inputs)  # projects the tables that are kept
            products.clear()
            states_of(candidate, inputs)
            assert len(products) == count


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_other_activations_follow_the_product(activation, build, batch, products):
    model, inputs = build(hidden_act=activation), batch()
    expected = states_of(model, inputs)
    dk.patch(model, fast_linears=True)
    torch.testing.assert_close(states_of(model, inputs), expected, atol=3e-5, rtol=1e-5)
    assert set(products) == {"none"}


PRODUCTS = 3  # of a layer that trains: forward, gradient of the input, gradient of the weight


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
def test_gradients_are_within_the_budget(unpad, everywhere, build, batch, in_double, assert_within_budget, products):
    model, inputs = build().train(), batch(4, 41)
    truth, eager = gradients_of(in_double(model), inputs), gradients_of(model, inputs)
    if everywhere:
        dk.patch_all(unpad=unpad, strict=True, fast_linears=True)
    else:
        dk.patch(model, unpad=unpad, strict=True, fast_linears=True)
    for name, gradient in gradients_of(model, inputs).items():
        assert_within_budget(name, gradient, eager[name], truth[name])
    assert products == ["none"] * (PRODUCTS * (LINEARS + TABLES) * model.config.num_hidden_layers)


@pytest.mark.parametrize(("wanted", "expected"), [(True, 3), (False, 0)])
def test_hidden_dropout_is_counted_forward_and_backward(wanted, expected, build, batch, monkeypatch):
    needs.native_library()
    calls, drop = [], hidden_dropout._drop
    monkeypatch.setattr(hidden_dropout, "_drop", lambda x, *rest: calls.append(x.shape) or drop(x, *rest))
    model, inputs = build(hidden_dropout_prob=0.1).train(), batch()
    dk.patch(model, strict=True, fast_linears=wanted)
    states_of(model, inputs)
    layers = model.config.num_hidden_layers
    assert len(calls) == expected * layers  # two around attention, and the relative embeddings
    gradients_of(model, inputs)
    assert len(calls) == 3 * expected * layers
    model.eval()
    states_of(model, inputs)
    assert len(calls) == 3 * expected * layers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_keep_every_bit(reentrant, build, batch):
    model, inputs = build(hidden_dropout_prob=0.1).train(), batch()
    dk.patch(model, strict=True, fast_linears=True)
    expected = {name: gradient.clone() for name, gradient in gradients_of(model, inputs).items()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, gradient in gradients_of(model, inputs).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight bias"])
@pytest.mark.parametrize("bias", [True, False])
def test_only_gradients_somebody_needs_are_computed(wanted, bias, products):
    layer, x = nn.Linear(32, 48, bias=bias).requires_grad_(False), torch.randn(2, 5, 32)
    for name, tensor in {"x": x, "weight": layer.weight, "bias": layer.bias}.items():
        if tensor is not None:
            tensor.requires_grad_(name in wanted)
    found = apply_linear(layer, x, everywhere=True)
    assert found.requires_grad == any(t is not None and t.requires_grad for t in (x, layer.weight, layer.bias))
    if found.requires_grad:
        found.sum().backward()  # a gradient of stride 0
        assert len(products) == 1 + ("x" in wanted) + ("weight" in wanted)
        actual = {name: t.grad for name, t in (("x", x), *layer.named_parameters()) if t.grad is not None}
        x.grad = None
        layer.zero_grad()
        layer(x).sum().backward()
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, x.grad if name == "x" else layer.get_parameter(name).grad)
        assert len(actual) == sum(t is not None and t.requires_grad for t in (x, layer.weight, layer.bias))


def test_second_derivatives_are_right():
    layer, x = nn.Linear(16, 32), torch.randn(9, 16, requires_grad=True)
    exact = copy.deepcopy(layer).double()
    found = []
    for call, like in ((exact, exact), (layer, layer), (lambda x: apply_linear(layer, x, everywhere=True), layer)):
        inputs = (x.detach().to(like.weight.dtype).requires_grad_(), like.weight, like.bias)
        first = torch.autograd.grad(call(inputs[0]).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    assert found[0][0].abs().max() > 0
    for truth, eager, actual in zip(*found):
        allowed = allowance(torch.float32, float((eager - truth).abs().max()), float(truth.abs().max()))
        assert float((actual - truth).abs().max()) <= allowed


def test_gradients_of_many_outputs_at_once_are_right():
    layer, x = nn.Linear(16, 32), torch.randn(9, 16)
    expected = torch.autograd.functional.jacobian(layer, x)
    call = torch.autograd.functional.jacobian(lambda x: apply_linear(layer, x, everywhere=True), x, vectorize=True)
    torch.testing.assert_close(call, expected)


def test_forward_mode_keeps_its_tangents():
    layer, x = nn.Linear(16, 32), torch.randn(9, 16)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(apply_linear(layer, dual, everywhere=True)).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ layer.weight.t())


@pytest.mark.parametrize("everywhere", [True, False])
def test_training_uses_the_modules_unless_asked_otherwise(everywhere, build, batch, products, monkeypatch):
    monkeypatch.setattr(ways, "_native_wanted", lambda: True)
    model, inputs = build().train(), batch()
    for wanted, count in (("auto", 0), (True, PRODUCTS), ("auto", 0)):
        dk.patch_all(fast_linears=wanted) if everywhere else dk.patch(model, fast_linears=wanted)
        products.clear()
        gradients_of(model, inputs)
        assert len(products) == count * (LINEARS + TABLES) * model.config.num_hidden_layers
        states_of(model, inputs)  # in training mode without gradients: the first pass of a checkpoint
        assert len(products) == (count and count + 1) * (LINEARS + TABLES) * model.config.num_hidden_layers


def test_frozen_layers_pass_gradients_on(build, batch, products):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    for candidate in (plain, model):
        candidate.requires_grad_(False)
        candidate.embeddings.requires_grad_(True)
    dk.patch(model, fast_linears=True)
    for candidate in (plain, model):
        candidate(**inputs).last_hidden_state.square().sum().backward()
    weight, before = (m.embeddings.word_embeddings.weight.grad for m in (model, plain))
    torch.testing.assert_close(weight, before, atol=1e-4, rtol=1e-4)


def _hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, args, out: out + 1)


def _subclass(layer: nn.Linear) -> None:
    layer.__class__ = type("Doubling", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


def _instance(layer: nn.Linear) -> None:
    layer.forward = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)


def _parametrization(layer: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


@pytest.mark.parametrize("change", [_hook, _subclass, _instance, _parametrization])
def test_layers_that_are_not_plain_are_called_as_modules(change, build, batch, products):
    model, inputs = build(), batch()
    for part in (model.encoder.layer[0].attention.self.key_proj, model.encoder.layer[1].output.dense):
        change(part)
    expected = states_of(model, inputs)
    dk.patch(model, fast_linears=True)
    torch.testing.assert_close(states_of(model, inputs), expected, atol=5e-5, rtol=1e-5)
    assert len(products) == (LINEARS + TABLES) * 2 - 3  # the tables of the changed key_proj as well


def test_a_default_device_changes_nothing(build, batch, products):
    model, inputs = build(), batch()
    dk.patch(model, fast_linears=True)
    with torch.device("cpu"):
        states_of(model, inputs)
    assert len(products) >= LINEARS * 2


def test_a_forward_replaced_for_all_linear_layers_is_called(build, batch, monkeypatch):
    model, inputs = build(), batch()
    plain, original, kept = copy.deepcopy(model), nn.Linear.forward, []

    def recording(self, x):
        y = 1.5 * original(self, x)
        kept.append((y, y.clone()))
        return y

    monkeypatch.setattr(nn.Linear, "forward", recording)
    expected = states_of(plain, inputs)
    for fast_linears in ("auto", True):
        dk.patch(model, fast_linears=fast_linears)
        torch.testing.assert_close(states_of(model, inputs), expected, atol=5e-5, rtol=1e-5)
    assert all(torch.equal(now, before) for now, before in kept)


def test_an_activation_whose_forward_was_replaced_is_called(build, batch, monkeypatch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    activation = type(model.encoder.layer[0].intermediate.intermediate_act_fn)
    monkeypatch.setattr(activation, "forward", lambda self, x: x.relu())
    dk.patch(model, fast_linears=True)
    torch.testing.assert_close(states_of(model, inputs), states_of(plain, inputs), atol=5e-5, rtol=1e-5)


def test_backward_hooks_change_gradients_as_before(build, batch):
    model, inputs = build().train(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model, fast_linears=True)
    found, calls = [], []
    for candidate in (plain, model):
        for part in (
            candidate.encoder.layer[0].attention.self.query_proj,
            candidate.encoder.layer[1].intermediate.dense,
        ):
            part.register_full_backward_hook(lambda module, dx, dout: calls.append(module) or tuple(2 * x for x in dx))
        candidate(**inputs).last_hidden_state.square().sum().backward()
        found.append((len(calls), candidate.embeddings.word_embeddings.weight.grad))
        calls.clear()
    assert found[0][0] == found[1][0] > 0
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-4, rtol=1e-4)


def test_a_bias_of_another_dtype_is_refused_as_before():
    layer = nn.Linear(16, 16)
    layer.bias = nn.Parameter(layer.bias.detach().double())
    with torch.no_grad(), pytest.raises(RuntimeError):
        apply_linear(layer, torch.randn(9, 16))


def test_edits_of_a_weight_take_part_at_once(build, batch):
    model, inputs = build(), batch()
    dk.patch(model, fast_linears=True)
    states_of(model, inputs)
    model.encoder.layer[0].output.dense.weight.data.mul_(1.5)
    actual = states_of(model, inputs)
    dk.unpatch(model)
    torch.testing.assert_close(actual, states_of(model, inputs), atol=3e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization_after_patching_takes_part(build, batch, products):
    model, inputs = build(), batch()
    dk.patch(model, fast_linears=True)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    states_of(quantized, inputs)
    assert products == []


def test_autocast_and_other_dtypes_use_the_modules(build, batch, products):
    model, inputs = build(), batch()
    dk.patch(model, fast_linears=True)
    with torch.autocast("cpu", torch.bfloat16):
        states_of(model, inputs)
    states_of(model.half(), inputs)
    states_of(model.double(), inputs)
    assert products == []  # widened ones among them, where the processor has no others


@pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="the processor has no bfloat16 products")
def test_bfloat16_is_within_the_budget(build, batch, in_double, assert_within_budget, products):
    model, inputs = build().bfloat16(), batch(4, 41)
    truth, eager = states_of(in_double(model), inputs), states_of(model, inputs)
    dk.patch(model, strict=True, fast_linears=True)
    for layer, state in enumerate(states_of(model, inputs)):
        assert_within_budget(f"state {layer}", state, eager[layer], truth[layer])
    assert len(products) == (LINEARS + TABLES) * model.config.num_hidden_layers


@pytest.mark.parametrize("rows", [0, 1, 8, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_any_size(rows, bias):
    layer = nn.Linear(32, 48, bias=bias).eval()
    for x in (torch.randn(rows, 32), torch.randn(32, rows).t(), torch.randn(rows, 2, 32).transpose(0, 1)):
        with torch.no_grad():
            torch.testing.assert_close(apply_linear(layer, x, everywhere=True), layer(x))
            torch.testing.assert_close(
                apply_linear_gelu(layer, nn.GELU(), x, everywhere=True), nn.functional.gelu(layer(x))
            )


def test_values_that_are_not_finite_are_never_hidden():
    layer, x = nn.Linear(16, 16).eval(), torch.randn(9, 16)
    x[1, 2] = float("nan")
    with torch.no_grad():
        for actual in (
            apply_linear(layer, x, everywhere=True),
            apply_linear_gelu(layer, nn.GELU(), x, everywhere=True),
        ):
            assert actual[1].isnan().all()
            assert actual[[0, 2]].isfinite().all()


def test_gelu_in_place_changes_nothing_else():
    layer, x = nn.Linear(24, 40).eval(), torch.randn(3, 24)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(apply_linear_gelu(layer, nn.GELU(), x), nn.functional.gelu(layer(x)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_an_unknown_value_is_refused(value, build):
    with pytest.raises(ValueError, match=r"fast_linears must be 'auto', True or False, got"):
        dk.patch(build(), fast_linears=value)


def test_without_the_library_it_is_refused_by_name(monkeypatch, build):
    monkeypatch.setattr(native, "unavailable", lambda: "the native library is not built")
    with pytest.raises(NotImplementedError, match="fast_linears=True is not possible: the native library is not built"):
        dk.patch(build(), fast_linears=True)
