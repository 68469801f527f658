"""A patched model computes the gradients somebody needs, and no other: frozen parts cost nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import dispatch
from deberta_kernels.impl import torch_tiled
from tests import needs

LAYERS = 3
NOTHING, EVERYTHING = "-", "q k v pos_key pos_query"
NAMES = EVERYTHING.split()


class Spy:
    """The torch backend, which also writes down what its backward was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def refusal(self, problem: Any) -> None:
        return None

    def forward(self, problem: Any) -> Any:
        return torch_tiled.forward(problem)

    def backward(self, problem: Any, dout: Any, dlse: Any, out: Any, lse: Any, needs: tuple[bool, ...]) -> Any:
        self.asked.append(" ".join(name for name, need in zip(NAMES, needs) if need))
        return torch_tiled.backward(problem, dout, dlse, out, lse, needs)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    dispatch.load("torch")
    monkeypatch.setitem(dispatch._loaded, "torch", spy)
    return spy


# What is trained (a pattern of names), whether projections are shared, what each layer is asked for from first to last.
CASES = {
    "everything": (".", True, [EVERYTHING] * LAYERS),
    "the head": ("classifier|pooler", True, []),
    "the last layer": (r"layer\.2\.|classifier", True, [EVERYTHING]),
    "its value projection": (r"layer\.2\.attention\.self\.value_proj", True, ["v"]),
    "its feed-forward block": (r"layer\.2\.(intermediate|output)", True, []),
    "its query projection": (r"layer\.2\.attention\.self\.query_proj", True, ["q pos_query"]),
    "its own query projection": (r"layer\.2\.attention\.self\.query_proj", False, ["q"]),
    "its own table projection": (r"layer\.2\.attention\.self\.pos_key_proj", False, ["pos_key"]),
    "the relative embeddings": (r"rel_embeddings", True, ["pos_key pos_query", EVERYTHING, EVERYTHING]),
    "all value projections": (r"value_proj", True, ["v", "q k v", "q k v"]),
    "all but the tables": (r"^(?!.*(rel_embeddings|encoder\.LayerNorm|pos_))", False, ["q k v"] * LAYERS),
    "layer norms": (r"output\.LayerNorm", True, ["q k v", "q k v"]),
}


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_only_gradients_somebody_needs_are_computed(case, unpad, spy, build, batch):
    pattern, shared, expected = CASES[case]
    head = "DebertaV2ForSequenceClassification"
    model = build(head, num_hidden_layers=LAYERS, share_att_key=shared).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
    dk.patch(model, backend="torch", strict=True, unpad=unpad)
    model(**batch()).logits.sum().backward()
    assert spy.asked[::-1] == expected
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_fewer_gradients_are_the_same_gradients(backend, build, batch):
    if backend == "cpu":
        needs.native_library()
    found = []
    for pattern in (".", "value_proj"):
        model = build().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(pattern, name) is not None)
        dk.patch(model, backend=backend, strict=True)
        model(**batch())[0].square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "value_proj" in n})
    assert len(found[1]) == 4
    for name, gradient in found[1].items():
        assert torch.equal(gradient, found[0][name]), name


def test_a_frozen_model_saves_nothing_for_backward(build, batch):
    model, inputs = build().train().requires_grad_(False), batch()
    dk.patch(model, strict=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(**inputs)
    assert saved == []
