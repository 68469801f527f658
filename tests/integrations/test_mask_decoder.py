"""The enhanced mask decoder against the formula written out over Hugging Face's own layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk

HEAD = "DebertaV2ForMaskedLM"
MASK = 1


@pytest.fixture
def masked(batch: Any) -> dict[str, torch.Tensor]:
    inputs = batch(3, 37)
    chosen = (torch.rand(3, 37, generator=torch.Generator().manual_seed(4)) < 0.3) & inputs["attention_mask"].bool()
    labels = torch.where(chosen, inputs["input_ids"], -100)
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(chosen, MASK), "labels": labels}


def written_out(decoder: Any, inputs: dict[str, torch.Tensor], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Microsoft's order of operations, with the outer product of masks and a tensor of relative positions."""
    model, mask = decoder.model, inputs["attention_mask"]
    encoder = model.deberta.encoder
    states = model.deberta(inputs["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    queries = decoder.position_embeddings.weight[: states.shape[1]] + states
    for _ in range(steps):
        queries = encoder.layer[-1](
            states, encoder.get_attention_mask(mask), query_states=queries, relative_pos=encoder.get_rel_pos(states),
            rel_embeddings=encoder.get_rel_embedding(),
        )[0]  # fmt: skip
    predict = model.cls if hasattr(model, "cls") else model.lm_predictions
    logits = predict(queries) if hasattr(model, "cls") else predict(queries, model.deberta.embeddings.word_embeddings)
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


def gradients(module: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"share_att_key": False, "conv_kernel_size": 3, "num_hidden_layers": 3}])
def test_it_is_the_formula_with_every_gradient(legacy, steps, settings, build, masked, in_double, assert_within_budget):
    if not legacy and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 ties a layer of its other head to the vocabulary; the model itself raises")
    decoder = dk.EnhancedMaskDecoder(build(HEAD, legacy=legacy, **settings), steps)
    exact = in_double(decoder)
    truth = gradients(exact, written_out(exact, masked, steps)[1])
    logits, loss = written_out(decoder, masked, steps)
    eager = gradients(decoder, loss)
    dk.patch(decoder, strict=True)
    dk.reset_stats()
    out = decoder(**masked)
    assert sum(dk.stats()["calls"].values()) == decoder.model.config.num_hidden_layers + steps
    wanted = masked["labels"].flatten() != -100
    torch.testing.assert_close(out.logits, logits.flatten(0, 1)[wanted], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, loss)
    fused = gradients(decoder, out.loss)
    assert fused.keys() == eager.keys()
    assert "position_embeddings.weight" in fused
    for name, gradient in fused.items():
        assert_within_budget(name, gradient, eager[name], truth[name])


@pytest.mark.no_kernels
def test_without_a_patch_it_is_the_same(build, masked):
    decoder = dk.EnhancedMaskDecoder(build(HEAD))
    logits, loss = written_out(decoder, masked, 2)
    torch.testing.assert_close(decoder(**masked).loss, loss)
    del masked["labels"]
    every = decoder(**masked).logits
    real = masked["attention_mask"].bool()
    torch.testing.assert_close(every[real], logits[real], atol=1e-5, rtol=1e-5)


def test_absolute_positions_matter_here_and_nowhere_else(build, masked):
    decoder = dk.EnhancedMaskDecoder(build(HEAD))
    dk.patch(decoder, strict=True)
    moved = torch.arange(37)[None] + 5
    plain, shifted = decoder(**masked).loss, decoder(**masked, position_ids=moved).loss
    assert (plain - shifted).abs() > 1e-4
    with torch.no_grad():
        decoder.position_embeddings.weight.zero_()
    assert torch.equal(decoder(**masked).loss, decoder(**masked, position_ids=moved).loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_give_the_gradients_of_the_plain_run(reentrant, build, masked):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    decoder = dk.EnhancedMaskDecoder(build(HEAD, **dropout)).train()
    dk.patch(decoder, strict=True)
    found = []
    for checkpoint in (False, True):
        if checkpoint:
            decoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(gradients(decoder, decoder(**masked).loss))
    differing = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    if not reentrant:
        assert differing == []
    # Reentrant checkpoints add up what the last layer's runs give to its weights in another order.
    assert all(".layer.1." in name for name in differing)
    for name in differing:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-6, rtol=1e-5)


def test_it_learns_and_the_model_goes_on_without_it(build, masked, tmp_path):
    from transformers import DebertaV2Model

    decoder = dk.EnhancedMaskDecoder(build(HEAD)).train()
    dk.patch(decoder, strict=True)
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = decoder(**masked).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    decoder.model.save_pretrained(tmp_path)
    assert DebertaV2Model.from_pretrained(tmp_path).config.num_hidden_layers == 2


@pytest.mark.no_kernels
def test_a_batch_without_labels_has_no_loss_and_finite_gradients(build, masked):
    decoder = dk.EnhancedMaskDecoder(build(HEAD))
    masked["labels"].fill_(-100)
    loss = decoder(**masked).loss
    assert loss == 0
    assert all(gradient.isfinite().all() for gradient in gradients(decoder, loss).values())


@pytest.mark.no_kernels
def test_models_with_positions_in_their_input_predict_from_the_last_layer(build, masked):
    model = build(HEAD, position_biased_input=True)
    decoder = dk.EnhancedMaskDecoder(model)
    assert [name for name, _ in decoder.named_parameters() if not name.startswith("model.")] == []
    torch.testing.assert_close(decoder(**masked).loss, model(**masked).loss)
    with pytest.raises(ValueError, match="this model has them in its input already"):
        decoder.decode(torch.zeros(1, 2, 32), torch.ones(1, 2))


def test_inputs_embeds_and_no_mask(build, masked):
    decoder = dk.EnhancedMaskDecoder(build(HEAD))
    dk.patch(decoder, strict=True)
    embeddings = decoder.model.get_input_embeddings()(masked["input_ids"])
    expected = decoder(masked["input_ids"], torch.ones(3, 37)).logits
    torch.testing.assert_close(decoder(inputs_embeds=embeddings).logits, expected)


def test_it_copies_and_pickles_with_its_model(build, masked):
    decoder = dk.EnhancedMaskDecoder(build(HEAD))
    dk.patch(decoder, strict=True)
    twin = copy.deepcopy(decoder)
    twin.load_state_dict(decoder.state_dict())
    assert torch.equal(twin(**masked).loss, decoder(**masked).loss)


def test_bad_arguments_are_refused_by_name(build):
    with pytest.raises(TypeError, match="model must be a DebertaV2ForMaskedLM, got DebertaV2Model"):
        dk.EnhancedMaskDecoder(build())
    from transformers import DebertaConfig, DebertaForMaskedLM

    config = DebertaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(TypeError, match="got DeBERTa v1's DebertaForMaskedLM"):
        dk.EnhancedMaskDecoder(DebertaForMaskedLM(config))
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        dk.EnhancedMaskDecoder(build(HEAD), steps=0)
    with pytest.raises(ValueError, match="at least two layers"):
        dk.EnhancedMaskDecoder(build(HEAD, num_hidden_layers=1))
    decoder = dk.EnhancedMaskDecoder(build(HEAD))
    with pytest.raises(ValueError, match="at most 64 tokens, got 65; pass position_ids"):
        decoder.decode(torch.zeros(1, 65, 32), torch.ones(1, 65))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        decoder()
