"""`DebertaV2AdapterModel`, and the life of adapters in a patched model: as AdapterHub's class, in every member used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.models.patched_class import Patched
from tests import needs

adapters = needs.package("adapters")
from deberta_kernels.integrations.adapters import DebertaV2AdapterModel

PACKAGES = ("adapters", "transformers", "torch")
PREFIX = adapters.PrefixTuningConfig(prefix_length=7, flat=True)
CONFIGS: dict[str, Any] = {
    "seq_bn": "seq_bn",
    "lora": "lora",
    "prefix_tuning": PREFIX,
    "prompt_tuning": adapters.PromptTuningConfig(prompt_length=6),
}
HEADS: dict[str, Callable[[Any], None]] = {
    "classification": lambda model: model.add_classification_head("task", num_labels=3),
    "multi-label": lambda model: model.add_classification_head("task", num_labels=3, multilabel=True),
    "tagging": lambda model: model.add_tagging_head("task", num_labels=3),
    "question answering": lambda model: model.add_qa_head("task"),
    "multiple choice": lambda model: model.add_multiple_choice_head("task", num_choices=2),
    "masked LM": lambda model: model.add_masked_lm_head("task"),
}


def make(cls: Any, config: Any, adapter: Any, head: str = "classification") -> Any:
    """Return a model of the class, the same weights on every call, with one adapter and one head, in training."""
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config))
    torch.manual_seed(3)
    model.add_adapter("task", config=adapter)
    HEADS[head](model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".task." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.train_adapter("task")
    return model.train()


@pytest.fixture
def pair(build) -> Callable[..., tuple[Any, Any]]:
    """Return AdapterHub's model and the fused one with equal weights: pair(adapter, head="classification")."""

    def pair(adapter: Any, head: str = "classification", **settings: Any) -> tuple[Any, Any]:
        config = build(**settings).config
        return make(adapters.DebertaV2AdapterModel, config, adapter, head), make(
            DebertaV2AdapterModel, config, adapter, head
        )

    return pair


def flat(out: Any) -> torch.Tensor:
    return torch.cat([x.flatten() for x in out.values() if isinstance(x, torch.Tensor)])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


