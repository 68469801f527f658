"""Projected position tables: only reachable rows are projected, and what eval keeps is never out of date."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import deberta_kernels as dk
from deberta_kernels.models import position_tables as positions


def first_attention(model: Any) -> Any:
    return model.encoder.layer[0].attention.self


def last_state(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the rows [start, stop) of every projection that is computed."""
    rows: list[tuple[int, int]] = []
    original = positions._project

    def recording(module, projections, rel, window, spec, apply):
        rows.append(window)
        return original(module, projections, rel, window, spec, apply)

    monkeypatch.setattr(positions, "_project", recording)
    return rows


def test_only_reachable_rows_are_projected_in_training(build, batch, projected):
    model = build(position_buckets=16).train()
    dk.patch(model)
    model(**batch(2, 5))[0].sum().backward()
    assert projected == [(16 - 4, 16 + 5)] * 2
    grad = model.encoder.rel_embeddings.weight.grad
    assert grad[16 - 4 : 16 + 5].abs().sum() > 0
    assert grad[: 16 - 4].abs().sum() == 0
    assert grad[16 + 5 :].abs().sum() == 0


def test_eval_projects_once(build, batch, projected):
    model = build()
    dk.patch(model)
    for length in (37, 5, 37, 1, 60):
        last_state(model, batch(2, length))
    assert len(projected) == 2


def test_a_longer_text_projects_more_rows_once(build, batch, projected):
    model = build(position_buckets=-1, max_relative_positions=2000, max_position_embeddings=2000)
    inputs = batch(1, 600)
    expected = last_state(model, inputs)
    dk.patch(model)
    for length in (5, 600, 5, 600):
        last_state(model, batch(1, length))
    assert projected == [(2000 - 511, 2000 + 512)] * 2 + [(2000 - 1023, 2000 + 1024)] * 2
    torch.testing.assert_close(last_state(model, inputs), expected, atol=2e-5, rtol=1e-5)


def add_in_place(model):
    with torch.no_grad():
        first_attention(model).query_proj.weight.mul_(1.4)


def add_to_bias(model):
    with torch.no_grad():
        first_attention(model).key_proj.bias.add_(0.1)


def add_through_data(model):
    first_attention(model).key_proj.weight.data.mul_(1.5)


def one_element_through_data(model):
    first_attention(model).key_proj.weight.data[3, 7] += 0.5


def negate_through_data(model):
    first_attention(model).query_proj.weight.data.neg_()


def permute_through_data(model):
    weight = first_attention(model).query_proj.weight
    weight.data.copy_(weight.data.flip(0).clone())


def swap_columns_through_data(model):
    weight = first_attention(model).key_proj.weight
    weight.data.copy_(weight.data.flip(1).clone())


def swap_neighbouring_rows(model):
    data = first_attention(model).key_proj.weight.data
    data[[1, 2]] = data[[2, 1]]


def swap_neighbouring_columns(model):
    data = first_attention(model).query_proj.weight.data
    data[:, [1, 2]] = data[:, [2, 1]]


def swap_two_elements(model):
    data = first_attention(model).key_proj.bias.data
    data[[5, 6]] = data[[6, 5]]


def through_numpy(model):
    first_attention(model).key_proj.weight.detach().numpy()[5] *= 2


def replace_data(model):
    weight = first_attention(model).query_proj.weight
    weight.data = weight.data * 0.5


def replace_parameter(model):
    linear = first_attention(model).query_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 0.5)


def replace_module(model):
    torch.manual_seed(4)
    first_attention(model).key_proj = nn.Linear(32, 32)


def remove_bias(model):
    first_attention(model).key_proj.bias = None


def load_state(model):
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def load_state_by_assignment(model):
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=True)


def edit_rel_embeddings(model):
    model.encoder.rel_embeddings.weight.data.add_(torch.randn(32, 32))


def edit_layer_norm(model):
    model.encoder.LayerNorm.weight.data.mul_(1.3)


def to_double_and_back(model):
    model.double()
    model.float()
    first_attention(model).key_proj.weight.data.mul_(0.7)


def optimizer_step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    ids = torch.arange(3, 20)[None]
    model(ids)[0].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def add_hook(model):
    first_attention(model).key_proj.register_forward_hook(lambda module, args, output: output + 0.3)


def add_parametrization(model):
    parametrize.register_parametrization(first_attention(model).query_proj, "weight", nn.Softshrink(0.05))


def wrap_projection(model):
    linear = first_attention(model).query_proj
    first_attention(model).query_proj = nn.Sequential(linear, nn.Tanh())


