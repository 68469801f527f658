"""AdapterHub's models: their attention has a forward of its own, so they run it, and say so; never another one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import deberta_kernels as dk
from deberta_kernels import dispatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    adapters = pytest.importorskip(
        "adapters", reason="adapters is not installed, or does not import with this transformers", exc_type=ImportError
    )

METHODS = ["seq_bn", "prefix_tuning", "lora", "ia3", "prompt_tuning", "mam", "unipelt", "loreft"]


def prepare(model: Any, method: str) -> Any:
    adapters.init(model)
    torch.manual_seed(3)
    model.add_adapter("task", config=method)
    for name, parameter in model.named_parameters():
        if "lora" in name or "prefix" in name or "adapter" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_active_adapters("task")
    return model.eval()


def states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["adapters first", "patch first", "patch_all first", "patch_all last"])
def test_adapters_act_as_without_the_patch(method, order, build, batch):
    inputs = batch()
    base = build()
    plain, fused = copy.deepcopy(base), copy.deepcopy(base)
    expected = states(prepare(plain, method), inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if order == "patch first":
            dk.patch(fused)
        if order == "patch_all first":
            dk.patch_all()
        prepare(fused, method)
        if order == "adapters first":
            report = dk.patch(fused)
            assert report.patched == 0
            assert len(report.left_alone) == 3
            assert "AdapterHub's attention" in str(report)
        if order == "patch_all last":
            dk.patch_all()
        actual = states(fused, inputs)
    assert torch.equal(actual, expected)
    assert any(w.category is dispatch.DebertaKernelsWarning for w in caught)
    assert sum(dk.stats()["calls"].values()) == 0
    assert type(fused.encoder.layer[0].attention.self).__name__ == "DisentangledSelfAttentionWithAdapters"


def test_strict_refuses_adapterhub(build, batch):
    model = prepare(build(), "lora")
    with pytest.raises(NotImplementedError, match="AdapterHub's attention"):
        dk.patch(model, strict=True)
    dk.patch_all(strict=True)
    with pytest.raises(NotImplementedError, match="not Hugging Face's own"):
        model(**batch())


def test_unpatch_after_adapters_came_restores_what_is_left(build):
    model = build()
    dk.patch(model)
    prepare(model, "seq_bn")
    assert dk.unpatch(model) == 1
    assert type(model.encoder) is hf.DebertaV2Encoder


def test_an_adapter_model_class_runs_beside_patch_all(build, batch):
    config = build().config
    dk.patch_all()
    torch.manual_seed(0)
    model = adapters.models.deberta_v2.DebertaV2AdapterModel(config)
    model.add_adapter("task", config="seq_bn")
    model.add_classification_head("task", num_labels=2)
    model.train_adapter("task")
    with pytest.warns(dispatch.DebertaKernelsWarning, match="not Hugging Face's own"):
        out = model(**batch(), labels=torch.tensor([0, 1, 0]))
    out.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "task" in n)
