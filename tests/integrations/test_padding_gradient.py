"""Gradients of a batch without padding: of everything returned and given, each padded row its own."""

from __future__ import annotations

import copy

import pytest
import torch

import deberta_kernels as dk


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("reads", ["real tokens", "a mean", "each row its own way", "states between"])
@pytest.mark.parametrize("padding", ["right", "holes", "sample"])
def test_gradients_of_everything_returned_and_given_are_as_before(reads, conv, padding, unpad, build, batch, packings):
    """A loss that reads padding: its rows have different gradients, though their values are the same."""
    plain, inputs = build(conv_kernel_size=conv, num_hidden_layers=3), batch(4, 41, padding)
    embeddings = plain.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    model = copy.deepcopy(plain)
    dk.patch(model, unpad=unpad, strict=True)
    gradients = []
    for one in (plain, model):
        mask = inputs["attention_mask"].float().requires_grad_()
        given = embeddings.clone().requires_grad_()
        output = one(inputs_embeds=given, attention_mask=mask, output_hidden_states=True)
        weight = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(1))
        if reads == "real tokens":
            loss = (output[0] * weight * inputs["attention_mask"][..., None]).sum()
        elif reads == "a mean":
            loss = output[0].mean(1).pow(2).sum()
        elif reads == "each row its own way":
            loss = (output[0] * weight).sum()
        else:
            loss = sum((state * weight.roll(i, 0)).sum() for i, state in enumerate(output.hidden_states))
        everything = (given, mask, *output.hidden_states, *one.parameters())
        gradients.append(torch.autograd.grad(loss, everything, allow_unused=True))
    assert (packings[-1] is not None) == unpad
    for expected, actual in zip(*gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, atol=5e-4, rtol=2e-4)


def test_states_given_to_a_packed_encoder_get_their_own_gradients(build, batch, packings):
    plain, inputs = build(), batch(4, 41)
    model = copy.deepcopy(plain)
    dk.patch(model, unpad=True)
    gradients = []
    for one in (plain.encoder, model.encoder):
        states = torch.randn(4, 41, 32, generator=torch.Generator().manual_seed(1))
        states = (states * inputs["attention_mask"][..., None]).requires_grad_()
        out = one(states, inputs["attention_mask"], output_hidden_states=False).last_hidden_state
        (out * torch.linspace(-1, 1, 41)[:, None]).sum().backward()
        gradients.append(states.grad)
    assert packings[-1] is not None
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("unpad", [False, True])
def test_what_is_returned_may_be_changed_in_place(unpad, build, batch, packings):
    model, inputs = build(), batch(4, 41)
    plain, gradients = copy.deepcopy(model), []
    dk.patch(model, unpad=unpad, strict=True)
    for one in (plain, model):
        out = one(**inputs)
        out.last_hidden_state[inputs["attention_mask"] == 0] = -1e9
        out.last_hidden_state.amax(1).square().mean().backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    assert (packings[-1] is not None) == unpad
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("unpad", [False, True])
def test_many_gradients_at_once(unpad, build, batch):
    model, inputs = build(), batch(4, 41)
    plain, gradients = copy.deepcopy(model), []
    dk.patch(model, unpad=unpad, strict=True)
    weights = torch.randn(3, 4, 41, 32, generator=torch.Generator().manual_seed(2))
    for one in (plain, model):
        out = one(**inputs, output_hidden_states=True)
        wanted = (out.hidden_states[1], one.encoder.layer[0].attention.self.query_proj.weight)
        gradients.append(torch.autograd.grad(out.last_hidden_state, wanted, weights, is_grads_batched=True))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
