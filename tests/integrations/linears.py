"""What the tests of linear layers share."""

from __future__ import annotations

from typing import Any

import torch

LINEARS = 6  # in one layer
TABLES = 2  # position tables of one layer, projected in training, and once in eval


def states_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(**inputs, output_hidden_states=True).hidden_states)


def gradients_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).last_hidden_state.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
