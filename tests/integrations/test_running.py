"""A call ends in the world it began in, whoever takes the patch away meanwhile."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels.models import dense
from deberta_kernels.models.guards import running
from tests import needs
from tests.integrations.test_onlookers import PLACES, close, outputs


def test_a_checkpoint_recomputed_without_its_patch_says_so(build, batch):
    model, inputs = build().train(), batch(4, 41)
    dk.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**inputs).last_hidden_state.square().mean()
    dk.unpatch(model)
    with pytest.raises(RuntimeError, match=r"differentiated before unpatch\(\)"):
        loss.backward()
    model(**inputs).last_hidden_state.square().mean().backward()


@pytest.mark.parametrize("everywhere", [False, True])
def test_calls_under_way_end_in_the_world_they_began_in(everywhere, build_either, batch):
    model, inputs = build_either(1), batch(4, 41)
    expected = outputs(model, inputs)
    on, off = (dk.patch_all, dk.unpatch_all) if everywhere else (lambda: dk.patch(model), lambda: dk.unpatch(model))
    errors: list[BaseException] = []
    finished = threading.Event()

    def serve() -> None:
        while not finished.is_set():
            try:
                close(outputs(model, inputs), expected)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            on()
            finished.wait(0.005)
            off()
            finished.wait(0.005)
    finally:
        finished.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]
    assert sum(dk.stats()["calls"].values()) > 0


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_may_unpatch_the_model_it_is_called_in(place, build_either, batch):
    model, inputs = build_either(2), batch(4, 41)
    expected = outputs(model, inputs)
    dk.patch(model, unpad=True)
    parent, name = PLACES[place](model.encoder)
    getattr(parent, name).register_forward_hook(lambda *unused: dk.unpatch(model) and None)
    close(outputs(model, inputs), expected)
    assert type(model.encoder).forward.__module__.startswith("transformers.")


def test_an_accelerate_hook_made_under_patch_all_ends_with_it(build, batch):
    hooks = needs.package("accelerate.hooks")
    model, inputs = build(), batch(4, 41)
    expected = outputs(model, inputs)
    dk.patch_all()
    for module in (model.encoder, model.encoder.layer[0].attention.self, model.encoder.layer[1].output):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    close(outputs(model, inputs), expected)
    dk.unpatch_all()
    dk.reset_stats()
    assert all(map(torch.equal, outputs(model, inputs), expected))
    assert sum(dk.stats()["calls"].values()) == 0


def test_an_accelerate_hook_on_a_fast_layer_ends_with_patch_all(build, batch):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    needs.native_library()
    model, inputs = build(), batch(4, 41)
    layer = model.encoder.layer[1]
    seen = torch.randn(2, 9, layer.intermediate.dense.in_features)
    expected = layer.intermediate(seen)
    dk.patch_all(fast_linears=True)
    hooks.add_hook_to_module(layer.intermediate, hooks.ModelHook())
    outputs(model, inputs)
    dk.unpatch_all()
    with torch.no_grad(), mock.patch.object(dense, "apply_linear_gelu", side_effect=AssertionError):
        torch.testing.assert_close(layer.intermediate(seen), expected)


def test_unpatch_does_not_wait_for_ever(build, batch, monkeypatch):
    model, inputs, errors = build(), batch(), []
    dk.patch(model)
    monkeypatch.setattr(running, "_PATIENCE", 0.2)

    def undo() -> None:
        try:
            dk.unpatch(model)
        except RuntimeError as error:
            errors.append(error)

    def wait(*unused: Any) -> None:
        thread = threading.Thread(target=undo)
        thread.start()
        thread.join()

    handle = model.encoder.layer[0].register_forward_hook(wait)
    expected = outputs(model, inputs)
    assert "waited 0.2 s for a forward of another thread, and changed nothing" in str(errors[0])
    handle.remove()
    close(outputs(model, inputs), expected)
    dk.unpatch(model)
    close(outputs(model, inputs), expected)
