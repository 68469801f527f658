"""What patching leaves as it was, what it reports, and that it can be undone."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import deberta_kernels as dk
from deberta_kernels import dispatch
from deberta_kernels.backends import Backend

ROOT = Path(__file__).resolve().parents[2]


def states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def kernel_calls() -> int:
    return sum(dk.stats()["calls"].values())


def test_unpatch_gives_the_very_model_from_before(build, batch):
    model, inputs = build(conv_kernel_size=3), batch()
    classes = [type(m) for m in model.modules()]
    contents = [dict(m.__dict__) for m in model.modules()]
    before = states(model, inputs)
    dk.patch(model)
    states(model, inputs)
    assert dk.unpatch(model) == 3
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__ for m in model.modules()] == contents
    dk.reset_stats()
    assert torch.equal(states(model, inputs), before)
    assert kernel_calls() == 0
    assert dk.unpatch(model) == 0


def test_parameters_buffers_and_keys_are_the_same_objects(build):
    model = build(share_att_key=False, conv_kernel_size=3)
    keys = list(model.state_dict())
    objects = [id(t) for t in [*model.parameters(), *model.buffers()]]
    names = [type(m).__name__ for m in model.modules()]
    text = repr(model)
    dk.patch(model)
    assert list(model.state_dict()) == keys
    assert [id(t) for t in [*model.parameters(), *model.buffers()]] == objects
    assert [type(m).__name__ for m in model.modules()] == names
    assert repr(model) == text
    assert type(model) is transformers.DebertaV2Model
    assert isinstance(model.encoder, hf.DebertaV2Encoder)
    assert isinstance(model.encoder.layer[0].attention.self, hf.DisentangledSelfAttention)


def test_patching_adds_nothing_to_the_instances(build, batch):
    model = build()
    contents = [set(m.__dict__) for m in model.modules()]
    dk.patch(model)
    states(model, batch())
    assert [set(m.__dict__) for m in model.modules()] == contents


def test_patching_twice_is_patching_once_with_the_last_options(build, batch):
    model = build()
    dk.patch(model, backend="reference")
    kinds = [type(m) for m in model.modules()]
    assert dk.patch(model, backend="reference").patched == 2
    assert [type(m) for m in model.modules()] == kinds
    states(model, batch())
    assert dk.stats()["calls"]["reference"] == 2
    dk.patch(model, strict=True)
    with pytest.raises(NotImplementedError, match="attention probabilities"):
        model(**batch(), output_attentions=True)
    dk.unpatch(model)
    assert type(model.encoder) is hf.DebertaV2Encoder


def test_deepcopy_of_a_patched_model_is_patched_and_independent(build, batch):
    model, inputs = build(), batch()
    dk.patch(model, backend="reference")
    expected = states(model, inputs)
    twin = copy.deepcopy(model)
    dk.reset_stats()
    assert torch.equal(states(twin, inputs), expected)
    assert dk.stats()["calls"]["reference"] == 2
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        twin.encoder.layer[0].attention.self.query_proj.weight.zero_()
    assert torch.equal(states(model, inputs), expected)
    dk.unpatch(twin)
    assert type(twin.encoder) is hf.DebertaV2Encoder
    assert type(model.encoder) is not hf.DebertaV2Encoder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_the_patch_and_its_options(protocol, build, batch):
    model, inputs = build(), batch()
    dk.patch(model, backend="reference")
    twin = pickle.loads(pickle.dumps(model, protocol))
    expected = states(model, inputs)
    dk.reset_stats()
    assert torch.equal(states(twin, inputs), expected)
    assert dk.stats()["calls"]["reference"] == 2
    assert type(twin.encoder) is type(model.encoder)


def test_a_pickle_loads_in_a_process_that_never_patched(build, batch, tmp_path):
    model, inputs = build(), batch()
    dk.patch(model)
    torch.save((model, inputs, states(model, inputs)), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, inputs, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "import deberta_kernels as dk\n"
        "with torch.no_grad(): out = model(**inputs)[0]\n"
        "torch.testing.assert_close(out, expected)\n"
        "assert sum(dk.stats()['calls'].values()) == 2\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True, env=environment)


def test_torch_save_round_trip_in_memory(build, batch):
    model, inputs = build(), batch()
    dk.patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(states(twin, inputs), states(model, inputs))


def test_save_pretrained_and_from_pretrained(build, batch, tmp_path):
    model, inputs = build("DebertaV2ForSequenceClassification"), batch()
    model.save_pretrained(tmp_path / "plain")
    dk.patch(model)
    expected = states(model, inputs)
    model.save_pretrained(tmp_path / "patched")
    plain = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert sorted(p.name for p in (tmp_path / "patched").iterdir()) == plain
    for name in plain:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "patched").eval()
    assert type(loaded.deberta.encoder) is hf.DebertaV2Encoder
    dk.patch(loaded)
    torch.testing.assert_close(states(loaded, inputs), expected)


def test_hooks_see_what_they_saw_before(build, batch):
    model, inputs = build(), batch()
    seen: list[tuple] = []
    attention = model.encoder.layer[1].attention.self

    def shapes(label):
        return lambda module, args, output: seen.append(
            (label, tuple((output[0] if isinstance(output, tuple) else output).shape))
        )

    attention.register_forward_hook(shapes("attention"))
    model.encoder.layer[0].register_forward_hook(shapes("layer"))
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(("encoder", type(output).__name__)))
    for name in ("query_proj", "key_proj", "value_proj"):
        getattr(attention, name).register_forward_hook(lambda module, args, output, name=name: seen.append((name,)))
    states(model, inputs)
    before, seen[:] = list(seen), []
    dk.patch(model)
    for _ in range(2):
        seen.clear()
        states(model, inputs)
        assert sorted(seen) == sorted(before)


def test_a_hook_may_change_a_projection(build, batch):
    model, inputs = build(), batch()
    model.encoder.layer[0].attention.self.query_proj.register_forward_hook(lambda module, args, output: output * 2)
    expected = states(model, inputs)
    dk.patch(model, strict=True)
    for _ in range(2):
        torch.testing.assert_close(states(model, inputs), expected, atol=2e-5, rtol=1e-5)


def test_a_projection_of_another_class_is_called_as_a_module(build, batch):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model, inputs = build(), batch()
    attention = model.encoder.layer[0].attention.self
    attention.key_proj = Doubled(attention.key_proj)
    expected = states(model, inputs)
    dk.patch(model, strict=True)
    torch.testing.assert_close(states(model, inputs), expected, atol=2e-5, rtol=1e-5)


def test_frozen_parameters_get_no_gradient(build, batch):
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1" in name and "query_proj" in name)
    dk.patch(model, strict=True)
    model(**batch())[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_only_the_patched_model_of_two_is_fused(build, batch):
    plain, fused, inputs = build(), build(), batch()
    dk.patch(fused)
    states(plain, inputs)
    assert kernel_calls() == 0
    states(fused, inputs)
    assert kernel_calls() == 2


def test_deberta_is_found_inside_a_plain_module(build):
    class Ranker(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.towers = nn.ModuleDict({"query": backbone, "text": backbone})  # one model under two names

    ranker = Ranker(build())
    report = dk.patch(ranker)
    assert report.patched == 2
    assert report.encoders == 1
    assert dk.unpatch(ranker) == 3


def test_a_bare_attention_module_can_be_patched(build):
    attention = build(pos_att_type=["c2p"]).encoder.layer[0].attention.self
    hidden, table = torch.randn(2, 9, 32), torch.randn(32, 32)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :, 6:] = False
    with torch.no_grad():
        expected, _ = attention(hidden, mask, rel_embeddings=table)
        assert dk.patch(attention, strict=True).patched == 1
        actual, probabilities = attention(hidden, mask, rel_embeddings=table)
    assert probabilities is None
    torch.testing.assert_close(actual, expected)
    assert kernel_calls() == 1


@pytest.mark.parametrize("shape", [(9, 9), (1, 9), (4, 9, 9), (1, 4, 9, 9), (2, 1, 9, 1), (2, 4, 1, 9), (1, 1, 1, 9)])
def test_a_bare_attention_module_broadcasts_its_mask_as_before(shape, build):
    attention = build().encoder.layer[0].attention.self
    hidden, table = torch.randn(2, 9, 32), torch.randn(32, 32)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    with torch.no_grad():
        expected, _ = attention(hidden, mask, rel_embeddings=table)
        dk.patch(attention, strict=True)
        actual, _ = attention(hidden, mask, rel_embeddings=table)
    torch.testing.assert_close(actual, expected)
    assert kernel_calls() == 1


def test_a_model_without_deberta_is_refused_by_name():
    with pytest.raises(ValueError, match="must contain a DeBERTa of transformers, got Linear"):
        dk.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        dk.patch("microsoft/deberta-v3-base")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        dk.unpatch({})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"backend": 3}, TypeError, "backend must be a string"),
        ({"unpad": 1.0}, ValueError, "unpad must be 'auto', True or False, got 1.0"),
        ({"unpad": "always"}, ValueError, "unpad must be 'auto', True or False"),
        ({"strict": "yes"}, TypeError, "strict must be a bool"),
    ],
)
def test_wrong_options_are_refused_before_anything_changes(options, error, text, build):
    model = build()
    with pytest.raises(error, match=text):
        dk.patch(model, **options)
    with pytest.raises(error, match=text):
        dk.patch_all(**options)
    assert type(model.encoder) is hf.DebertaV2Encoder
    assert hf.DebertaV2Encoder.forward.__module__ == hf.__name__


@pytest.mark.parametrize("unpad", ["auto", False])
def test_the_batch_runs_padded_for_now(unpad, build, batch):
    model = build()
    assert dk.patch(model, unpad=unpad).patched == 2
    assert states(model, batch()).shape == (3, 37, 32)


def test_hooks_of_accelerate_keep_working(build, batch):
    import accelerate

    model, inputs = build(), batch()
    before = states(model, inputs)
    for module in (model.encoder, model.encoder.layer[0].attention.self, model.encoder.layer[1]):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    dk.patch(model, strict=True)
    torch.testing.assert_close(states(model, inputs), before, atol=2e-5, rtol=1e-5)
    assert kernel_calls() == 2
    dk.unpatch(model)
    assert torch.equal(states(model, inputs), before)
    assert kernel_calls() == 2


def test_a_subclass_made_after_patching_has_to_go_before_unpatch(build):
    model = build()
    dk.patch(model)
    model.encoder.__class__ = type("Wrapped", (type(model.encoder),), {})
    with pytest.raises(RuntimeError, match="undo that before unpatch"):
        dk.unpatch(model)
    assert type(model.encoder.layer[0].attention.self) is not hf.DisentangledSelfAttention


def test_patching_does_not_import_transformers_for_a_model_without_it():
    program = (
        "import sys, torch, deberta_kernels as dk\n"
        "try: dk.patch(torch.nn.Linear(1, 1))\n"
        "except ValueError: pass\n"
        "assert 'transformers' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_backend_that_does_not_load_is_refused_at_once(build, monkeypatch):
    backend = "triton"
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setitem(dispatch.REGISTRY, backend, Backend("deberta_kernels.impl.missing"))
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=f"the module of backend '{backend}' does not load"):
        dk.patch(model, backend=backend)
    assert [type(module) for module in model.modules()] == classes
    forward = hf.DisentangledSelfAttention.forward
    with pytest.raises(RuntimeError, match="does not load"):
        dk.patch_all(backend=backend)
    assert hf.DisentangledSelfAttention.forward is forward


def test_a_warning_points_at_the_code_that_called_the_model(build, batch):
    model = build(num_hidden_layers=1)
    dk.patch(model)
    with pytest.warns(dk.dispatch.DebertaKernelsWarning, match="probabilities were asked for") as caught:
        model(**batch(), output_attentions=True)
    assert {warning.filename for warning in caught} == {__file__}