EDITS: list[Callable[[Any], None]] = [
    add_in_place, add_to_bias, add_through_data, one_element_through_data, negate_through_data, permute_through_data,
    swap_columns_through_data, swap_neighbouring_rows, swap_neighbouring_columns, swap_two_elements, through_numpy,
    replace_data, replace_parameter, replace_module, remove_bias, load_state, load_state_by_assignment,
    edit_rel_embeddings, edit_layer_norm, to_double_and_back, optimizer_step, add_hook, add_parametrization,
    wrap_projection,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("inference", [False, True])
def test_kept_tables_follow_every_change(edit, inference, build, batch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)

    def run(one):
        with torch.inference_mode(inference), torch.no_grad():
            return one(**inputs).last_hidden_state

    before = run(model)
    run(model)
    torch.manual_seed(0)
    edit(model)
    torch.manual_seed(0)
    edit(plain)
    expected = run(plain)
    assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(run(model), expected, atol=3e-5, rtol=1e-4)


def test_edits_inside_inference_mode_are_seen(build, batch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)
    with torch.inference_mode():
        model(**inputs)
        for one in (model, plain):
            first_attention(one).query_proj.weight.mul_(1.7)
        torch.testing.assert_close(model(**inputs)[0], plain(**inputs)[0], atol=3e-5, rtol=1e-4)


def test_a_model_made_inside_inference_mode_runs(build, batch):
    inputs = batch()
    with torch.inference_mode():
        model = build()
        expected = model(**inputs)[0]
        dk.patch(model)
        for _ in range(2):
            torch.testing.assert_close(model(**inputs)[0], expected, atol=3e-5, rtol=1e-4)


def test_tables_kept_in_inference_mode_serve_a_differentiable_call(build, batch):
    model, inputs = build().requires_grad_(False), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)
    with torch.inference_mode():
        model(**inputs)
    gradients = []
    for one in (plain, model):
        embeddings = one.embeddings.word_embeddings(inputs["input_ids"]).requires_grad_()
        one(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0].square().sum().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def test_autocast_on_and_off(build, batch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            actual, expected = last_state(model, inputs), last_state(plain, inputs)
        tolerance = 0.1 if enabled else 3e-5
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_train_and_eval_by_turns(build, batch, projected):
    model, inputs = build(hidden_dropout_prob=0.5), batch()
    dk.patch(model)
    first = last_state(model, inputs)
    model.train()
    assert not torch.equal(last_state(model, inputs), last_state(model, inputs))
    model.eval()
    assert torch.equal(last_state(model, inputs), first)
    assert len(projected) == 2 + 4 + 2


def kept_for(model):
    return sum(module in positions._kept for module in model.modules())


def test_a_call_in_training_drops_the_tables(build, batch):
    model, inputs = build(), batch()
    dk.patch(model)
    last_state(model, inputs)
    assert kept_for(model) == 2
    last_state(model.train(), inputs)
    assert kept_for(model) == 0


@pytest.mark.parametrize("everywhere", [False, True])
def test_undoing_a_patch_drops_the_tables(everywhere, build, batch):
    model = build()
    if everywhere:
        dk.patch_all()
    else:
        dk.patch(model)
    last_state(model, batch())
    assert kept_for(model) == 2
    tables = weakref.ref(positions._kept[first_attention(model)].tables.pos_key)
    if everywhere:
        dk.unpatch_all()
    else:
        dk.unpatch(model)
    assert kept_for(model) == 0
    gc.collect()
    assert tables() is None


def test_dropout_switched_on_alone_is_drawn_anew(build, batch):
    """Monte-Carlo dropout: the model is in eval, its dropouts are not."""
    model, inputs = build(hidden_dropout_prob=0.5), batch()
    dk.patch(model)
    last_state(model, inputs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(last_state(model, inputs), last_state(model, inputs))


def test_gradients_in_eval_reach_the_projections(build, batch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)
    last_state(model, inputs)
    for one in (plain, model):
        one(**inputs)[0].square()[..., 0].sum().backward()
    left, right = (first_attention(one).key_proj.weight.grad for one in (plain, model))
    torch.testing.assert_close(right, left, atol=1e-4, rtol=1e-3)


def test_moving_between_dtypes(build, batch):
    model, inputs = build(), batch()
    dk.patch(model)
    reference = last_state(model, inputs)
    for dtype, tolerance in ((torch.float64, 3e-5), (torch.bfloat16, 0.25), (torch.float32, 0.1)):
        model.to(dtype)
        out = last_state(model, inputs)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), reference, atol=tolerance, rtol=tolerance)


def test_two_modules_do_not_share_tables_and_none_outlives_its_module(build, batch):
    gc.collect()
    elsewhere, inputs = len(positions._kept), batch()
    models = [build(), build()]
    first_attention(models[1]).key_proj.weight.data.mul_(2)
    expected = [last_state(model, inputs) for model in models]
    for model in models:
        dk.patch(model)
        last_state(model, inputs)
    for model, before in zip(models, expected, strict=True):
        torch.testing.assert_close(last_state(model, inputs), before, atol=3e-5, rtol=1e-4)
    assert len(positions._kept) == elsewhere + 4
    del models, model
    gc.collect()
    assert len(positions._kept) == elsewhere


def test_threads_share_a_model(build, batch):
    model = build()
    dk.patch(model)
    expected = {length: last_state(build(), batch(2, length)) for length in (3, 17, 60)}
    errors: list[str] = []

    def serve(length):
        for _ in range(10):
            if not torch.allclose(last_state(model, batch(2, length)), expected[length], atol=3e-5):
                errors.append(str(length))

    threads = [threading.Thread(target=serve, args=(length,)) for length in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_read_too(value, build, batch):
    model, inputs = build(), batch()
    dk.patch(model)
    first_attention(model).key_proj.weight.data[3, 7] = value
    for _ in range(2):
        assert last_state(model, inputs).isnan().any()
    first_attention(model).key_proj.weight.data[3, 7] = 0.1
    assert last_state(model, inputs).isfinite().all()
