"""The stand-alone module: Hugging Face's parameter names and signature without its code."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import deberta_kernels as dk
from deberta_kernels import dispatch

SETTINGS = [
    {},
    {"share_att_key": False},
    {"share_att_key": False, "pos_att_type": ["c2p"]},
    {"pos_att_type": None},
    {"relative_attention": False},
    {"position_buckets": -1, "max_relative_positions": 6},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_takes_the_weights_and_gives_the_outputs(settings, build):
    config = build(**settings).config
    theirs = hf.DisentangledSelfAttention(config).eval()
    ours = dk.DisentangledSelfAttention(config).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 11, 32)
    mask = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    mask[1, :, 7:] = False
    mask[1, :, :, 7:] = False
    table = torch.randn(32, 32) if config.relative_attention else None
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected, _ = theirs(hidden, mask, relative_pos=None, rel_embeddings=table)
            actual, probabilities = ours(hidden, mask, rel_embeddings=table)
        assert probabilities is None
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    expected.square().sum().backward()
    actual.square().sum().backward()
    used = {name for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    for name, parameter in ours.named_parameters():
        if name in used:
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, atol=1e-4, rtol=1e-3, msg=name)


def test_the_signature_is_hugging_faces():
    ours, theirs = (inspect.signature(c.forward) for c in (dk.DisentangledSelfAttention, hf.DisentangledSelfAttention))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


REQUESTS = {
    "probabilities": lambda hidden: {"output_attentions": True},
    "other distances": lambda hidden: {"relative_pos": torch.randint(-30, 30, (1, 11, 11))},
    "distances of each sample": lambda hidden: {"relative_pos": torch.randint(-30, 30, (11, 11), dtype=torch.int32)},
    "other queries": lambda hidden: {"query_states": hidden.flip(1), "output_attentions": True},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("settings", [{}, {"share_att_key": False, "pos_att_type": ["c2p"]}, {"position_buckets": -1}])
def test_what_no_kernel_computes_runs_in_full(settings, request_, build):
    config = build(**settings).config
    theirs, ours = hf.DisentangledSelfAttention(config).eval(), dk.DisentangledSelfAttention(config).eval()
    ours.load_state_dict(theirs.state_dict())
    hidden, table = torch.randn(2, 11, 32), torch.randn(2 * theirs.pos_ebd_size, 32)
    mask = torch.ones(2, 1, 11, 11, dtype=torch.bool)
    mask[1, :, :, 7:] = False
    more = request_(hidden)
    expected, probabilities = theirs(hidden, mask, rel_embeddings=table, **more)
    with pytest.warns(dispatch.DebertaKernelsWarning):
        actual, seen = ours(hidden, mask, rel_embeddings=table, **more)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert (seen is None) == (probabilities is None)
    if seen is not None:
        torch.testing.assert_close(seen, probabilities, atol=1e-6, rtol=1e-4)
    assert sum(dk.stats()["calls"].values()) == 0


def test_fewer_queries_are_computed_without_p2c_only(build):
    hidden, table = torch.randn(1, 5, 32), torch.randn(32, 32)
    ours = dk.DisentangledSelfAttention(build(pos_att_type=["c2p"]).config).eval()
    whole, _ = ours(hidden, None, rel_embeddings=table)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="differ in shape"):
        part, _ = ours(hidden, None, query_states=hidden[:, :3], rel_embeddings=table)
    torch.testing.assert_close(part, whole[:, :3], atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="query_states must have as many tokens as hidden_states, 5"):
        dk.DisentangledSelfAttention(build().config)(hidden, None, query_states=hidden[:, :3], rel_embeddings=table)


@pytest.mark.parametrize("settings", [{}, {"share_att_key": False}, {"position_buckets": -1}, {"pos_att_type": []}])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_it_serves_in_an_encoder_that_is_not_patched(settings, length, build, batch):
    model, inputs = build(conv_kernel_size=3, **settings), batch(3, length)
    expected = model(**inputs, output_attentions=True)
    for layer in model.encoder.layer:
        ours = dk.DisentangledSelfAttention(model.config).eval()
        ours.load_state_dict(layer.attention.self.state_dict())
        layer.attention.self = ours
    torch.testing.assert_close(model(**inputs)[0], expected[0], atol=3e-5, rtol=1e-4)
    assert dk.stats()["fallbacks"] == {}
    assert sum(dk.stats()["calls"].values()) == 2
    with pytest.warns(dispatch.DebertaKernelsWarning, match="attention probabilities were asked for"):
        actual = model(**inputs, output_attentions=True)
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


def test_it_copies_and_pickles(build):
    ours = dk.DisentangledSelfAttention(build().config, backend="reference").eval()
    hidden, table = torch.randn(1, 5, 32), torch.randn(32, 32)
    expected, _ = ours(hidden, None, rel_embeddings=table)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(hidden, None, rel_embeddings=table)[0], expected)
    assert dk.stats()["calls"]["reference"] == 3


def test_it_serves_inside_a_model_that_is_patched(build, batch):
    model, inputs = build(), batch()
    with torch.no_grad():
        expected = model(**inputs)[0]
        ours = dk.DisentangledSelfAttention(model.config).eval()
        ours.load_state_dict(model.encoder.layer[0].attention.self.state_dict())
        model.encoder.layer[0].attention.self = ours
        report = dk.patch(model, strict=True)
        assert report.patched == 1
        torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-5, rtol=1e-4)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads = 5, got 32"):
        dk.DisentangledSelfAttention(transformers.DebertaV2Config(hidden_size=32, num_attention_heads=5))
    with pytest.raises(ValueError, match="backend must be one of"):
        dk.DisentangledSelfAttention(transformers.DebertaV2Config(hidden_size=32, num_attention_heads=4), "gpu")


BAD = [
    ("num_attention_heads", 0, ValueError, "must be at least 1, got 0"),
    ("num_attention_heads", 4.0, TypeError, "must be an int, got 4.0"),
    ("hidden_size", None, TypeError, "must be an int, got None"),
    ("attention_head_size", -8, ValueError, "must be at least 1, got -8"),
    ("pos_att_type", 3, TypeError, "must be a list of strings, got 3"),
    ("pos_att_type", [1, "c2p"], TypeError, "must be a list of strings"),
    ("position_buckets", 1, ValueError, "must be at least 2, or below 1"),
    ("position_buckets", 2.5, TypeError, "must be an int, got 2.5"),
    ("max_relative_positions", "512", TypeError, "must be an int, got '512'"),
    ("max_position_embeddings", 0, ValueError, "must be at least 1, got 0"),
    ("hidden_dropout_prob", -0.1, ValueError, "must be between 0 and 1, got -0.1"),
    ("attention_probs_dropout_prob", float("nan"), ValueError, "must be between 0 and 1, got nan"),
    ("attention_probs_dropout_prob", "0.1", TypeError, "must be a number, got '0.1'"),
]


@pytest.mark.parametrize(("name", "value", "kind", "text"), BAD)
def test_bad_fields_of_a_configuration_are_named(build, name, value, kind, text):
    config = copy.deepcopy(build().config)
    config.max_relative_positions = -1
    vars(config)[name] = value  # past the configuration's own checks, which not every version has
    with pytest.raises(kind, match=f"^{name} {text}.*; "):
        dk.DisentangledSelfAttention(config)


def test_terms_that_are_not_known_are_ignored(build):
    config = copy.deepcopy(build().config)
    vars(config)["pos_att_type"] = ["c2p", "p2p"]
    ours = dk.DisentangledSelfAttention(config)
    assert ours.pos_att_type == ["c2p", "p2p"]


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 1, 6), (2, 3, 5, 5), (3, 2, 5, 5), (1, 3, 1, 1, 5)])
def test_a_mask_of_another_shape_is_named_as_it_was_given(shape, build):
    ours = dk.DisentangledSelfAttention(build().config)
    hidden, table = torch.randn(3, 5, 32), torch.randn(32, 32)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, 1, 1, N\)") as caught:
        ours(hidden, torch.ones(shape), rel_embeddings=table)
    assert f"got {shape}; pass mask[:, None, None, :]" in str(caught.value)
    assert "(3, 4, 5, 5)" in str(caught.value)


def test_a_token_mask_is_taken_as_the_message_says(build):
    ours = dk.DisentangledSelfAttention(build().config).eval()
    hidden, table = torch.randn(3, 5, 32), torch.randn(32, 32)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    out, _ = ours(hidden, mask[:, None, None, :], rel_embeddings=table)
    alone, _ = ours(hidden[:1, :3], None, rel_embeddings=table)
    torch.testing.assert_close(out[:1, :3], alone, atol=1e-5, rtol=1e-4)
