"""The encoder without padding: the same values in the same layout, and padded where something could notice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deberta_kernels as dk


def states_of(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("unpad", ["auto", True, False])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "sample"])
@pytest.mark.parametrize("conv", [0, 3, 5])
def test_every_hidden_state_is_as_before(unpad, padding, conv, build, batch, packings):
    model, inputs = build(conv_kernel_size=conv), batch(4, 41, padding)
    expected = states_of(model, inputs)
    dk.patch(model, unpad=unpad, strict=True)
    close(states_of(model, inputs), expected)
    packed = padding != "none" and packings[-1] is not None
    assert packed == (unpad is not False and padding != "none")
    assert len(packings) == (padding != "none")  # a full batch is not even looked at
    if packed:
        assert packings[-1].contiguous == (padding != "holes")


def test_a_nearly_full_batch_is_packed_only_on_request(build, batch, packings):
    model, inputs = build(), batch(4, 41, "none")
    inputs["attention_mask"][2, -3:] = 0
    expected = states_of(model, inputs)
    for unpad, packed in (("auto", False), (True, True)):
        dk.patch(model, unpad=unpad)
        close(states_of(model, inputs), expected)
        assert (packings[-1] is not None) == packed


@pytest.mark.parametrize("everywhere", [False, True])
def test_patch_all_packs(everywhere, build, batch, packings):
    model, inputs = build(), batch(4, 41)
    expected = states_of(model, inputs)
    dk.patch_all(unpad=everywhere)
    close(states_of(model, inputs), expected)
    assert (packings[-1] is not None) == everywhere


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("padding", ["right", "holes"])
def test_training_gradients_are_as_before(reentrant, padding, build, batch, packings):
    inputs = batch(4, 41, padding)
    model = build("DebertaV2ForTokenClassification", num_labels=3).train()
    plain = copy.deepcopy(model)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 3, -100)
    plain(**inputs, labels=labels).loss.backward()
    dk.patch(model, strict=True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs, labels=labels).loss.backward()
    assert packings[0] is not None
    for (name, parameter), (_, before) in zip(model.named_parameters(), plain.named_parameters()):
        if before.grad is not None:
            torch.testing.assert_close(parameter.grad, before.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_checkpoints_of_layers_before_the_first_that_is_watched(build, batch):
    model, inputs = build(num_hidden_layers=3).train(), batch(4, 41)
    plain, gradients = copy.deepcopy(model), []
    dk.patch(model, strict=True)
    for one in (plain, model):
        one.encoder.layer[1].output.dense.register_forward_hook(lambda *unused: None)
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one(**inputs).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_dropout_packed_is_repeatable_and_leaves_padding_finite(build, batch, packings):
    model, inputs = build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train(), batch(4, 41)
    dk.patch(model)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(**inputs).last_hidden_state)
    assert packings[-1] is not None
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    assert results[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, build, batch, packings):
    model, inputs = build(), batch(4, 41)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = model(**inputs).last_hidden_state
        dk.patch(model, strict=True)
        actual = model(**inputs).last_hidden_state
    assert packings[-1] is not None
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=0.15, rtol=0.05)


def test_states_of_padding_that_differ_keep_the_batch_padded(build, batch, packings):
    model, inputs = build(), batch(4, 41)
    states = torch.randn(4, 41, model.config.hidden_size)
    with torch.no_grad():
        expected = model.encoder(states, inputs["attention_mask"]).last_hidden_state
        dk.patch(model, strict=True)
        close(model.encoder(states, inputs["attention_mask"]).last_hidden_state, expected)
    assert packings == [None]


def test_a_nan_in_padding_keeps_the_batch_padded(build, batch, packings):
    model, inputs = build(), batch(4, 41)
    dk.patch(model)
    clean = states_of(model, inputs)[-1]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[1] = float("nan")
    inputs["input_ids"][2, -1] = 1
    assert inputs["attention_mask"][2, -1] == 0
    poisoned = states_of(model, inputs)[-1]
    assert packings[-1] is None
    real = inputs["attention_mask"] == 1
    close(poisoned[real], clean[real])


def test_a_nan_in_one_sample_stays_there(build, batch, packings):
    model, inputs = build(), batch(4, 41)
    dk.patch(model)
    clean = states_of(model, inputs)[-1]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[1] = float("nan")
    inputs["input_ids"][2, 0] = 1
    poisoned = states_of(model, inputs)[-1]
    assert packings[-1] is not None
    assert poisoned[2].isnan().all()
    for sample in (0, 1, 3):
        close(poisoned[sample], clean[sample])


def _hook(model: Any) -> list:
    seen: list = []
    model.encoder.layer[1].register_forward_hook(lambda module, args, out: seen.append((args[0].shape, args[1].shape)))
    return seen


def _pre_hook(model: Any) -> list:
    seen: list = []
    model.encoder.layer[0].output.dense.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    return seen


def _backward_hook(model: Any) -> list:
    model.encoder.layer[0].register_full_backward_hook(lambda *unused: None)
    return []


class PerSample(nn.Linear):
    """A module of somebody else, which may well look at the batch dimension."""

    seen: list

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x) - x.mean((1, 2), keepdim=True)


def _foreign_module(model: Any) -> list:
    dense = model.encoder.layer[1].intermediate.dense
    dense.__class__, dense.seen = PerSample, []
    return dense.seen


def _replaced_forward(model: Any) -> list:
    seen: list = []
    dense = model.encoder.layer[1].intermediate.dense
    kept = dense.forward
    dense.forward = lambda x: seen.append(x.shape) or kept(x)
    return seen


def _unusual_dropout(model: Any) -> list:
    model.encoder.layer[1].attention.self.dropout = nn.AlphaDropout(0.1).eval()
    return []


def _activation(model: Any) -> list:
    seen: list = []

    def centred(x):
        seen.append(x.shape)
        return nn.functional.gelu(x - x.mean(1, keepdim=True))

    model.encoder.layer[1].intermediate.intermediate_act_fn = None
    del model.encoder.layer[1].intermediate.intermediate_act_fn
    model.encoder.layer[1].intermediate.intermediate_act_fn = centred
    return seen


@pytest.mark.parametrize(
    "change", [_hook, _pre_hook, _backward_hook, _foreign_module, _replaced_forward, _unusual_dropout, _activation]
)
@pytest.mark.parametrize("when", ["before patching", "after patching"])
@pytest.mark.filterwarnings("ignore::deberta_kernels.dispatch.DebertaKernelsWarning")
def test_whatever_could_notice_gets_the_padded_states(change: Callable[[Any], None], when, build, batch):
    inputs, found = batch(4, 41), []
    for patched in (False, True):
        model = build()
        if patched and when == "after patching":
            dk.patch(model, unpad=True)
        seen = change(model)
        if patched and when == "before patching":
            dk.patch(model, unpad=True)
        found.append((states_of(model, inputs), seen))
    (expected, there), (actual, here) = found
    close(actual, expected)
    assert there == here
    assert there == [] or len(there) == 1


def test_layers_nobody_looks_at_are_packed_up_to_the_first_that_is_watched(build, batch, packings):
    model, inputs = build(num_hidden_layers=4), batch(4, 41)
    expected = states_of(model, inputs)
    dk.patch(model, strict=True)
    calls = []
    for layer in model.encoder.layer:
        layer.attention.self.value_proj.register_forward_hook(lambda module, args, out: calls.append(out.shape[:2]))
    close(states_of(model, inputs), expected)
    assert calls == [(4, 41)] * 4
    assert packings[-1] is None
    for layer in list(model.encoder.layer)[:2]:
        layer.attention.self.value_proj._forward_hooks.clear()
    calls.clear()
    close(states_of(model, inputs), expected)
    assert calls == [(4, 41)] * 2
    assert packings[-1] is not None


@pytest.mark.parametrize("way", ["a mode", "what packs saved tensors"])
def test_a_hook_that_comes_while_a_layer_runs_sees_padded_states(way, build, batch):
    model, inputs, shapes = build(num_hidden_layers=3), batch(4, 41), []
    dk.patch(model, unpad=True)
    last = model.encoder.layer[2]

    def register(*_: Any) -> None:
        if not last._forward_hooks:
            last.register_forward_hook(lambda _, arguments, out: shapes.append(out[0].shape[:2]))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "gelu" in str(function):
                register()
            return function(*args, **(kwargs or {}))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == model.config.intermediate_size:
            register()
        return tensor

    with Mode() if way == "a mode" else torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**inputs)
    assert shapes == [(4, 41)]


def test_a_hook_sees_the_shape_it_would_see_unpatched(build, batch):
    model, inputs = build(), batch(4, 41)
    dk.patch(model)
    shapes = []
    model.encoder.layer[1].register_forward_hook(lambda _, args, out: shapes.append(out[0].shape))
    states_of(model, inputs)
    assert shapes == [(4, 41, model.config.hidden_size)]


def test_global_hooks_get_the_padded_states(build, batch, packings):
    model, inputs = build(), batch(4, 41)

    def centre(module, args, output):
        if type(module).__name__ == "DebertaV2Output":
            return output - output.mean(1, keepdim=True)
        return None

    dk.patch(model, unpad=True)
    handle = nn.modules.module.register_module_forward_hook(centre)
    try:
        actual = states_of(model, inputs)
        dk.unpatch(model)
        close(actual, states_of(model, inputs))
    finally:
        handle.remove()
    assert packings[-1] is None


def test_a_layer_class_whose_forward_somebody_replaced_gets_the_padded_states(build, batch, packings, monkeypatch):
    model, inputs = build(), batch(4, 41)
    plain, layer = copy.deepcopy(model), type(model.encoder.layer[0])
    original = layer.forward

    def centred(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        return (output[0] - output[0].mean(1, keepdim=True), *output[1:])

    dk.patch(model, unpad=True)
    monkeypatch.setattr(layer, "forward", centred)
    close(states_of(model, inputs), states_of(plain, inputs))
    assert packings[-1] is None


@pytest.mark.parametrize("place", ["a norm", "a layer"])
def test_code_put_into_a_forward_between_two_calls_gets_the_padded_states(place, build, batch, packings, monkeypatch):
    model, inputs = build(), batch(4, 41)
    dk.patch(model, unpad=True)
    expected = states_of(model, inputs)
    assert packings[-1] is not None
    forward = nn.LayerNorm.forward if place == "a norm" else inspect.unwrap(type(model.encoder.layer[0]).forward)
    monkeypatch.setattr(forward, "__code__", forward.__code__.replace(co_filename="elsewhere.py"))
    close(states_of(model, inputs), expected)
    assert packings[-1] is None


def test_lora_is_packed_and_takes_part(build, batch, packings):
    import peft

    inputs = batch(4, 41)
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["query_proj", "value_proj"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = states_of(model, inputs)
    dk.patch(model, strict=True)
    close(states_of(model, inputs), expected)
    assert packings[-1] is not None


@pytest.mark.parametrize("change", ["empty", "one token", "short"])
def test_batches_with_nothing_to_pack(change, build, batch, packings):
    model = build()
    inputs = batch(2, 1 if change == "one token" else 9)
    if change == "empty":
        inputs["attention_mask"][:] = 0
    expected = states_of(model, inputs)
    dk.patch(model)
    close(states_of(model, inputs), expected)
    assert packings == ([] if change == "one token" else [None])
