"""What the tests of linear layers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deberta_kernels.modules import products

LINEARS = 6  # in one layer
TABLES = 2  # position tables of one layer, projected in training, and once in eval


def record_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the activation of each product of oneDNN and of the native library will be added to."""
    seen: list[str] = []
    in_onednn, natively = products._operator(), products.natively

    def recording(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[3])
        return in_onednn(*arguments)

    def recording_natively(x: Any, weight: Any, bias: Any, gelu: bool = False) -> torch.Tensor:
        seen.append("gelu" if gelu else "none")
        return natively(x, weight, bias, gelu)

    monkeypatch.setattr(products, "_operator", lambda: recording)
    monkeypatch.setattr(products, "natively", recording_natively)
    return seen


def states_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(**inputs, output_hidden_states=True).hidden_states)


def gradients_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).last_hidden_state.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
