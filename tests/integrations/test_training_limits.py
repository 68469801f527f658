"""What training of a patched model must not hide: NaN, overflow, and derivatives that no kernel has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import deberta_kernels as dk

SAMPLE = 1  # the one that holds a NaN


def poisoned(model: Any, inputs: dict[str, torch.Tensor], token: int = 0) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeddings[SAMPLE, token, 3] = float("nan")
    return embeddings.requires_grad_()


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("padding", ["none", "right", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [0, 3])
def test_a_nan_stays_in_its_sample_forward_and_backward(unpad, padding, dtype, conv, build, batch):
    model, inputs = build(conv_kernel_size=conv).to(dtype).train(), batch(3, 37, padding)
    dk.patch(model, strict=True, unpad=unpad)
    token = int(inputs["attention_mask"][SAMPLE].nonzero()[0])
    found = []
    for embeddings in (poisoned(model, inputs, token), model.get_input_embeddings()(inputs["input_ids"]).detach()):
        embeddings.requires_grad_()
        out = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
        out.float().square().sum().backward()
        found.append((out.detach(), embeddings.grad))
    (out, gradient), (clean, clean_gradient) = found
    real = inputs["attention_mask"][SAMPLE].bool()
    assert out[SAMPLE][real].isnan().all()  # every token attends to the one
    assert gradient[SAMPLE][real].isnan().all()
    others = [row for row in range(3) if row != SAMPLE]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(gradient[others], clean_gradient[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scaler_sees_a_nan_and_skips_the_step(dtype, build, batch):
    model, inputs = build("DebertaV2ForSequenceClassification").train(), batch()
    dk.patch(model, strict=True)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = copy.deepcopy(model.state_dict())
    labels = torch.tensor([0, 1, 0])
    for clean in (False, True):
        embeddings = poisoned(model, inputs)
        embeddings = torch.nan_to_num(embeddings.detach()) if clean else embeddings
        with torch.autocast("cpu", dtype):
            loss = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], labels=labels).loss
        assert loss.isfinite() == clean
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 32.0  # halved once, and kept after the clean step
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same != clean


def test_half_precision_skips_no_more_steps_than_before(build, batch):
    inputs = batch(8, 12)
    labels = (inputs["input_ids"][:, 1] > 32).long()
    skipped, losses = [], []
    for patched in (False, True):
        model = build("DebertaV2ForSequenceClassification", initializer_range=0.4).train()
        if patched:
            dk.patch(model, strict=True)
        optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**24)
        count = 0
        for _ in range(30):
            with torch.autocast("cpu", torch.float16):
                loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            count += scaler.get_scale() < scale
        skipped.append(count)
        losses.append(loss.item())
    assert 0 < skipped[1] <= skipped[0]
    assert losses[1] < 0.2


def test_a_second_derivative_is_refused_by_name(build, batch):
    model, inputs = build().train(), batch()
    dk.patch(model, strict=True)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    out = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
    (first,) = torch.autograd.grad(out.square().sum(), embeddings, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative.*backend='reference'"):
        first.square().sum().backward()


def test_the_reference_backend_has_second_derivatives(build, batch):
    found = []
    for backend in (None, "reference"):
        model, inputs = build().double().train(), batch()
        if backend:
            dk.patch(model, strict=True, backend=backend)
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
        (first,) = torch.autograd.grad(out.square().sum(), embeddings, create_graph=True)
        found += torch.autograd.grad(first.square().sum(), embeddings)
    largest = found[0].abs().max().item()
    assert largest > 0
    # Hugging Face forms the scale of the scores in float32, even of a float64 model.
    torch.testing.assert_close(found[1], found[0], atol=1e-6 * largest, rtol=0)


@pytest.mark.no_kernels
@pytest.mark.parametrize("transform", ["jvp", "vmap", "jacfwd"])
def test_function_transforms_run_the_original_code(transform, build, batch):
    model, inputs = build(), batch(2, 9)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = inputs["attention_mask"]

    def run() -> torch.Tensor:
        def call(x: torch.Tensor) -> torch.Tensor:
            return model(inputs_embeds=x, attention_mask=mask)[0]

        if transform == "jvp":
            return torch.func.jvp(call, (embeddings,), (embeddings.flip(1),))[1]
        if transform == "vmap":
            return torch.vmap(call)(torch.stack([embeddings, 2 * embeddings]))
        return torch.func.jacfwd(lambda share: call(embeddings + share * embeddings.flip(1)))(torch.tensor(0.5))

    expected = run()
    assert expected.abs().max() > 0
    dk.patch(model, strict=True)
    torch.testing.assert_close(run(), expected)
    assert sum(dk.stats()["calls"].values()) == 0
