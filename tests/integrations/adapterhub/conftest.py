"""AdapterHub's models, small: with one adapter or a composition, plain, in float64 and fused in any order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import deberta_kernels as dk
from tests import needs


def pytest_ignore_collect() -> bool | None:
    """Leave this folder out where AdapterHub's package is not installed."""
    return needs.missing("adapters") or None


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.fixture
def adapt(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build a small model with adapters: adapt({name: config}, setup, order=None, **settings).

    The base model, the adapters' weights and everything random in them are the same on every call. `order` says when
    the model is patched; None leaves it as it is. All parameters want gradients.
    """

    def adapt(configs: dict[str, Any], setup: Any, order: str | None = None, **settings: Any) -> Any:
        import adapters

        head = settings.pop("head", "DebertaV2Model")
        if order == "patch_all first":
            dk.patch_all(strict=True)
        model = build(head, **settings)
        if order == "patch first":
            dk.patch(model, strict=True)
        adapters.init(model)
        if order == "patch between":
            dk.patch(model, strict=True)
        torch.manual_seed(3)
        for name, config in configs.items():
            model.add_adapter(name, config=config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(f".{adapter}." in name for adapter in configs):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)
        model.set_active_adapters(setup)
        if order == "adapters first":
            assert dk.patch(model, strict=True).patched == 2
        if order == "patch_all last":
            dk.patch_all(strict=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    return adapt


@pytest.fixture
def results() -> Callable[..., dict[str, torch.Tensor]]:
    """Run a model forward and backward: results(model, inputs) -> its outputs, in one, and every gradient by name."""

    def results(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model.train()
        out = model(**inputs)
        values = out if isinstance(out, tuple) else out.values()
        states = torch.cat([value.flatten() for value in values if isinstance(value, torch.Tensor)])
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
        (states * weights).sum().backward()
        found = {"states": states.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
                parameter.grad = None
        return found

    return results


@pytest.fixture
def in_float64(results: Callable[..., Any], in_double: Callable[[Any], Any]) -> Callable[..., dict[str, torch.Tensor]]:
    """Run a plain model in float64, the truth; AdapterHub makes a few tensors in torch's default dtype."""

    def in_float64(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.set_default_dtype(torch.float64)
        try:
            return results(in_double(model), inputs)
        finally:
            torch.set_default_dtype(torch.float32)

    return in_float64


@pytest.fixture
def compare(assert_within_budget: Callable[..., None]) -> Callable[..., None]:
    """Hold all results of a fused model to the budget: compare(fused, eager, truth)."""

    def compare(fused: dict[str, Any], eager: dict[str, Any], truth: dict[str, Any]) -> None:
        assert fused.keys() == eager.keys() == truth.keys()
        # Gradients through the same layers share their scale: one that is all but zero has rounding errors of others.
        scale = max(value.abs().max().item() for name, value in truth.items() if name != "states")
        for name, value in fused.items():
            assert_within_budget(name, value, eager[name], truth[name], 1.0 if name == "states" else scale)

    return compare


@pytest.fixture
def calls_per_layer() -> Callable[[], str]:
    """Say how many kernel calls each layer has made since the last reset, where nothing ran the original code."""

    def calls_per_layer() -> str:
        stats = dk.stats()
        assert stats["fallbacks"] == {}
        calls = sum(stats["calls"].values())
        assert calls > 0
        assert calls % 2 == 0
        return str(calls // 2)

    return calls_per_layer
