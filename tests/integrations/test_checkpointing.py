"""Gradient checkpointing of a patched model, reentrant and not: the gradients of the plain run, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deberta_kernels as dk

DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}


def gradients(model: Any, inputs: dict[str, torch.Tensor], autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**inputs)[0]
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def checkpoint(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, {"share_att_key": False, "norm_rel_ebd": "none", "conv_kernel_size": 3}])
@pytest.mark.parametrize("dropout", [{}, DROPOUT])
@pytest.mark.parametrize("unpad", [True, False])
def test_gradients_have_the_bits_of_the_plain_run(reentrant, settings, dropout, unpad, build, batch):
    model, inputs = build(num_hidden_layers=3, **settings, **dropout).train(), batch()
    dk.patch(model, strict=True, unpad=unpad)
    expected = gradients(model, inputs)
    checkpoint(model, reentrant)
    dk.reset_stats()
    actual = gradients(model, inputs)
    assert sum(dk.stats()["calls"].values()) == 6  # each layer once more, in the backward
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bits_are_the_same_in_low_precision(reentrant, autocast, build, batch):
    model, inputs = build(**DROPOUT).train(), batch()
    if not autocast:
        model = model.bfloat16()
    dk.patch(model, strict=True)
    expected = gradients(model, inputs, autocast)
    checkpoint(model, reentrant)
    assert_same_bits(gradients(model, inputs, autocast), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_parts_and_adapters_on_top_of_them(reentrant, build, batch):
    import peft

    inputs = batch()
    model = build("DebertaV2ForSequenceClassification", **DROPOUT).train()
    dk.patch(model, strict=True)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
    model = peft.get_peft_model(model, settings)
    expected = gradients(model, inputs)
    assert any("lora_A" in name for name in expected)
    checkpoint(model, reentrant)
    model.enable_input_require_grads()  # a reentrant checkpoint of frozen embeddings needs it, patched or not
    assert_same_bits(gradients(model, inputs), expected)


def test_as_transformers_sets_it_up_by_default(build, batch):
    model, inputs = build().train(), batch()
    dk.patch(model, strict=True)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert_same_bits(gradients(model, inputs), expected)


def test_under_patch_all(build, batch):
    model, inputs = build(**DROPOUT).train(), batch()
    dk.patch_all(strict=True)
    expected = gradients(model, inputs)
    checkpoint(model, True)
    assert_same_bits(gradients(model, inputs), expected)


@pytest.mark.no_kernels
def test_the_original_code_raises_with_reentrant_checkpoints(build, batch):
    """What users of transformers meet; when this fails, the special case for it can go."""
    model, inputs = build().train(), batch()
    checkpoint(model, True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(model, inputs)
