"""What the tests of linear layers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deberta_kernels.linear import products

LINEARS = 6  # in one layer
TABLES = 2  # position tables of one layer, projected in training, and once in eval


def record_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the activation of each product of the native library will be added to."""
    seen: list[str] = []
    multiply = products._multiply

    def recording(*arguments: Any, gelu: bool = False, transposed: str = "") -> None:
        seen.append("gelu" if gelu else "none")
        multiply(*arguments, gelu=gelu, transposed=transposed)

    monkeypatch.setattr(products, "_multiply", recording)
    return seen


def states_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(**inputs, output_hidden_states=True).hidden_states)


def gradients_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).last_hidden_state.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
