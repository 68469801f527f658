"""Which modules a patch reaches, which it leaves alone and why, and the patch of all models at once."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import deberta_kernels as dk
from deberta_kernels import dispatch


def states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def kernel_calls() -> int:
    return sum(dk.stats()["calls"].values())


class OwnForward(hf.DisentangledSelfAttention):
    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        return hidden_states * 2, None


def test_attention_with_a_forward_of_its_own_is_left_alone(build, batch):
    model, inputs = build(), batch()
    model.encoder.layer[1].attention.self.__class__ = OwnForward
    before = states(model, inputs)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="OwnForward has a forward of its own"):
        report = dk.patch(model)
    assert (report.patched, report.encoders) == (1, 1)
    assert set(report.left_alone) == {"encoder.layer.1.attention.self"}
    torch.testing.assert_close(states(model, inputs), before, atol=2e-5, rtol=1e-5)
    assert kernel_calls() == 1


def test_attention_that_gets_another_class_after_patching_is_called_as_it_is(build, batch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)
    for one in (plain, model):
        one.encoder.layer[1].attention.self.__class__ = OwnForward
    torch.testing.assert_close(states(model, inputs), states(plain, inputs), atol=2e-5, rtol=1e-5)
    assert kernel_calls() == 1


class OwnBias(hf.DisentangledSelfAttention):
    def disentangled_attention_bias(self, *args, **kwargs):
        return 0.5 * super().disentangled_attention_bias(*args, **kwargs)


class OwnMask(hf.DebertaV2Encoder):
    def get_attention_mask(self, attention_mask):
        return super().get_attention_mask(attention_mask).bool().tril()


class OwnPositions(hf.DebertaV2Encoder):
    def get_rel_pos(self, *args, **kwargs):
        found = super().get_rel_pos(*args, **kwargs)
        return None if found is None else -found


def _own_bias(model):
    model.encoder.layer[1].attention.self.__class__ = OwnBias


def _own_mask(model):
    model.encoder.__class__ = OwnMask


def _own_positions(model):
    model.encoder.__class__ = OwnPositions


def _mask_of_the_instance(model):
    kept = model.encoder.get_attention_mask
    model.encoder.get_attention_mask = lambda mask: kept(mask).bool().tril()


@pytest.mark.parametrize("change", [_own_bias, _own_mask, _own_positions, _mask_of_the_instance])
def test_patch_all_leaves_changed_methods_alone(change, build, batch):
    model, inputs = build(), batch()
    change(model)
    expected = states(model, inputs)
    dk.patch_all()
    with pytest.warns(dispatch.DebertaKernelsWarning, match=r"has its own|was replaced on the instance"):
        actual = states(model, inputs)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    dk.patch_all(strict=True)
    with pytest.raises(NotImplementedError, match="only the code of transformers and AdapterHub is fused"):
        states(model, inputs)


def test_a_method_replaced_after_patching_is_heeded(build, batch):
    model, inputs = build(), batch()
    plain = copy.deepcopy(model)
    dk.patch(model)
    _mask_of_the_instance(plain)
    _mask_of_the_instance(model)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="get_attention_mask was replaced on the instance"):
        actual = states(model, inputs)
    torch.testing.assert_close(actual, states(plain, inputs), atol=2e-5, rtol=1e-5)


def test_a_method_replaced_for_its_whole_class_is_heeded(build, batch, monkeypatch):
    model, inputs = build(), batch()
    plain, original = copy.deepcopy(model), hf.DisentangledSelfAttention.disentangled_attention_bias
    dk.patch(model)

    def halved(self, *args, **kwargs):
        return 0.5 * original(self, *args, **kwargs)

    monkeypatch.setattr(hf.DisentangledSelfAttention, "disentangled_attention_bias", halved)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="disentangled_attention_bias of .* was replaced by"):
        actual = states(model, inputs)
    torch.testing.assert_close(actual, states(plain, inputs), atol=2e-5, rtol=1e-5)


class OwnLayer(hf.DebertaV2Layer):
    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        keep = attention_mask.any(-1).any(1)[..., None]
        output = super().forward(hidden_states, attention_mask, *args, **kwargs)
        return (output[0] * keep, *output[1:])


def test_a_layer_that_reads_the_mask_gets_hugging_faces(build, batch):
    model, inputs = build(), batch()
    model.encoder.layer[1].__class__ = OwnLayer
    expected = states(model, inputs)
    report = dk.patch(model, strict=True)
    assert (report.patched, report.encoders, report.left_alone) == (2, 1, {})
    torch.testing.assert_close(states(model, inputs), expected, atol=2e-5, rtol=1e-5)
    assert kernel_calls() == 2


def test_a_hook_before_a_layer_gets_the_mask_it_would_get_unpatched(build, batch):
    model, inputs = build(), batch()
    seen = []
    model.encoder.layer[1].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    expected = states(model, inputs)
    dk.patch(model)
    torch.testing.assert_close(states(model, inputs), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(seen[0], seen[1])
    assert kernel_calls() == 2


def test_each_reason_of_what_is_left_alone_is_warned_of(build):
    models = nn.ModuleList([build(), build(), build()])
    models[0].encoder.layer[0].attention.self.__class__ = OwnForward
    models[1].encoder.__class__ = OwnMask
    with pytest.warns(dispatch.DebertaKernelsWarning) as warned:
        assert dk.patch(models).patched == 5
    assert len(warned) == 2
    assert all(any(name in str(one.message) for one in warned) for name in ("OwnForward", "OwnMask"))


def test_a_method_replaced_on_the_instance_is_left_alone(build):
    model = build()
    model.encoder.layer[0].attention.self.forward = lambda *args, **kwargs: None
    with pytest.warns(dispatch.DebertaKernelsWarning, match="forward was replaced on the instance"):
        assert dk.patch(model).patched == 1


def test_a_class_whose_forward_somebody_replaced_is_left_alone(build, monkeypatch):
    model = build()
    monkeypatch.setattr(hf.DisentangledSelfAttention, "forward", OwnForward.forward)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="was replaced by"):
        assert dk.patch(model).patched == 0
    with pytest.raises(NotImplementedError, match=r"cannot patch DisentangledSelfAttention: .* was replaced by"):
        dk.patch_all()


def test_a_transformers_with_other_arguments_is_left_alone(build, monkeypatch):
    source = (
        "class DisentangledSelfAttention:\n def forward(self, hidden_states, attention_mask, something_new=None): ..."
    )
    names = {"__name__": hf.__name__}
    exec(compile(source, hf.__file__, "exec"), names)
    model = build()
    monkeypatch.setattr(hf.DisentangledSelfAttention, "forward", names["DisentangledSelfAttention"].forward)
    with pytest.warns(dispatch.DebertaKernelsWarning, match="which this release does not know"):
        assert dk.patch(model).patched == 0


def test_a_class_of_the_same_name_from_elsewhere_is_left_alone():
    other = type("DisentangledSelfAttention", (nn.Module,), {"__module__": "somewhere.else_"})
    with pytest.warns(dispatch.DebertaKernelsWarning, match=r"somewhere.else_.DisentangledSelfAttention is not"):
        assert dk.patch(nn.Sequential(other())).patched == 0


def test_patch_all_reaches_models_made_before_and_after(build, batch):
    inputs = batch()
    earlier = build()
    before = states(earlier, inputs)
    dk.patch_all()
    torch.testing.assert_close(states(earlier, inputs), before, atol=2e-5, rtol=1e-5)
    assert kernel_calls() == 2
    later = build("DebertaV2ForTokenClassification")
    assert type(later.deberta.encoder) is hf.DebertaV2Encoder
    states(later, inputs)
    assert kernel_calls() == 4
    dk.unpatch_all()
    assert torch.equal(states(earlier, inputs), before)
    assert kernel_calls() == 4
    dk.unpatch_all()


def test_patch_all_takes_new_options_and_undoes_once(build, batch):
    forwards = (hf.DisentangledSelfAttention.forward, hf.DebertaV2Encoder.forward)
    dk.patch_all()
    dk.patch_all(backend="reference", strict=True)
    model = build()
    states(model, batch())
    assert dk.stats()["calls"]["reference"] == 2
    with pytest.raises(NotImplementedError):
        model(**batch(), output_attentions=True)
    dk.unpatch_all()
    assert (hf.DisentangledSelfAttention.forward, hf.DebertaV2Encoder.forward) == forwards


def test_a_model_patched_by_itself_keeps_its_options_beside_patch_all(build, batch):
    model, inputs = build(), batch()
    before = states(model, inputs)
    dk.patch(model, backend="reference")
    dk.patch_all()
    states(model, inputs)
    assert dk.stats()["calls"]["reference"] == 2
    dk.unpatch(model)
    states(model, inputs)
    assert dk.stats()["calls"]["reference"] == 2
    assert kernel_calls() == 4
    assert dk.patch(model).left_alone == {}
    dk.unpatch_all()
    states(model, inputs)
    assert kernel_calls() == 6
    dk.unpatch(model)
    assert torch.equal(states(model, inputs), before)


def test_a_model_pickled_under_patch_all_is_an_ordinary_pickle(build):
    dk.patch_all()
    assert b"deberta_kernels" not in pickle.dumps(build())


@pytest.mark.parametrize("first", ["bind", "patch"])
def test_forwards_bound_to_their_modules_hide_nothing(build, batch, packings, first: str) -> None:
    """The package `kernels` binds the forward of its class to a module for which it has no layer."""

    def bind() -> None:
        for module in model.modules():
            module.forward = types.MethodType(type(module).forward, module)

    model, inputs = build(), batch(8, 64)
    expected = states(model, inputs)
    for step in (bind, lambda: dk.patch(model, strict=True))[:: 1 if first == "bind" else -1]:
        step()
    torch.testing.assert_close(states(model, inputs), expected)
    assert (kernel_calls(), packings[-1] is not None) == (2, True)
    dk.unpatch(model)
    torch.testing.assert_close(states(model, inputs), expected, atol=0, rtol=0)
    assert kernel_calls() == 2


def test_another_function_bound_to_a_module_is_left_alone(build) -> None:
    model = build()
    attention = model.encoder.layer[0].attention.self
    attention.forward = types.MethodType(OwnForward.forward, attention)
    report = dk.patch(model)
    assert report.left_alone == {"encoder.layer.0.attention.self": "its forward was replaced on the instance"}
