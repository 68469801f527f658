"""DeBERTa v1 runs through the same kernels: its packed projections, linear positions, and calls it alone refuses."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from transformers.models.deberta import modeling_deberta as hf

import deberta_kernels as dk
from deberta_kernels import dispatch
from deberta_kernels.models import packing
from deberta_kernels.models import position_tables as positions

CONFIGS = {
    "base": {},
    "longer-than-the-table": {"max_relative_positions": 12},
    "as-long-as-the-table": {"max_relative_positions": 37},
    "one-token": {"length": 1},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c"},
    "no-terms": {"pos_att_type": []},
    "terms-none": {"pos_att_type": None},
    "unknown-terms": {"pos_att_type": ["p2p", "c2p"]},
    "list-of-one-string": {"pos_att_type": ["c2p|p2c"]},
    "no-relative-attention": {"relative_attention": False},
    "biased-input": {"position_biased_input": True, "type_vocab_size": 2},
    "odd-head-size": {"hidden_size": 39, "num_attention_heads": 3, "embedding_size": 24},
}
HEADS = ("DebertaForMaskedLM", "DebertaForSequenceClassification", "DebertaForTokenClassification")
WARNING = dispatch.DebertaKernelsWarning


@pytest.fixture
def build_one(build):
    """Build a small random DeBERTa v1: build_one(head="DebertaModel", **config)."""
    return lambda head="DebertaModel", **settings: build(head, **settings)


def calls() -> int:
    return sum(dk.stats()["calls"].values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_outputs_and_gradients_equal_those_before(
    name, padding, build_one, batch, run, in_double, assert_within_budget
):
    settings = dict(CONFIGS[name])
    inputs = batch(3, settings.pop("length", 37), padding)
    model = build_one(**settings)
    truth_states, truth_grads = run(in_double(model), inputs)
    eager_states, eager_grads = run(model, inputs)
    assert dk.patch(model, strict=True).patched == 2
    states, grads = run(model, inputs)
    for layer, state in enumerate(states):
        assert_within_budget(f"state {layer}", state, eager_states[layer], truth_states[layer])
    largest = max(grad.abs().max().item() for grad in truth_grads.values() if grad is not None)
    for parameter, grad in grads.items():
        if eager_grads[parameter] is None:
            assert grad is None, parameter
        else:
            # Gradients of scores cancel where one token attends to itself; what was subtracted gives their scale.
            cancelled = truth_grads[parameter].abs().max().item() < 1e-9
            scale = largest if cancelled else 1.0
            assert_within_budget(parameter, grad, eager_grads[parameter], truth_grads[parameter], scale)
    assert calls() == 2


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "sample"])
def test_every_mask_gives_the_same_eval_outputs(padding, unpad, build_one, batch, run, in_double, assert_within_budget):
    model, inputs = build_one(), batch(4, 41, padding)
    with torch.no_grad():
        truth, _ = run(in_double(model), inputs, grad=False)
        eager, _ = run(model, inputs, grad=False)
        dk.patch(model, strict=True, unpad=unpad)
        for _ in range(2):  # the second run reads kept position tables
            states, _ = run(model, inputs, grad=False)
            for layer, state in enumerate(states):
                assert_within_budget(f"state {layer}", state, eager[layer], truth[layer])


def test_position_tables_are_kept_in_eval_and_follow_the_weights(build_one, batch):
    model = build_one()
    plain = copy.deepcopy(model)
    dk.patch(model, strict=True)
    attention = model.encoder.layer[1].attention.self
    with torch.no_grad():
        model(**batch())
        kept = positions._kept[attention]
        model(**batch(2, 11))
        assert positions._kept[attention] is kept
        for one in (plain, model):
            one.encoder.layer[1].attention.self.pos_q_proj.weight.data.mul_(3.0)
        expected, actual = plain(**batch()).last_hidden_state, model(**batch()).last_hidden_state
    assert positions._kept[attention] is not kept
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


def test_padding_is_left_out_of_the_whole_encoder(build_one, batch, monkeypatch):
    model, sizes = build_one(), []
    original = packing.Packing.pack
    monkeypatch.setattr(packing.Packing, "pack", lambda self, x: sizes.append(x.shape) or original(self, x))
    dk.patch(model, strict=True, unpad=True, fast_linears=False)
    with torch.no_grad():
        model(**batch(3, 37))
    assert sizes == [(3, 37, 32)]  # once, for both layers


@pytest.mark.parametrize("head", HEADS)
def test_heads_give_the_same_loss_and_gradients(head, build_one, batch):
    model, inputs = build_one(head, num_labels=3), batch(3, 23)
    labels = torch.tensor([0, 1, 2]) if "Sequence" in head else inputs["input_ids"] % 3
    plain = copy.deepcopy(model)
    dk.patch(model, strict=True)
    expected, actual = plain(**inputs, labels=labels), model(**inputs, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits, atol=3e-5, rtol=1e-4)
    expected.loss.backward()
    actual.loss.backward()
    for (name, before), after in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (before.grad is None) == (after.grad is None), name
        if before.grad is not None:
            torch.testing.assert_close(after.grad, before.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_patching_is_undone_exactly_and_survives_copies(build_one, batch):
    model, inputs = build_one(), batch()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        dk.patch(model, strict=True)
        fused = model(**inputs).last_hidden_state
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            dk.reset_stats()
            assert torch.equal(twin(**inputs).last_hidden_state, fused)
            assert calls() == 2
        assert dk.unpatch(model) == 3
        assert type(model.encoder) is hf.DebertaEncoder
        assert torch.equal(model(**inputs).last_hidden_state, before)


def test_patch_all_reaches_both_versions_and_undoes_it(build, build_one, batch):
    models, inputs = [build(), build_one()], batch()
    forwards = (hf.DisentangledSelfAttention.forward, hf.DebertaEncoder.forward)
    with torch.no_grad():
        before = [model(**inputs).last_hidden_state for model in models]
        dk.patch_all(strict=True)
        for model, expected in zip(models, before, strict=True):
            dk.reset_stats()
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=3e-5, rtol=1e-5)
            assert calls() == 2
    dk.unpatch_all()
    assert (hf.DisentangledSelfAttention.forward, hf.DebertaEncoder.forward) == forwards


def test_one_patch_reaches_both_versions(build, build_one):
    report = dk.patch(nn.ModuleList([build(), build_one()]), strict=True)
    assert (report.patched, report.encoders, report.left_alone) == (4, 2, {})


def test_talking_heads_are_left_alone_and_reported(build, build_one, batch):
    model, inputs = build_one(talking_head=True), batch()
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with pytest.warns(WARNING, match="talking_head mixes the scores of different heads"):
            report = dk.patch(model)
        assert report.patched == 0
        assert set(report.left_alone) == {f"encoder.layer.{i}.attention.self" for i in range(2)}
        assert torch.equal(model(**inputs).last_hidden_state, before)
        with pytest.raises(NotImplementedError, match="talking_head"):
            dk.patch(model, strict=True)
        assert dk.patch(nn.ModuleList([model, build()])).patched == 2
        dk.patch_all(fast_linears=False)
        assert torch.equal(model(**inputs).last_hidden_state, before)
    assert [reason.partition(";")[0] for reason in dk.stats()["fallbacks"]][-1].startswith("talking_head")
    assert calls() == 0


def test_a_hook_on_the_probabilities_runs_the_original_code(build_one, batch):
    model, inputs = build_one(), batch()
    seen = []
    model.encoder.layer[0].attention.self.dropout.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        dk.patch(model)
        with pytest.warns(WARNING, match="a hook on the attention dropout"):
            after = model(**inputs).last_hidden_state
    assert torch.equal(*seen)  # position terms included
    torch.testing.assert_close(after, before, atol=3e-5, rtol=1e-5)
    assert calls() == 1


def test_attentions_are_those_from_before(build_one, batch):
    model, inputs = build_one(), batch()
    before = model(**inputs, output_attentions=True).attentions
    dk.patch(model)
    with pytest.warns(WARNING, match="attention probabilities were asked for"):
        after = model(**inputs, output_attentions=True).attentions
    assert all(map(torch.equal, after, before))


def test_a_bare_module_has_position_terms_only_from_relative_pos(build_one):
    attention = build_one().encoder.layer[0].attention.self
    hidden, table, mask = torch.randn(2, 9, 32), torch.randn(128, 32), torch.ones(2, 1, 9, 9)
    distances = (torch.arange(9)[:, None] - torch.arange(9))[None]
    with torch.no_grad():
        without, _ = attention(hidden, mask, rel_embeddings=table)
        given, _ = attention(hidden, mask, relative_pos=distances, rel_embeddings=table)
        dk.patch(attention)
        torch.testing.assert_close(attention(hidden, mask, rel_embeddings=table)[0], without)
        assert calls() == 1
        actual, _ = attention(hidden, mask, relative_pos=distances, rel_embeddings=table)
        assert calls() == 2
        torch.testing.assert_close(actual, given)
        with pytest.warns(WARNING, match="a relative_pos tensor was given that holds other values"):
            attention(hidden, mask, relative_pos=distances + 1, rel_embeddings=table)
    assert not torch.allclose(given, without, atol=1e-2)


def test_query_states_fail_as_they_did(build_one):
    encoder = build_one().encoder
    hidden, mask = torch.randn(2, 9, 32), torch.ones(2, 9)
    with pytest.raises(RuntimeError) as before:
        encoder(hidden, mask, query_states=hidden.clone())
    dk.patch(encoder)
    with pytest.warns(WARNING, match="query_states were given to DeBERTa v1"), pytest.raises(RuntimeError) as after:
        encoder(hidden, mask, query_states=hidden.clone())
    assert str(after.value) == str(before.value)


@pytest.mark.parametrize("kind", ["3d", "4d"])
def test_the_encoder_takes_masks_of_pairs(kind, build_one, in_double, assert_within_budget):
    encoder = build_one().encoder
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 19, 32, generator=generator)
    mask = torch.rand(2, 19, 19, generator=generator) > 0.4
    mask = mask if kind == "3d" else mask.unsqueeze(1)
    with torch.no_grad():
        truth = in_double(encoder)(hidden.double(), mask).last_hidden_state
        eager = encoder(hidden, mask).last_hidden_state
        dk.patch(encoder, strict=True)
        actual = encoder(hidden, mask).last_hidden_state
    assert_within_budget("output", actual, eager, truth)
    assert calls() == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_gradients_of_the_plain_run(reentrant, build_one, batch, run):
    model, inputs = build_one(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2).train(), batch()
    dk.patch(model, strict=True)
    torch.manual_seed(0)
    _, expected = run(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    dk.reset_stats()
    torch.manual_seed(0)
    _, actual = run(model, inputs)
    assert calls() == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_as_close_to_the_truth_as_eager(dtype, build_one, batch, run, in_double):
    model, inputs = build_one().to(dtype), batch()
    with torch.no_grad():
        truth, eager = run(in_double(model), inputs, False)[0][-1], run(model, inputs, False)[0][-1]
        dk.patch(model, strict=True)
        actual = run(model, inputs, False)[0][-1]
    assert actual.dtype == dtype
    errors = [(out.double() - truth).abs() for out in (actual, eager)]
    assert errors[0].mean() <= 1.1 * errors[1].mean()
    assert errors[0].max() <= 2 * errors[1].max()


def test_autocast_attends_in_its_dtype(build_one, batch):
    model, inputs = build_one(), batch(3, 37, "none")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dk.patch(model, strict=True, backend="reference")
        expected = model(**inputs).last_hidden_state
        dk.patch(model, strict=True)
        actual = model(**inputs).last_hidden_state
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=5e-2, rtol=5e-2)


def test_compile_makes_one_graph(build_one, batch):
    torch._dynamo.reset()
    model = build_one(num_hidden_layers=1)
    plain = copy.deepcopy(model)
    dk.patch(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (9, 23, 80):
        dk.reset_stats()
        expected, actual = (one(**batch(2, length)).last_hidden_state for one in (plain, compiled))
        assert calls() == 1
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.no_kernels
@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_original_code(strict, build_one, batch):
    model, inputs = build_one(), batch()
    arguments = (inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        try:
            torch.export.export(model, arguments, strict=strict)
        except torch._dynamo.exc.Unsupported as error:  # strict, torch 2.9: not this model's slices by tensors
            dk.patch(model)
            with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(str(error).splitlines()[0])):
                torch.export.export(model, arguments, strict=strict)
            return
        dk.patch(model, strict=True)
        program = torch.export.export(model, arguments, strict=strict)
        assert "deberta_kernels" not in str(program.graph)
        actual = program.module()(*arguments).last_hidden_state
        torch.testing.assert_close(actual, model(*arguments).last_hidden_state, atol=3e-5, rtol=1e-4)
    assert calls() == 2


def test_lora_on_the_packed_projection_takes_part(build_one, batch):
    import peft

    config = peft.LoraConfig(target_modules=["in_proj", "pos_proj", "pos_q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(build_one(), config).eval()
    with torch.no_grad():
        expected = model(**batch()).last_hidden_state
        with model.disable_adapter():
            off = model(**batch()).last_hidden_state
        dk.patch(model, strict=True)
        for _ in range(2):
            torch.testing.assert_close(model(**batch()).last_hidden_state, expected, atol=3e-5, rtol=1e-4)
            with model.disable_adapter():
                torch.testing.assert_close(model(**batch()).last_hidden_state, off, atol=3e-5, rtol=1e-4)
    assert not torch.allclose(expected, off, atol=1e-2)
    assert calls() == 8
