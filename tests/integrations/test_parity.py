"""A patched model gives Hugging Face's outputs, on real and padded rows, and its gradients, over the configurations."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk

CONFIGS = {
    "v3": {},
    "v3-long": {"length": 90},
    "v3-one-token": {"length": 1},
    "xlarge-conv": {"conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 8},
    "xxlarge-conv-groups": {"conv_kernel_size": 5, "conv_groups": 2, "num_hidden_layers": 3},
    "unshared": {"share_att_key": False},
    "unshared-c2p": {"share_att_key": False, "pos_att_type": ["c2p"]},
    "unshared-p2c": {"share_att_key": False, "pos_att_type": "p2c"},
    "shared-c2p": {"pos_att_type": "c2p"},
    "shared-p2c": {"pos_att_type": ["p2c"]},
    "no-terms": {"pos_att_type": []},
    "terms-none": {"pos_att_type": None},
    "unknown-terms": {"pos_att_type": ["p2p", "c2p"]},
    "list-of-one-string": {"pos_att_type": ["c2p|p2c"]},
    "linear-positions": {"position_buckets": -1, "max_relative_positions": 12},
    "linear-positions-default": {"position_buckets": -1, "length": 50},
    "odd-buckets": {"position_buckets": 3, "max_relative_positions": 7},
    "buckets-beyond-maximum": {"position_buckets": 20, "max_relative_positions": 11},
    "no-norm": {"norm_rel_ebd": "none"},
    "no-norm-conv": {"norm_rel_ebd": "none", "conv_kernel_size": 3, "share_att_key": False},
    "no-relative-attention": {"relative_attention": False},
    "biased-input": {"position_biased_input": True, "type_vocab_size": 2, "share_att_key": False},
    "wide-heads": {"num_attention_heads": 1},
    "narrow-heads": {"num_attention_heads": 16},
    "odd-head-size": {"hidden_size": 39, "num_attention_heads": 3, "embedding_size": 24},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_outputs_and_gradients_equal_those_before(name, padding, build, batch, run, in_double, assert_within_budget):
    settings = dict(CONFIGS[name])
    inputs = batch(3, settings.pop("length", 37), padding)
    model = build(**settings)
    truth_states, truth_grads = run(in_double(model), inputs)
    eager_states, eager_grads = run(model, inputs)
    report = dk.patch(model)
    assert report.patched == model.config.num_hidden_layers
    states, grads = run(model, inputs)

    for layer, state in enumerate(states):
        assert_within_budget(f"state {layer}", state, eager_states[layer], truth_states[layer])
    largest = max(grad.abs().max().item() for grad in truth_grads.values() if grad is not None)
    for parameter, grad in grads.items():
        if eager_grads[parameter] is None:
            assert grad is None, parameter
        else:
            truth = truth_grads[parameter]
            # One token attends to itself whatever its scores: these gradients are differences that cancel, exactly
            # so in eager. What is left of them is measured by what was subtracted.
            cancelled = truth.abs().max().item() < 1e-9
            assert_within_budget(parameter, grad, eager_grads[parameter], truth, largest if cancelled else 1.0)
    calls = dk.stats()
    assert sum(calls["calls"].values()) == report.patched
    assert calls["fallbacks"] == {}


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "sample"])
@pytest.mark.parametrize("conv", [0, 3])
def test_every_mask_gives_the_same_eval_outputs(padding, conv, build, batch, run, in_double, assert_within_budget):
    model = build(conv_kernel_size=conv)
    inputs = batch(4, 41, padding)
    with torch.no_grad():
        truth, _ = run(in_double(model), inputs, grad=False)
        eager, _ = run(model, inputs, grad=False)
        dk.patch(model, strict=True)
        for _ in range(2):  # the second run reads kept position tables
            states, _ = run(model, inputs, grad=False)
            for layer, state in enumerate(states):
                assert_within_budget(f"state {layer}", state, eager[layer], truth[layer])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8, torch.bfloat16])
def test_the_dtype_of_the_mask_does_not_matter(dtype, build, batch):
    model = build()
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        dk.patch(model, strict=True)
        actual = model(inputs["input_ids"], attention_mask=inputs["attention_mask"].to(dtype)).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_a_model_without_a_mask_attends_to_everything(build, batch):
    model = build()
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        dk.patch(model, strict=True)
        torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=2e-5, rtol=1e-5)


def _encoder_mask(kind: str, size: int, length: int, heads: int) -> torch.Tensor:
    keep = torch.rand(size, length, length, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[0, 5] = False  # a row that may attend to nothing
    if kind == "3d-bool":
        return keep
    if kind == "3d-float":
        return keep.float()
    if kind == "4d":
        return keep.unsqueeze(1)
    if kind == "per-head":
        return torch.stack([keep.roll(h, -1) for h in range(heads)], dim=1)
    return keep[:, :1].unsqueeze(1) | (torch.arange(length) == 3)  # (B, 1, 1, N): keys only


@pytest.mark.parametrize("kind", ["3d-bool", "3d-float", "4d", "per-head", "keys-only"])
def test_the_encoder_takes_masks_of_pairs(kind, build, in_double, assert_within_budget):
    encoder = build().encoder
    hidden = torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(5))
    mask = _encoder_mask(kind, 2, 19, 4)
    with torch.no_grad():
        truth = in_double(encoder)(hidden.double(), mask).last_hidden_state
        eager = encoder(hidden, mask).last_hidden_state
        dk.patch(encoder, strict=True)
        actual = encoder(hidden, mask).last_hidden_state
    assert_within_budget("output", actual, eager, truth)
    assert sum(dk.stats()["calls"].values()) == 2


def test_a_keys_only_mask_reaches_the_model(build, batch):
    model = build()
    inputs = batch()
    mask = inputs["attention_mask"][:, None, None, :]
    with torch.no_grad():
        expected = model(inputs["input_ids"], attention_mask=mask).last_hidden_state
        dk.patch(model, strict=True)
        actual = model(inputs["input_ids"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


HEADS = {
    "DebertaV2ForMaskedLM": "tokens",
    "DebertaV2ForSequenceClassification": "class",
    "DebertaV2ForTokenClassification": "tokens",
    "DebertaV2ForQuestionAnswering": "span",
    "DebertaV2ForMultipleChoice": "choice",
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("legacy", [True, False])
def test_every_head_class_gives_the_same_loss_and_logits(head, legacy, build, batch):
    model = build(head, legacy=legacy, num_labels=2 if HEADS[head] == "span" else 3)
    inputs = batch(4, 23)
    labels: dict[str, Any] = {
        "tokens": {"labels": inputs["input_ids"] % 3},
        "class": {"labels": torch.tensor([0, 1, 2, 0])},
        "span": {"start_positions": torch.tensor([1, 2, 0, 1]), "end_positions": torch.tensor([3, 4, 2, 1])},
        "choice": {"labels": torch.tensor([1, 0])},
    }[HEADS[head]]
    if head == "DebertaV2ForMultipleChoice":
        inputs = {name: value.view(2, 2, -1) for name, value in inputs.items()}
    plain = copy.deepcopy(model)
    dk.patch(model, strict=True)
    if head == "DebertaV2ForMaskedLM" and not legacy and transformers.__version__.startswith("4."):
        # The new head of transformers 4 does not run.
        with pytest.raises(RuntimeError) as error:
            plain(**inputs, **labels)
        with pytest.raises(RuntimeError, match=re.escape(str(error.value))):
            model(**inputs, **labels)
        return
    expected = plain(**inputs, **labels)
    actual = model(**inputs, **labels)
    assert type(actual) is type(expected)
    for before, after in zip(expected.to_tuple(), actual.to_tuple(), strict=True):
        torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)
    expected.loss.backward()
    actual.loss.backward()
    for (name, before), after in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (before.grad is None) == (after.grad is None), name
        if before.grad is not None:
            torch.testing.assert_close(after.grad, before.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("states", [True, False])
def test_tuples_and_dicts_have_the_same_parts(states, build, batch):
    model = build()
    inputs = batch()
    for return_dict in (True, False):
        settings = {"output_hidden_states": states, "return_dict": return_dict}
        with torch.no_grad():
            dk.unpatch(model)
            expected = model(**inputs, **settings)
            dk.patch(model, strict=True)
            actual = model(**inputs, **settings)
        assert type(actual) is type(expected)
        assert len(actual) == len(expected)
        if return_dict:
            assert list(actual.keys()) == list(expected.keys())
            assert (actual.hidden_states is None) == (not states)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_encoder_alone_returns_the_same_parts(states, return_dict, build):
    encoder = build().encoder
    hidden, mask = torch.randn(2, 9, 32), torch.ones(2, 9)
    settings = {"output_hidden_states": states, "return_dict": return_dict}
    with torch.no_grad():
        expected = encoder(hidden, mask, **settings)
        dk.patch(encoder, strict=True)
        actual = encoder(hidden, mask, **settings)
    assert type(actual) is type(expected)
    assert len(actual) == len(expected)
    assert sum(dk.stats()["calls"].values()) == 2


def test_query_states_of_equal_length_go_through_the_kernel(build):
    encoder = build().encoder
    hidden, queries, mask = torch.randn(2, 9, 32), torch.randn(2, 9, 32), torch.ones(2, 9)
    with torch.no_grad():
        expected = encoder(hidden, mask, query_states=queries).last_hidden_state
        dk.patch(encoder, strict=True)
        actual = encoder(hidden, mask, query_states=queries).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    assert sum(dk.stats()["calls"].values()) == 2


@pytest.mark.parametrize("terms", [["c2p", "p2c"], ["c2p"], []])
def test_an_empty_batch_of_hidden_states_gives_an_empty_result(terms, build):
    model = build(pos_att_type=terms)
    dk.patch(model)
    with torch.no_grad():
        out = model.encoder(torch.zeros(0, 7, 32), torch.ones(0, 7)).last_hidden_state
    assert out.shape == (0, 7, 32)
