"""What no kernel computes runs the original code, bit for bit, with one warning per reason, or raises when strict."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels import dispatch
from deberta_kernels.models.encoder_mask import EncoderMask
from deberta_kernels.types import Masks

HIDDEN = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
SHORT = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[1, 6:] = 0
DISTANCES = (torch.arange(9)[:, None] - torch.arange(9)[None, :]) // 2


def outcome(call: Any) -> Any:
    """Return the tensors of a call, or the type and text of the error it raises."""
    try:
        return [t for t in call().to_tuple() if t is not None]
    except Exception as error:
        return (type(error), str(error))


CALLS = {
    "output_attentions": (lambda e: e(HIDDEN, MASK, output_attentions=True), "attention probabilities were asked for"),
    "relative_pos-2d": (lambda e: e(HIDDEN, MASK, relative_pos=DISTANCES), "a relative_pos tensor was given"),
    "relative_pos-3d": (lambda e: e(HIDDEN, MASK, relative_pos=DISTANCES[None]), "a relative_pos tensor was given"),
    "relative_pos-4d": (lambda e: e(HIDDEN, MASK, relative_pos=DISTANCES[None, None]), "a relative_pos tensor"),
    "relative_pos-float": (lambda e: e(HIDDEN, MASK, relative_pos=DISTANCES.float()), "a relative_pos tensor"),
    "relative_pos-per-batch": (lambda e: e(HIDDEN, MASK, relative_pos=DISTANCES.expand(2, 9, 9)), "a relative_pos"),
    "query_states": (lambda e: e(HIDDEN, MASK, query_states=SHORT), "query_states and hidden_states differ in shape"),
}


def flatten(values: Any) -> list[torch.Tensor]:
    return [t for v in values for t in (flatten(v) if isinstance(v, tuple) else [v])]


@pytest.mark.parametrize("terms", [["c2p", "p2c"], ["c2p"]])
@pytest.mark.parametrize("name", CALLS)
def test_the_original_code_runs_with_one_warning_per_reason(name, terms, build):
    call, reason = CALLS[name]
    encoder = build(pos_att_type=terms).encoder
    before = outcome(lambda: call(encoder))
    dk.patch(encoder)
    with pytest.warns(dispatch.DebertaKernelsWarning, match=f"runs the original attention code: {reason}") as caught:
        after, _ = [outcome(lambda: call(encoder)) for _ in range(2)]
    assert len([w for w in caught if w.category is dispatch.DebertaKernelsWarning]) == 1
    if isinstance(before, tuple):
        assert after == before
    else:
        for left, right in zip(flatten(before), flatten(after), strict=True):
            assert torch.equal(left, right)
    counted = dk.stats()
    assert sum(counted["calls"].values()) == 0
    assert list(counted["fallbacks"]) == [next(r for r in counted["fallbacks"] if r.startswith(reason))]


@pytest.mark.parametrize("name", CALLS)
def test_strict_raises_with_the_same_reason(name, build, batch):
    call, reason = CALLS[name]
    encoder = build().encoder
    dk.patch(encoder, strict=True)
    with pytest.raises(NotImplementedError, match=reason):
        call(encoder)
    assert dk.stats()["fallbacks"] == {}
    assert encoder(HIDDEN, MASK).last_hidden_state.shape == HIDDEN.shape


def test_attentions_of_a_model_are_those_from_before(build, batch):
    model, inputs = build("DebertaV2ForSequenceClassification", attention_probs_dropout_prob=0.3).train(), batch()
    torch.manual_seed(1)
    before = model(**inputs, output_attentions=True, output_hidden_states=True)
    dk.patch(model)
    torch.manual_seed(1)
    with pytest.warns(dispatch.DebertaKernelsWarning):
        after = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(after.attentions) == 2
    for left, right in zip(flatten(before.to_tuple()), flatten(after.to_tuple()), strict=True):
        assert torch.equal(left, right)


def test_relative_pos_is_ignored_where_hugging_face_ignores_it(build):
    encoder = build(relative_attention=False).encoder
    with torch.no_grad():
        before = encoder(HIDDEN, MASK, relative_pos=DISTANCES).last_hidden_state
        dk.patch(encoder)
        after = encoder(HIDDEN, MASK, relative_pos=DISTANCES).last_hidden_state
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("replacement", [nn.Identity(), nn.AlphaDropout(0.1), nn.Dropout(1.0)])
def test_another_attention_dropout_runs_the_original_code(replacement, build, batch):
    model, inputs = build().train(), batch()
    for layer in model.encoder.layer:
        layer.attention.self.dropout = replacement
    torch.manual_seed(0)
    before = model(**inputs)[0]
    dk.patch(model)
    torch.manual_seed(0)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="the attention dropout is"):
        after = model(**inputs)[0]
    assert torch.equal(before, after)


def test_a_hook_on_the_attention_dropout_still_gets_the_probabilities(build, batch):
    model, inputs = build(), batch()
    caught: list[torch.Tensor] = []
    model.encoder.layer[0].attention.self.dropout.register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    with torch.no_grad():
        before = model(**inputs)[0]
        dk.patch(model)
        with pytest.warns(dispatch.DebertaKernelsWarning, match="hook on the attention dropout"):
            after = model(**inputs)[0]
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(caught[1], caught[0])
    assert dk.stats()["fallbacks"] == {"a hook on the attention dropout wants the attention probabilities": 1}


def test_errors_of_the_original_code_stay(build):
    encoder = build(conv_kernel_size=3).encoder
    for hidden, mask in ((HIDDEN, MASK.bool()), (HIDDEN.double(), MASK), (HIDDEN, MASK[0, 0]), (HIDDEN, None)):
        before = outcome(lambda h=hidden, m=mask: encoder(h, m))
        dk.patch(encoder)
        after = outcome(lambda h=hidden, m=mask: encoder(h, m))
        dk.unpatch(encoder)
        assert isinstance(before, tuple)
        assert isinstance(after, tuple)
        assert after[0] is before[0]


@pytest.mark.parametrize("mask", [torch.ones(3, 9), torch.ones(2, 8), torch.ones(2, 9, 8), torch.ones(3, 1, 9, 9)])
def test_a_mask_of_another_shape_names_both_shapes(mask, build):
    encoder = build().encoder
    dk.patch(encoder)
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* B = 2, Nq = 9, Nk = 9, got"):
        encoder(HIDDEN, mask)
    assert torch.isfinite(encoder(HIDDEN, MASK).last_hidden_state).all()


@pytest.mark.parametrize("table", [None, torch.randn(31, 32), torch.randn(1, 32, 32)])
def test_relative_embeddings_of_a_wrong_shape_are_named(table, build):
    attention = build().encoder.layer[0].attention.self
    dk.patch(attention)
    with pytest.raises(ValueError, match=r"rel_embeddings must have shape \(2 \* att_span, hidden size\) .* = 32, got"):
        attention(HIDDEN, MASK[:, None, None], rel_embeddings=table)


def test_more_relative_embeddings_than_needed_are_cut(build):
    attention = build().encoder.layer[0].attention.self
    table = torch.randn(40, 32)
    with torch.no_grad():
        before, _ = attention(HIDDEN, MASK[:, None, None], rel_embeddings=table)
        dk.patch(attention)
        after, _ = attention(HIDDEN, MASK[:, None, None], rel_embeddings=table)
    torch.testing.assert_close(after, before)


def test_one_row_of_a_mask_may_stand_for_the_whole_batch(build):
    encoder = build().encoder
    with torch.no_grad():
        for mask in (MASK[1:], MASK[:, :1], MASK[1:, None, None]):
            dk.unpatch(encoder)
            before = encoder(HIDDEN, mask).last_hidden_state
            dk.patch(encoder, strict=True)
            torch.testing.assert_close(encoder(HIDDEN, mask).last_hidden_state, before, atol=2e-5, rtol=1e-5)


@pytest.mark.no_kernels
def test_a_backend_that_cannot_run_raises_when_the_call_comes(build, batch):
    model = build().double()
    dk.patch(model, backend="cpu")
    with pytest.raises(NotImplementedError, match="backend='cpu' cannot run this call: it computes float32"):
        model(**batch())


def test_function_transforms_run_the_original_code(build):
    encoder = build().encoder
    plain = copy.deepcopy(encoder)
    dk.patch(encoder, strict=True)

    def last(module):
        return lambda hidden: module(hidden, MASK).last_hidden_state

    with warnings.catch_warnings():
        warnings.simplefilter("error", dispatch.DebertaKernelsWarning)
        tangent = torch.randn_like(HIDDEN)
        for left, right in zip(
            torch.func.jvp(last(plain), (HIDDEN,), (tangent,)), torch.func.jvp(last(encoder), (HIDDEN,), (tangent,))
        ):
            torch.testing.assert_close(right, left)
        many = torch.stack([HIDDEN, HIDDEN * 2])
        torch.testing.assert_close(torch.func.vmap(last(encoder))(many), torch.func.vmap(last(plain))(many))
    assert sum(dk.stats()["calls"].values()) == 0


def test_a_second_derivative_is_refused_not_zero(build):
    encoder = build().encoder
    dk.patch(encoder)
    hidden = HIDDEN.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(hidden, MASK).last_hidden_state.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.square().sum().backward()


def test_nan_in_one_text_stays_in_that_text(build):
    encoder = build().encoder
    dk.patch(encoder)
    hidden = HIDDEN.clone()
    hidden[0, 2] = float("nan")
    with torch.no_grad():
        out = encoder(hidden, MASK).last_hidden_state
        clean = encoder(HIDDEN, MASK).last_hidden_state
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], clean[1])


def test_the_mask_of_an_encoder_moves_and_unfolds():
    masks = Masks(key=MASK.bool(), query=MASK.bool())
    mask = EncoderMask(MASK, masks)
    moved = mask.to("cpu", non_blocking=True)
    assert torch.equal(moved.masks.key, masks.key)
    assert moved.masks.pair is None
    assert torch.equal(mask.dense(), (MASK[:, None, None, :] * MASK[:, None, :, None]))
    assert EncoderMask(MASK[:, None].expand(2, 9, 9), masks).dense().shape == (2, 1, 9, 9)
    assert EncoderMask(MASK[:, None, None], masks).dense().shape == (2, 1, 1, 9)
