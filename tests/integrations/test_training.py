"""Training a patched model: checkpointing of both kinds, dropout, low precision, autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import deberta_kernels as dk

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}


def gradients(model: Any, inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(**inputs)[0]
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, {"share_att_key": False, "norm_rel_ebd": "none", "conv_kernel_size": 3}])
@pytest.mark.parametrize("dropout", [{}, DROPOUT])
def test_checkpointing_gives_the_gradients_of_the_plain_run(reentrant, settings, dropout, build, batch):
    model, inputs = build(num_hidden_layers=3, **settings, **dropout).train(), batch()
    dk.patch(model, strict=True)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    dk.reset_stats()
    actual = gradients(model, inputs)
    assert sum(dk.stats()["calls"].values()) == 6  # each layer once more, in the backward
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_checkpointing_as_transformers_sets_it_up_by_default(build, batch):
    model, inputs = build().train(), batch()
    dk.patch(model)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_checkpointing_under_patch_all(build, batch):
    model, inputs = build().train(), batch()
    expected = gradients(model, inputs)
    dk.patch_all(strict=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_dropout_depends_on_the_seed_only(build, batch):
    model, inputs = build(**DROPOUT).train(), batch()
    dk.patch(model)
    first, again, other = gradients(model, inputs, 1), gradients(model, inputs, 1), gradients(model, inputs, 2)
    for name in first:
        assert torch.equal(first[name], again[name]), name
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_attention_dropout_has_the_mean_and_spread_of_before(build, batch):
    model, inputs = build(num_hidden_layers=1, attention_probs_dropout_prob=0.4).train(), batch(1, 20, "none")
    attention = model.encoder.layer[0].attention.self
    outputs: list[torch.Tensor] = []
    attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        outputs.clear()
        with torch.no_grad():
            for _ in range(300):
                model(**inputs)
        drawn = torch.stack(outputs)
        return drawn.mean(0), drawn.std(0)

    mean, spread = draw()
    dk.patch(model)
    fused_mean, fused_spread = draw()
    standard_error = spread / 300**0.5
    assert ((fused_mean - mean) / standard_error).abs().mean() < 1.5
    torch.testing.assert_close(fused_spread.mean(), spread.mean(), rtol=0.05, atol=0)


def test_position_dropout_is_applied_to_the_rows_in_use(build, batch):
    model, inputs = build(hidden_dropout_prob=0.5).train(), batch(1, 8, "none")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    attention = model.encoder.layer[0].attention.self
    shapes: list[tuple[int, ...]] = []
    attention.pos_dropout.train()
    attention.pos_dropout.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    dk.patch(model)
    out = [model(**inputs)[0] for _ in range(2)]
    assert shapes == [(15, 32)] * 2
    assert not torch.equal(*out)


def error(actual: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    difference = (actual.double() - truth).abs()
    return difference.max().item(), difference.mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_low_precision_has_the_dtypes_and_at_most_the_errors_of_before(dtype, autocast, grad, build, batch):
    model, inputs = build(conv_kernel_size=0).eval(), batch()
    if not autocast:
        model = model.to(dtype)
    truth = copy.deepcopy(model).double()(**inputs).last_hidden_state.detach()

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=autocast):
            out = model(**inputs).last_hidden_state
        if grad:
            model.zero_grad()
            out.float().square().mean().backward()
        return out.detach(), model.encoder.rel_embeddings.weight.grad

    contexts: list[torch.dtype] = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda m, args, out: contexts.append(out[0].dtype))
    eager, eager_grad = run()
    dk.patch(model, strict=True)
    fused, fused_grad = run()
    assert fused.dtype == eager.dtype
    assert contexts == [dtype, dtype]
    (eager_max, eager_mean), (fused_max, fused_mean) = error(eager, truth), error(fused, truth)
    floor = torch.finfo(dtype).eps * truth.abs().max().item()
    assert fused_max <= 2 * eager_max + floor
    assert fused_mean <= 1.1 * eager_mean + 1e-5
    if grad:
        assert fused_grad.dtype == eager_grad.dtype
        assert torch.isfinite(fused_grad).all()


def test_half_precision_scores_that_overflow_before_stay_finite(build):
    attention = build().encoder.layer[0].attention.self.half()
    hidden, table = torch.randn(1, 9, 32).half() * 300, torch.randn(32, 32).half() * 300
    mask = torch.ones(1, 1, 1, 9)
    with torch.no_grad():
        before, _ = attention(hidden, mask, rel_embeddings=table)
        dk.patch(attention)
        after, _ = attention(hidden, mask, rel_embeddings=table)
    assert not torch.isfinite(before).all()
    assert torch.isfinite(after).all()


def test_mixed_dtypes_without_autocast_raise_as_before(build, batch):
    model, inputs = build(), batch()
    embeddings = torch.randn(3, 37, 32, dtype=torch.float16)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model.encoder(embeddings, inputs["attention_mask"])
        dk.patch(model)


def test_a_projection_that_ignores_autocast_is_cast_as_before(build, batch):
    class Float32Linear(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, inputs = build(), batch()
    attention = model.encoder.layer[0].attention.self
    attention.value_proj.__class__ = Float32Linear
    attention.key_proj.__class__ = Float32Linear
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**inputs)[0]
        dk.patch(model, strict=True)
        after = model(**inputs)[0]
    torch.testing.assert_close(after, before, atol=0.15, rtol=0.1)


def test_a_toy_task_is_learned_along_the_same_curve(build, batch):
    inputs = batch(8, 12, "right")
    labels = (inputs["input_ids"][:, 1] > 32).long()
    curves = []
    for patched in (False, True):
        model = build("DebertaV2ForSequenceClassification").train()
        if patched:
            dk.patch(model, strict=True)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        losses = []
        for _ in range(15):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.7 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], atol=1e-4, rtol=1e-3)
