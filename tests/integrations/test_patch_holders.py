"""`patch` and `unpatch` of what holds a model: a pipeline, a trainer, and the like."""

import pytest
import torch
from torch import nn

import deberta_kernels as dk


class Holder:
    def __init__(self, model):
        self.model = model


@pytest.mark.no_kernels
def test_what_holds_no_module_is_refused_by_what_it_holds(build):
    for act in (dk.patch, dk.unpatch):
        with pytest.raises(TypeError, match=r"got Holder, whose .model is a str; pass the model itself, or a pipeline"):
            act(Holder("microsoft/deberta-v3-base"))
        with pytest.raises(TypeError, match=r"got the class Linear; pass an instance of it"):
            act(nn.Linear)
    with pytest.raises(ValueError, match="must contain a DeBERTa of transformers, got Linear"):
        dk.patch(Holder(nn.Linear(2, 2)))
    endless = Holder(None)
    endless.model = endless
    with pytest.raises(TypeError, match=r"got Holder, whose .model is a Holder"):
        dk.patch(endless)


class Closed:
    def __getattr__(self, name):
        raise RuntimeError(f"no {name} before fit()")


@pytest.mark.no_kernels
def test_what_raises_when_it_is_asked_holds_nothing():
    for act in (dk.patch, dk.unpatch):
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got Closed; pass the model itself"):
            act(Closed())


@pytest.mark.no_kernels
def test_a_trainer_that_will_make_another_model_is_warned_of(build):
    trainer = Holder(build())
    trainer.model_init = build
    with pytest.warns(
        dk.DebertaKernelsWarning, match=r"Holder has a model_init, .* is not patched; patch the model ins"
    ):
        dk.patch(trainer)


def test_what_holds_a_model_is_patched_and_unpatched(build, batch):
    model, inputs = build(), batch(3, 20)
    classes = [type(module) for module in model.modules()]
    expected = model(**inputs)[0]
    assert dk.patch(Holder(Holder(model)), strict=True).patched == 2
    torch.testing.assert_close(model(**inputs)[0], expected, atol=3e-5, rtol=1e-4)
    assert sum(dk.stats()["calls"].values()) == 2
    assert dk.unpatch(Holder(model)) == 3
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(model(**inputs)[0], expected, atol=0, rtol=0)
