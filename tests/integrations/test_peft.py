"""PEFT around a patched model, and a patch inside PEFT: the adapters act as they did, on and off."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import deberta_kernels as dk

QKV = ["query_proj", "key_proj", "value_proj"]
METHODS = {
    "lora": lambda: peft.LoraConfig(target_modules=QKV, r=4, init_lora_weights=False),
    "lora-default": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False),
    "lora-positions": lambda: peft.LoraConfig(
        target_modules=["pos_key_proj", "pos_query_proj"], r=4, init_lora_weights=False
    ),
    "lora-all-linear": lambda: peft.LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False
    ),
    "lora-dropout": lambda: peft.LoraConfig(target_modules=QKV, r=4, lora_dropout=0.0, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(target_modules=QKV, r=4, use_dora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key_proj", "value_proj"], feedforward_modules=[], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(target_modules=QKV, r=2, init_weights=False),
    "oft": lambda: peft.OFTConfig(target_modules=QKV, oft_block_size=4, init_weights=False),
    "layer-norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=QKV, init_r=4, total_step=10, init_lora_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=QKV, r=4, init_weights=False),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=5, encoder_hidden_size=8),
}
PACKAGES = ("peft", "transformers", "torch")


def build_pair(build: Any, method: str, order: str) -> tuple[Any, Any]:
    """Return the same model inside PEFT, once plain and once patched before or after PEFT came."""
    shared = method != "lora-positions"
    model = build("DebertaV2ForSequenceClassification", share_att_key=shared)
    pair = []
    for patched in (False, True):
        one = copy.deepcopy(model)
        if patched and order == "patch first":
            dk.patch(one)
        torch.manual_seed(7)
        one = peft.get_peft_model(one, METHODS[method]()).eval()
        if patched and order == "peft first":
            assert dk.patch(one).patched == 2
        pair.append(one)
    return pair[0], pair[1]


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("order", ["patch first", "peft first"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_evaluates_and_trains_alike(method, order, build, batch, tables):
    plain, fused = build_pair(build, method, order)
    inputs, labels = batch(), torch.tensor([0, 1, 0])
    for _ in range(2):
        torch.testing.assert_close(logits(fused, inputs), logits(plain, inputs), atol=3e-5, rtol=1e-4)
    assert sum(dk.stats()["calls"].values()) == 4
    assert dk.stats()["fallbacks"] == {}
    tables.report("peft-methods", PACKAGES, method, order, "1")
    for one in (plain, fused):
        one.train()
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.5)
        one(**inputs, labels=labels).loss.backward()
        grads = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        if one is plain:
            expected = grads
        else:
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(grad, expected[name], atol=3e-5, rtol=1e-3, msg=name)
        optimizer.step()
        one.eval()
    torch.testing.assert_close(logits(fused, inputs), logits(plain, inputs), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("order", ["patch first", "peft first"])
@pytest.mark.parametrize("method", ["lora", "lora-positions", "dora", "ia3"])
def test_kept_tables_follow_every_switch(method, order, build, batch):
    plain, fused = build_pair(build, method, order)
    inputs = batch()

    def agree(different_from: torch.Tensor | None = None) -> torch.Tensor:
        expected = logits(plain, inputs)
        for _ in range(2):
            torch.testing.assert_close(logits(fused, inputs), expected, atol=3e-5, rtol=1e-4)
        if different_from is not None:
            assert not torch.allclose(expected, different_from, atol=1e-4)
        return expected

    on = agree()
    with plain.disable_adapter(), fused.disable_adapter():
        off = agree(different_from=on)
    agree(different_from=off)
    for one in (plain, fused):
        one.base_model.merge_adapter()
    agree(different_from=off)
    for one in (plain, fused):
        one.base_model.unmerge_adapter()
    agree(different_from=off)
    for one in (plain, fused):
        torch.manual_seed(9)
        one.add_adapter("second", METHODS[method]())
        one.set_adapter("second")
    agree(different_from=on)
    for one in (plain, fused):
        one.set_adapter("default")
    torch.testing.assert_close(agree(), on)
    plain, fused = (one.merge_and_unload() for one in (plain, fused))
    agree(different_from=off)
    dk.unpatch(fused)
    torch.testing.assert_close(logits(fused, inputs), logits(plain, inputs), atol=1e-6, rtol=1e-5)


def test_an_adapter_saved_from_a_patched_model_loads_elsewhere(build, batch, tmp_path):
    plain, fused = build_pair(build, "lora", "peft first")
    fused.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(build("DebertaV2ForSequenceClassification"), tmp_path).eval()
    expected = logits(plain, batch())
    torch.testing.assert_close(logits(fresh, batch()), expected)
    dk.patch(fresh, strict=True)
    torch.testing.assert_close(logits(fresh, batch()), expected, atol=3e-5, rtol=1e-4)


def test_checkpointing_with_lora_trains(build, batch):
    plain, fused = build_pair(build, "lora", "peft first")
    grads = []
    for one in (plain, fused):
        one.train()
        if one is fused:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            one.enable_input_require_grads()
        one(**batch(), labels=torch.tensor([0, 1, 0])).loss.backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=3e-5, rtol=1e-3, msg=name)
