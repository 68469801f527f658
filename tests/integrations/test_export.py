"""Exported models: a patched one gives the graph of the stock one, to torch.export and to ONNX, and its answers."""

from __future__ import annotations

import collections
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import deberta_kernels as dk
from tests import needs

pytestmark = pytest.mark.no_kernels

ANY = torch.export.Dim.DYNAMIC
NAMES = ("input_ids", "attention_mask")
HEADS = ("DebertaV2Model", "DebertaV2ForSequenceClassification", "DebertaV2ForTokenClassification", "DebertaModel")


def both(build: Any, head: str, **settings: Any) -> tuple[Any, Any]:
    """A stock model, and a patched one of the same weights."""
    stock = build(head, **settings)
    patched = copy.deepcopy(stock)
    assert dk.patch(patched, strict=True).patched > 0
    return stock, patched


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any-length"])
@pytest.mark.parametrize("head", HEADS)
def test_torch_export_gives_the_stock_graph(head, dynamic, build, batch):
    inputs = tuple(batch(2, 9).values())
    shapes = {name: {0: ANY, 1: ANY} for name in NAMES} if dynamic else None
    programs = []
    for model in both(build, head):
        with torch.no_grad():
            programs.append(torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False))
    assert operators(programs[0]) == operators(programs[1])
    assert not any("deberta_kernels" in name for name in operators(programs[1]))
    if dynamic:
        longer = batch(3, 23)
        with torch.no_grad():
            expected = build(head)(**longer)[0]
            torch.testing.assert_close(programs[1].module()(*longer.values())[0], expected, atol=2e-5, rtol=1e-4)


def test_a_model_that_was_exported_is_still_patched(build, batch):
    _, patched = both(build, "DebertaV2Model")
    with torch.no_grad():
        torch.export.export(patched, tuple(batch(2, 9).values()), strict=False)
        dk.reset_stats()
        patched(**batch(2, 9))
    assert sum(dk.stats()["calls"].values()) == patched.config.num_hidden_layers
    assert dk.stats()["fallbacks"] == {}


def written(model: Any, inputs: dict[str, torch.Tensor], file: Path, dynamo: bool) -> Path:
    """Export a model to ONNX, for any number of texts of any length."""
    axes = {name: {0: "texts", 1: "tokens"} for name in NAMES}
    shapes = {"dynamic_shapes": {name: {0: ANY, 1: ANY} for name in NAMES}} if dynamo else {"dynamic_axes": axes}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", dk.DebertaKernelsWarning)
        torch.onnx.export(
            model, tuple(inputs.values()), str(file), input_names=list(NAMES), output_names=["answer"], dynamo=dynamo,
            **shapes, verbose=False,
        )  # fmt: skip
    return file


@pytest.mark.packages("onnx")
def test_onnx_by_tracing_is_the_stock_file_to_the_byte(build, batch, tmp_path):
    settings = {"return_dict": False}
    inputs = batch(2, 9)
    files = [
        written(model, inputs, tmp_path / f"{i}.onnx", dynamo=False).read_bytes()
        for i, model in enumerate(both(build, "DebertaV2ForSequenceClassification", **settings))
    ]
    assert files[0] == files[1]


@pytest.mark.packages("onnx", "onnxscript")
def test_onnx_by_torch_export_has_the_stock_operators(build, batch, tmp_path):
    onnx = needs.package("onnx")
    counted = []
    for i, model in enumerate(both(build, "DebertaV2ForSequenceClassification", num_hidden_layers=2)):
        file = written(model, batch(2, 9), tmp_path / f"{i}.onnx", dynamo=True)
        graph = onnx.load(str(file))
        assert {(x.domain, x.version) for x in graph.opset_import if x.domain not in ("", "ai.onnx")} == set()
        counted.append(collections.Counter(node.op_type for node in graph.graph.node))
    assert counted[0] == counted[1]


@pytest.mark.packages("onnx", "onnxruntime")
def test_an_onnx_file_of_a_patched_model_gives_its_answers(build, batch, tmp_path):
    runtime = needs.package("onnxruntime")
    _, patched = both(build, "DebertaV2ForSequenceClassification", return_dict=False)
    file = written(patched, batch(2, 9), tmp_path / "model.onnx", dynamo=False)
    longer = batch(3, 23)
    feeds = {name: value.numpy() for name, value in longer.items()}
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    with torch.no_grad():
        expected = patched(**longer)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-5, rtol=1e-4)
