"""The tables of heads in docs/support.md, one for each series of transformers: every head is fused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk
from tests.checkout import ROOT
from tools.ecosystem_table import EcosystemTables

SERIES = "4.57" if transformers.__version__.startswith("4.57") else transformers.__version__.partition(".")[0]
# Names of classes, and what the models of a version have that the others have not.
VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("Deberta", {}),
    "v2": ("DebertaV2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "v3": ("DebertaV2", {}),
}
HEADS = {
    "Model": "no head",
    "ForMaskedLM": "masked language model",
    "ForSequenceClassification": "sequence classification",
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering",
    "ForMultipleChoice": "multiple choice",
}
MISSING = ("v1", "ForMultipleChoice")


@pytest.fixture(scope="module")
def support(request: pytest.FixtureRequest) -> Iterator[EcosystemTables]:
    tables = EcosystemTables(ROOT / "docs" / "support.md", request.config.getoption("--write-tables"))
    yield tables
    tables.save()


def answers(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model answers, and the gradient of its word embeddings."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    return out.detach(), next(model.parameters()).grad


CASES = [(version, head) for version in VERSIONS for head in HEADS if (version, head) != MISSING]


def test_transformers_has_no_other_heads():
    found = {name for name in dir(transformers) if name.startswith(("DebertaFor", "DebertaV2For"))}
    assert found == {VERSIONS[version][0] + head for version, head in CASES if head != "Model"}


@pytest.mark.parametrize(("version", "head"), CASES)
def test_every_head_of_every_version_is_fused(version, head, build, batch, support):
    prefix, settings = VERSIONS[version]
    stock, inputs = build(prefix + head, **settings), batch(3, 19)
    if head == "ForMultipleChoice":
        inputs = {name: torch.stack([value, value.flip(0)], 1) for name, value in inputs.items()}
    patched = copy.deepcopy(stock)
    assert dk.patch(patched, strict=True).left_alone == {}
    expected, found = answers(stock, inputs), answers(patched, inputs)
    assert sum(dk.stats()["calls"].values()) == stock.config.num_hidden_layers
    assert dk.stats()["fallbacks"] == {}
    torch.testing.assert_close(found[0], expected[0], atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4 * float(expected[1].abs().max()), rtol=1e-3)
    support.report(f"heads-{SERIES}", ("transformers", "torch"), HEADS[head], version, "fused")