def predict(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return flat(model(**inputs))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_predicts_and_trains_alike(head, method, pair, batch, calls_per_layer, tables):
    plain, fused = pair(CONFIGS[method], head)
    inputs = batch(2 if head == "multiple choice" else 3, 29)
    if head == "multiple choice":
        inputs = {name: value.view(1, 2, -1) for name, value in inputs.items()}
    results = []
    for model in (plain, fused):
        dk.reset_stats()
        out = model(**inputs)
        value = flat(out)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        (value * weights).sum().backward()
        results.append((value, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    close(results[1][0], results[0][0])
    assert results[1][1].keys() == results[0][1].keys()
    scale = max(grad.abs().max() for grad in results[0][1].values())
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name] / scale, grad / scale, atol=1e-5, rtol=1e-3, msg=name)
    tables.report("adapterhub-heads", PACKAGES, head, method, calls_per_layer())


def test_the_class_is_adapterhubs_in_every_respect_but_the_code_that_runs(pair):
    plain, fused = pair("lora")
    assert isinstance(fused, adapters.DebertaV2AdapterModel)
    assert type(fused).__name__ == type(plain).__name__
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert set(dir(plain)) <= set(dir(fused))
    assert fused.adapter_summary(as_dict=True) == plain.adapter_summary(as_dict=True)
    with pytest.raises(TypeError, match="unexpected keyword"):
        DebertaV2AdapterModel(plain.config, colour="red")
    with pytest.raises(ValueError, match="backend must be one of"):
        DebertaV2AdapterModel(plain.config, backend="abacus")


def test_unpatch_gives_adapterhubs_code_back_exactly(pair, batch):
    plain, fused = pair(PREFIX)
    close(predict(fused, batch()), predict(plain, batch()))
    assert dk.unpatch(fused) == 3
    assert not any(isinstance(module, Patched) for module in fused.modules())
    assert torch.equal(predict(fused, batch()), predict(plain, batch()))
    classes = [type(module).__qualname__ for module in plain.deberta.modules()]
    assert [type(module).__qualname__ for module in fused.deberta.modules()] == classes


@pytest.mark.parametrize("own", [True, False], ids=["our class", "AdapterHub's class"])
def test_models_and_adapters_saved_load_in_either_class(own, pair, batch, tmp_path):
    plain, fused = pair(PREFIX)
    expected = predict(plain, batch())
    fused.save_pretrained(tmp_path / "model")
    fused.save_all_adapters(tmp_path / "adapters")
    fused.save_head(tmp_path / "head", "task")
    close(predict(fused, batch()), expected)  # saving unlinks the prefixes, and links them again
    cls = DebertaV2AdapterModel if own else adapters.DebertaV2AdapterModel
    loaded = cls.from_pretrained(tmp_path / "model", **({"strict": True} if own else {}))
    loaded.set_active_adapters("task")
    close(predict(loaded, batch()), expected)
    torch.manual_seed(0)
    fresh = cls(copy.deepcopy(plain.config))
    fresh.deberta.load_state_dict(plain.deberta.state_dict(), strict=False)
    fresh.load_adapter(str(tmp_path / "adapters" / "task"), set_active=True)
    close(predict(fresh, batch()), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_training_takes_the_same_steps(method, pair, batch):
    plain, fused = pair(CONFIGS[method])
    losses = []
    for model in (plain, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        mine = []
        for _ in range(3):
            loss = model(**batch(), labels=torch.tensor([0, 2, 1])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine.append(loss.detach())
        losses.append(torch.stack(mine))
    close(losses[1], losses[0])
    close(predict(fused, batch()), predict(plain, batch()))


def test_adapters_added_merged_switched_and_deleted_act_at_once(pair, batch):
    plain, fused = pair("lora")
    inputs = batch()

    def agree(different_from: torch.Tensor | None = None) -> torch.Tensor:
        expected = predict(plain, inputs)
        for _ in range(2):
            close(predict(fused, inputs), expected)
        assert different_from is None or not torch.allclose(expected, different_from, atol=1e-4)
        return expected

    on = agree()
    for model in (plain, fused):
        model.merge_adapter("task")
    close(agree(), on)
    for model in (plain, fused):
        model.reset_adapter()
    close(agree(), on)
    for model in (plain, fused):
        model.set_active_adapters(None)
        model.active_head = "task"
    off = agree(different_from=on)
    with adapters.AdapterSetup("task"):
        close(agree(), on)
    for model in (plain, fused):
        torch.manual_seed(9)
        model.add_adapter("second", config=PREFIX)
        model.set_active_adapters("second")
        model.active_head = "task"
    agree(different_from=off)
    for model in (plain, fused):
        torch.manual_seed(10)
        model.add_adapter("third", config="lora")
        model.average_adapter("mean", ["task", "third"], weights=[0.5, 0.5])
        model.set_active_adapters("mean")
        model.active_head = "task"
    agree(different_from=off)
    for model in (plain, fused):
        for name in ("second", "third", "mean"):
            model.delete_adapter(name)
        model.set_active_adapters("task")
    close(agree(), on)
    assert dk.stats()["fallbacks"] == {}


@pytest.mark.parametrize("method", ["seq_bn", "lora", "prefix_tuning"])
def test_checkpointing_gives_the_same_gradients(method, pair, batch):
    gradients = []
    for model in pair(CONFIGS[method]):
        model.gradient_checkpointing_enable()
        model(**batch(), labels=torch.tensor([0, 2, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=3e-5, rtol=1e-3, msg=name)


def test_a_copy_is_fused_and_independent(pair, batch):
    _, fused = pair(PREFIX)
    expected = predict(fused, batch())
    twin = copy.deepcopy(fused)
    fused.delete_adapter("task")
    dk.reset_stats()
    close(predict(twin, batch()), expected)
    assert sum(dk.stats()["calls"].values()) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(dtype, pair, batch):
    plain, fused = pair(PREFIX)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-6  # eager's scale is float32
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            expected, actual = predict(plain, batch()), predict(fused, batch())
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    expected, actual = predict(plain.to(dtype), batch()), predict(fused.to(dtype), batch())
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_no_mask_is_built_of_n_by_n_elements(pair, batch, monkeypatch):
    _, fused = pair(PREFIX)
    encoder = type(fused.deberta.encoder)
    for name in ("get_attention_mask", "get_rel_pos"):
        monkeypatch.setattr(encoder, name, lambda *a, **k: pytest.fail("built a tensor of N x N elements"))
    predict(fused, batch())
