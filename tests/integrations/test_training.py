"""Training a patched model: dropout, low precision, autocast, frozen parts, the loss curve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.dropout import keep_scale, threshold

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}


def gradients(model: Any, inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = model(**inputs)[0]
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


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


@pytest.fixture
def probe(build: Any) -> Any:
    """A patched attention module whose context is the dropped probabilities: no scores, values the identity."""
    size = 256
    model = build(hidden_size=size, num_attention_heads=1, num_hidden_layers=1, attention_probs_dropout_prob=0.3)
    attention = model.encoder.layer[0].attention.self.train()
    attention.pos_dropout.eval()
    with torch.no_grad():
        for projection in (attention.query_proj, attention.key_proj, attention.value_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.value_proj.weight.fill_diagonal_(1.0)
    dk.patch(attention, strict=True)

    def draw(batch: int) -> torch.Tensor:
        hidden = torch.eye(size).expand(batch, size, size)
        table = model.encoder.rel_embeddings.weight
        context, _ = attention(hidden, torch.ones(batch, 1, 1, size), rel_embeddings=table)
        assert sum(dk.stats()["calls"].values()) > 0
        return context

    draw.value_weight = attention.value_proj.weight
    return draw


def test_ten_million_draws_keep_the_share_that_was_asked_for(probe):
    torch.manual_seed(3)
    draws, kept, calls, batch = 0, 0, 20, 8
    with torch.no_grad():
        for _ in range(calls):
            context = probe(batch)
            kept += int((context != 0).sum())
            draws += context.numel()
    assert draws > 1e7
    rate = 1 - threshold(0.3) / 65536
    assert abs(kept / draws - rate) < 4 * (rate * (1 - rate) / draws) ** 0.5
    assert abs(rate - 0.7) < 1e-5
    values = context[context != 0]
    torch.testing.assert_close(values, torch.full_like(values, keep_scale(0.3) / 256))


def test_backward_drops_what_the_forward_dropped(probe):
    context = probe(1)
    # dv = probabilities^T dout, and the hidden states are the identity: the weight's gradient is the probabilities.
    context.backward(torch.eye(256)[None])
    assert torch.equal(probe.value_weight.grad != 0, context[0] != 0)
    torch.testing.assert_close(probe.value_weight.grad, context[0].detach())


def test_position_dropout_is_applied_and_its_hook_sees_all_rows(build, batch):
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
    assert shapes == [(32, 32)] * 2
    assert not torch.equal(*out)


def error(actual: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    difference = (actual.double() - truth).abs()
    return difference.max().item(), difference.mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_low_precision_has_the_dtypes_and_at_most_the_errors_of_before(dtype, autocast, train, build, batch):
    model, inputs = build(conv_kernel_size=0).eval(), batch()
    if not autocast:
        model = model.to(dtype)

    def run(model: Any, autocast: bool) -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(train), torch.autocast("cpu", dtype, enabled=autocast):
            out = model(**inputs).last_hidden_state
        if not train:
            return {"out": out}
        model.zero_grad()
        out.float().square().mean().backward()
        return {"out": out.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}

    truth = run(copy.deepcopy(model).double(), False)
    contexts: list[torch.dtype] = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda m, args, out: contexts.append(out[0].dtype))
    eager = run(model, autocast)
    dk.patch(model, strict=True)
    fused = run(model, autocast)
    assert contexts == [dtype, dtype]
    assert [x.dtype for x in fused.values()] == [x.dtype for x in eager.values()]
    means = torch.zeros(2)
    for name, exact in truth.items():
        (eager_max, eager_mean), (fused_max, fused_mean) = (error(x[name], exact) for x in (eager, fused))
        largest = exact.abs().max().item()
        assert fused_max <= (2 if name == "out" else 3) * (eager_max + torch.finfo(dtype).eps * largest), name
        means += torch.tensor([fused_mean, eager_mean]) / largest
    assert means[0] <= 1.1 * means[1]  # of all tensors together: some have too few elements for a mean of their own


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


@pytest.mark.no_kernels
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
