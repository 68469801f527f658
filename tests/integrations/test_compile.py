"""Compilers and tracers: torch.compile keeps one graph with the kernels in it; tracing and export see plain code."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import dispatch


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("everywhere", "settings"),
    [(False, {}), (True, {"conv_kernel_size": 3, "share_att_key": False, "norm_rel_ebd": "none"})],
)
def test_compile_makes_one_graph_forward_and_backward(everywhere, settings, build, batch):
    model = build(num_hidden_layers=1, **settings)
    plain = copy.deepcopy(model)
    if everywhere:
        dk.patch_all(strict=True)
    else:
        dk.patch(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dk.unpatch(plain)
    for length in (9, 23):
        inputs = batch(2, length)
        dk.reset_stats()
        actual = compiled(**inputs).last_hidden_state
        assert sum(dk.stats()["calls"].values()) == 1
        actual.sum().backward()
        gradient = model.encoder.rel_embeddings.weight.grad.clone()
        model.zero_grad()
        expected = plain(**inputs).last_hidden_state
        expected.sum().backward()
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, plain.encoder.rel_embeddings.weight.grad, atol=1e-4, rtol=1e-3)
        plain.zero_grad()


@pytest.mark.parametrize("buckets", [16, -1, 3])
def test_many_lengths_need_few_graphs(buckets, build, batch):
    model = build(position_buckets=buckets, num_hidden_layers=1)
    dk.patch(model, strict=True)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for length in (7, 15, 16, 17, 33, 60):
            inputs = batch(2, length)
            expected = model(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
    assert 1 <= len(graphs) <= 4
    assert all("deberta_kernels" in graph.code for graph in graphs)


def test_compile_with_dropout_draws_anew(build, batch):
    model = build(attention_probs_dropout_prob=0.5, num_hidden_layers=1).train()
    dk.patch(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first, second = (compiled(**batch()).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    assert sum(dk.stats()["calls"].values()) == 2


def test_compile_of_what_no_kernel_computes_runs_the_original_code(build, batch):
    model, inputs = build(num_hidden_layers=1), batch()
    dk.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual = compiled(**inputs, output_attentions=True).attentions
        expected = model(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_runs_the_kernels(build):
    attention = build().encoder.layer[0].attention.self
    hidden, mask, table = torch.randn(2, 9, 32), torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.randn(32, 32)
    with torch.no_grad():
        expected, _ = attention(hidden, mask, rel_embeddings=table)
        dk.patch(attention, strict=True)
        actual, _ = torch.compile(attention, fullgraph=True)(hidden, mask, rel_embeddings=table)
    assert sum(dk.stats()["calls"].values()) == 1
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_original_code(strict, build, batch):
    model, inputs = build(), batch()
    dk.patch(model, strict=True)
    names = {"attention_mask": inputs["attention_mask"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", dispatch.DebertaKernelsWarning)
        program = torch.export.export(model, (inputs["input_ids"],), names, strict=strict)
    assert "deberta_kernels" not in str(program.graph)
    with torch.no_grad():
        actual = program.module()(inputs["input_ids"], **names).last_hidden_state
        torch.testing.assert_close(actual, model(**inputs).last_hidden_state, atol=2e-5, rtol=1e-4)


def test_jit_tracing_takes_the_original_code(build, batch):
    model, inputs = build(return_dict=False), batch()
    dk.patch(model, strict=True, backend="torch")
    arguments = (inputs["input_ids"], inputs["attention_mask"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", dispatch.DebertaKernelsWarning)
        traced = torch.jit.trace(model, arguments)
    assert "deberta_kernels::" not in str(traced.inlined_graph)
    longer = batch(2, 50)
    with torch.no_grad():
        actual = traced(longer["input_ids"], longer["attention_mask"])[0]
        torch.testing.assert_close(actual, model(**longer)[0], atol=2e-5, rtol=1e-4)


def test_fake_tensors_find_the_shapes(build, batch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, inputs = build(), batch()
    dk.patch(model, strict=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        assert model(**fake).last_hidden_state.shape == (3, 37, 32)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).last_hidden_state).all()
