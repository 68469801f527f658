"""Patching around `adapters.init`: what is reached, fused anew, reported, and given back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import deberta_kernels as dk
from deberta_kernels import dispatch
from tests import needs

adapters = needs.package("adapters")
from adapters.models.deberta_v2 import modeling_deberta_v2 as hub

from tests.integrations.linears import record_products

PREFIX = adapters.PrefixTuningConfig(prefix_length=7, flat=True)


def attention_of(model: Any, layer: int = 0) -> Any:
    return model.base_model.encoder.layer[layer].attention.self


def states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def test_adapters_that_come_after_the_patch_are_fused_at_the_next_call(adapt, batch, calls_per_layer):
    expected = states(adapt({"task": PREFIX}, "task"), batch())
    model = adapt({"task": PREFIX}, "task", "patch first")
    assert type(attention_of(model)) is hub.DisentangledSelfAttentionWithAdapters
    actual = states(model, batch())
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)
    assert type(attention_of(model)) is not hub.DisentangledSelfAttentionWithAdapters
    assert isinstance(attention_of(model), hub.DisentangledSelfAttentionWithAdapters)
    assert calls_per_layer() == "2"


@pytest.mark.no_kernels
@pytest.mark.parametrize("called", [False, True])
def test_unpatch_after_adapters_came_leaves_adapterhubs_classes(called, adapt, batch):
    plain = adapt({"task": PREFIX}, "task")
    model = adapt({"task": PREFIX}, "task", "patch first")
    if called:
        states(model, batch())
    assert (sum(dk.stats()["calls"].values()) > 0) == called
    assert dk.unpatch(model) == (3 if called else 1)
    assert type(model.encoder) is hf.DebertaV2Encoder
    assert type(attention_of(model)) is hub.DisentangledSelfAttentionWithAdapters
    assert torch.equal(states(model, batch()), states(plain, batch()))


def test_patch_all_reaches_adapterhubs_class_and_unpatch_all_restores_it(adapt, batch, calls_per_layer):
    classes = (hf.DisentangledSelfAttention, hf.DebertaV2Encoder, hub.DisentangledSelfAttentionWithAdapters)
    forwards = [cls.forward for cls in classes]
    model = adapt({"task": PREFIX}, "task")
    before = states(model, batch())
    dk.patch_all(strict=True)
    torch.testing.assert_close(states(model, batch()), before, atol=3e-5, rtol=1e-5)
    assert calls_per_layer() == "2"
    dk.patch_all(backend="reference")
    states(model, batch())
    assert dk.stats()["calls"]["reference"] == 4
    dk.unpatch_all()
    assert [cls.forward for cls in classes] == forwards
    assert torch.equal(states(model, batch()), before)


def test_adapters_imported_after_patch_all_are_fused():
    check = """
import warnings
warnings.simplefilter("ignore")
import torch, transformers
import deberta_kernels as dk
from deberta_kernels import dispatch, native
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf
dk.patch_all(strict=True)
import adapters
from adapters.models.deberta_v2 import modeling_deberta_v2 as hub
original = hub.DisentangledSelfAttentionWithAdapters.forward
config = transformers.DebertaV2Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    relative_attention=True, position_buckets=16, pos_att_type=["c2p", "p2c"], share_att_key=True,
)
model = adapters.DebertaV2AdapterModel(config).eval()
model.add_adapter("task", config="prefix_tuning")
model.set_active_adapters("task")
ids = torch.arange(12).view(1, 12)
with torch.no_grad():
    fused = model(ids)[0]
    assert sum(dk.stats()["calls"].values()) == 2, dk.stats()
    dk.unpatch_all()
    assert hub.DisentangledSelfAttentionWithAdapters.forward is original
    torch.testing.assert_close(fused, model(ids)[0], atol=3e-5, rtol=1e-5)
