"""Every adapter method, whichever order it and the patch come in: forward, gradients, and what ran."""

from __future__ import annotations

import re

import pytest
import torch

import deberta_kernels as dk
from tests import needs

adapters = needs.package("adapters")

from tests.integrations.adapterhub.setups import METHODS, MODELS, PACKAGES

ORDERS = ("adapters first", "patch first", "patch_all first", "patch_all last")


# A cell that AdapterHub itself refuses runs none; `calls_per_layer` sees to the others.
@pytest.mark.no_kernels
@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_in_every_order(
    method, settings, adapt, batch, results, in_float64, compare, calls_per_layer, tables
):
    inputs, configs = batch(3, 29), {"task": METHODS[method]}
    try:
        eager_model = adapt(configs, "task", **MODELS[settings])
        eager = results(eager_model, inputs)
    except (AttributeError, RuntimeError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            results(adapt(configs, "task", "adapters first", **MODELS[settings]), inputs)
        tables.report("adapterhub-methods", PACKAGES, method, settings, "raises")
        return
    truth = in_float64(eager_model, inputs)
    for order in ORDERS:
        fused_model = adapt(configs, "task", order, **MODELS[settings])
        dk.reset_stats()
        compare(results(fused_model, inputs), eager, truth)
        calls = calls_per_layer()
        dk.unpatch_all()
    tables.report("adapterhub-methods", PACKAGES, method, settings, calls)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "unipelt"])
@pytest.mark.parametrize("padding", ["none", "left", "holes", "sample"])
def test_every_padding_keeps_its_meaning(method, padding, adapt, batch, results, in_float64, compare, calls_per_layer):
    inputs, configs = batch(3, 29, padding), {"task": METHODS[method]}
    eager_model = adapt(configs, "task")
    eager = results(eager_model, inputs)
    fused_model = adapt(configs, "task", "adapters first")
    dk.reset_stats()
    compare(results(fused_model, inputs), eager, in_float64(eager_model, inputs))
    expected = "1" if padding == "none" else {"prompt_tuning": "3"}.get(method, "2")
    assert calls_per_layer() == expected


def test_prefix_and_prompt_together(adapt, batch, results, in_float64, compare):
    inputs = batch(3, 29)
    config = adapters.ConfigUnion(METHODS["prompt_tuning"], METHODS["prefix_tuning"])
    eager_model = adapt({"task": config}, "task")
    eager = results(eager_model, inputs)
    fused_model = adapt({"task": config}, "task", "adapters first")
    compare(results(fused_model, inputs), eager, in_float64(eager_model, inputs))


@pytest.mark.parametrize(
    "settings",
    [
        {"pos_att_type": ["c2p"], "share_att_key": False},
        {"pos_att_type": ["p2c"], "share_att_key": False},
        {"pos_att_type": []},
        {"relative_attention": False, "norm_rel_ebd": "none", "position_biased_input": True},
        {"position_buckets": -1},
    ],
    ids=["c2p", "p2c", "no terms", "no positions", "linear"],
)
def test_prefixes_beside_every_kind_of_position(settings, adapt, batch, results, in_float64, compare):
    inputs, configs = batch(2, 29), {"task": METHODS["prefix_tuning"]}
    eager_model = adapt(configs, "task", **settings)
    eager = results(eager_model, inputs)
    fused_model = adapt(configs, "task", "adapters first", **settings)
    compare(results(fused_model, inputs), eager, in_float64(eager_model, inputs))


def test_attention_probabilities_run_the_original_code(adapt, batch):
    inputs, configs = batch(2, 29), {"task": METHODS["prefix_tuning"]}
    expected = adapt(configs, "task")(**inputs, output_attentions=True)
    model = adapt(configs, "task")
    dk.patch(model)
    with pytest.warns(dk.DebertaKernelsWarning, match="attention probabilities were asked for"):
        actual = model(**inputs, output_attentions=True)
    assert torch.equal(actual.attentions[1], expected.attentions[1])
    assert actual.attentions[1].shape == (2, 4, 29, 36)


def test_gating_scores_are_as_without_the_patch(adapt, batch):
    # With shared keys AdapterHub fails to stack the scores of its position tables on those of the batch.
    inputs, configs = batch(2, 29), {"task": METHODS["unipelt"]}
    found = []
    for order in (None, "adapters first"):
        with torch.no_grad():
            out = adapt(configs, "task", order, share_att_key=False)(**inputs, output_adapter_gating_scores=True)
        found.append(out.adapter_gating_scores["task"])
    plain, fused = found
    assert plain.keys() == fused.keys()
    for layer, scores in plain.items():
        for place, score in scores.items():
            torch.testing.assert_close(torch.tensor(fused[layer][place]), torch.tensor(score), msg=place)