"""
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_model_patched_by_itself_keeps_its_options_beside_patch_all(adapt, batch):
    model = adapt({"task": PREFIX}, "task")
    dk.patch(model, backend="reference")
    dk.patch_all()
    states(model, batch())
    assert dk.stats()["calls"]["reference"] == 4
    dk.unpatch_all()
    states(model, batch())
    assert dk.stats()["calls"]["reference"] == 8


class OwnForward(hub.DisentangledSelfAttentionWithAdapters):
    def forward(self, hidden_states, attention_mask, *args, **kwargs):
        return hidden_states * 2, None


@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_an_unknown_attention_class_is_left_alone_and_reported(when, adapt, batch):
    plain, model = (adapt({"task": PREFIX}, "task") for _ in range(2))
    if when == "after the patch":
        dk.patch(model)
    for one in (plain, model):
        attention_of(one, 1).__class__ = OwnForward
    if when == "before the patch":
        with pytest.warns(dk.DebertaKernelsWarning, match="OwnForward has a forward of its own"):
            report = dk.patch(model)
        assert report.patched == 1
        assert set(report.left_alone) == {"encoder.layer.1.attention.self"}
    torch.testing.assert_close(states(model, batch()), states(plain, batch()), atol=3e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="OwnForward has a forward of its own"):
        dk.patch(model, strict=True)


def test_an_adapters_with_other_arguments_is_left_alone(adapt, batch, monkeypatch):
    source = "class DisentangledSelfAttentionWithAdapters:\n def forward(self, hidden_states, new=None): ..."
    names = {"__name__": hub.__name__}
    exec(compile(source, hub.__file__, "exec"), names)
    forward = names["DisentangledSelfAttentionWithAdapters"].forward
    model = adapt({"task": PREFIX}, "task")
    monkeypatch.setattr(hub.DisentangledSelfAttentionWithAdapters, "forward", forward)
    with pytest.warns(dk.DebertaKernelsWarning, match="in this adapters takes .* which this release does not know"):
        assert dk.patch(model).patched == 0


def test_encoder_masks_of_pairs_keep_their_meaning_beside_prefixes(adapt, batch, calls_per_layer):
    inputs = batch(3, 29)
    plain, model = adapt({"task": PREFIX}, "task"), adapt({"task": PREFIX}, "task", "adapters first")
    blocks = (torch.arange(29)[:, None] // 10 == torch.arange(29) // 10)[None] & inputs["attention_mask"].bool()[
        :, None
    ]
    found = []
    for one in (plain, model):
        with torch.no_grad(), adapters.ForwardContext(one, **inputs):
            embedded = one.embeddings(inputs["input_ids"], mask=inputs["attention_mask"])
            found.append(one.encoder(embedded, blocks)[0])
    torch.testing.assert_close(found[1], found[0], atol=3e-5, rtol=1e-5)
    assert calls_per_layer() == "1"


def test_lora_through_the_plugin_interface_is_fused(build, batch, calls_per_layer):
    interface = adapters.AdapterModelInterface(
        adapter_methods=["bottleneck", "lora", "reft", "invertible"], model_embeddings="embeddings",
        model_layers="encoder.layer", layer_self_attn="attention", layer_cross_attn=None, attn_q_proj="self.query_proj",
        attn_k_proj="self.key_proj", attn_v_proj="self.value_proj", attn_o_proj="output.dense",
        layer_intermediate_proj="intermediate.dense", layer_output_proj="output.dense",
    )  # fmt: skip
    found = []
    for patched in (False, True):
        model = build()
        model.config.model_type = "deberta-v2"
        adapters.init(model, interface=interface)
        torch.manual_seed(3)
        model.add_adapter("task", config=adapters.LoRAConfig(use_gating=True, init_weights="bert"))
        model.set_active_adapters("task")
        if patched:
            assert dk.patch(model, strict=True).patched == 2
            dk.reset_stats()
        found.append(states(model, batch()))
    torch.testing.assert_close(found[1], found[0], atol=3e-5, rtol=1e-5)
    assert calls_per_layer() == "1"


def test_layers_without_an_adapter_run_as_plain_ones(adapt, batch, monkeypatch):

    needs.vector_library()
    ran = record_products(monkeypatch)
    config = adapters.LoRAConfig(attn_matrices=["q"])
    expected = states(adapt({"task": config}, "task"), batch())
    model = adapt({"task": config}, "task")
    dk.patch(model, fast_linears=True)
    actual = states(model, batch())
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)
    assert len(ran) == 2 * 6  # keys, their table, values, and three around attention; queries have an adapter


@pytest.mark.parametrize("how", ["inactive", "merged"])
@pytest.mark.parametrize(("head", "plain_layers"), [("DebertaV2Model", 6 + 2), ("DebertaModel", 4)])
def test_layers_whose_adapter_does_nothing_run_as_plain_ones(head, plain_layers, how, adapt, batch, monkeypatch):
    from deberta_kernels.models import position_tables as positions

    needs.vector_library()
    config = adapters.LoRAConfig(attn_matrices=["q", "k", "v"])
    plain, model = (adapt({"task": config}, "task", head=head) for _ in range(2))
    dk.patch(model, fast_linears=True)
    with_adapter = states(plain, batch())
    torch.testing.assert_close(states(model, batch()), with_adapter, atol=3e-5, rtol=1e-5)
    assert (attention_of(model) in positions._kept) == (head == "DebertaModel")  # v1 projects positions by themselves
    for one in (plain, model):
        one.set_active_adapters(None) if how == "inactive" else one.merge_adapter("task")
    ran = record_products(monkeypatch)
    expected = states(plain, batch())
    assert torch.allclose(expected, with_adapter, atol=1e-4) == (how == "merged")
    torch.testing.assert_close(states(model, batch()), expected, atol=3e-5, rtol=1e-5)
    assert len(ran) == 2 * plain_layers
    assert attention_of(model) in positions._kept
    for one in (plain, model):  # acts at once again
        one.set_active_adapters("task") if how == "inactive" else one.reset_adapter()
    torch.testing.assert_close(states(model, batch()), states(plain, batch()), atol=3e-5, rtol=1e-5)
    with adapters.AdapterSetup(None):
        torch.testing.assert_close(states(model, batch()), states(plain, batch()), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", ["LoRALinear", "torch.nn.Linear"])
def test_a_replaced_forward_of_a_layer_takes_part(cls, adapt, batch, monkeypatch):
    from adapters.methods import lora

    owner = torch.nn.Linear if cls == "torch.nn.Linear" else getattr(lora, cls)
    config = adapters.LoRAConfig(attn_matrices=["q", "k", "v"])
    plain, model = (adapt({"task": config}, None) for _ in range(2))
    dk.patch(model, fast_linears=True)
    before, original = states(model, batch()), owner.forward
    monkeypatch.setattr(owner, "forward", lambda self, x: original(self, x) / 2)
    with pytest.warns(dispatch.DebertaKernelsWarning, match=r"Linear\w*\.forward was replaced"):
        found = states(model, batch())
    torch.testing.assert_close(found, states(plain, batch()), atol=3e-5, rtol=1e-5)
    assert (found - before).abs().max() > 0.01
