"""Whoever stands between the modules, or looks at them, sees what Hugging Face would show."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.integrations import handover
from deberta_kernels.integrations.handover import Handover


@pytest.fixture
def build_either(build: Callable[..., Any]) -> Callable[[int], Any]:
    """Build a small random DeBERTa: build_either(1) or build_either(2)."""
    return lambda version: build("DebertaModel" if version == 1 else "DebertaV2Model")


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


def plain(value: Any) -> Any:
    """Return what somebody saw in a form that can be compared: tensors as they are, and names of all else."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, (bool, int)) else type(value).__name__


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, seen: list) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.seen.append((plain(arguments), plain(named)))
        return self.inner(*arguments, **named)


def pre_hook(parent: Any, name: str, seen: list) -> None:
    def look(module: nn.Module, arguments: Any, named: Any) -> None:
        seen.append((plain(arguments), plain(named)))

    getattr(parent, name).register_forward_pre_hook(look, with_kwargs=True)


def hook(parent: Any, name: str, seen: list) -> None:
    def look(module: nn.Module, arguments: Any, named: Any, output: Any) -> None:
        seen.append((plain(arguments), plain(named)))

    getattr(parent, name).register_forward_hook(look, with_kwargs=True)


def wrapper(parent: Any, name: str, seen: list) -> None:
    setattr(parent, name, Wrapper(getattr(parent, name), seen))


def replaced_forward(parent: Any, name: str, seen: list) -> None:
    module = getattr(parent, name)
    kept = module.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        seen.append((plain(arguments), plain(named)))
        return kept(*arguments, **named)

    module.forward = forward


def subclass(parent: Any, name: str, seen: list) -> None:
    module = getattr(parent, name)

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append((plain(arguments), plain(named)))
        return super(type(module), self).forward(*arguments, **named)

    module.__class__ = type("Own", (type(module),), {"forward": forward})


def accelerate_hook(parent: Any, name: str, seen: list) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

    class Look(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
            seen.append((plain(arguments), plain(named)))
            return arguments, named

    hooks.add_hook_to_module(getattr(parent, name), Look())


def accelerate_sequence(parent: Any, name: str, seen: list) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hooks.add_hook_to_module(getattr(parent, name), hooks.AlignDevicesHook())

    class Look(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
            seen.append((plain(arguments), plain(named)))
            return arguments, named

    hooks.add_hook_to_module(getattr(parent, name), Look(), append=True)


WAYS = [pre_hook, hook, wrapper, replaced_forward, subclass, accelerate_hook, accelerate_sequence]
PLACES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "layer": lambda encoder: (encoder.layer, "1"),
    "attention": lambda encoder: (encoder.layer[1], "attention"),
    "self": lambda encoder: (encoder.layer[1].attention, "self"),
    "dense": lambda encoder: (encoder.layer[1].output, "dense"),
    "norm": lambda encoder: (encoder.layer[0].attention.output, "LayerNorm"),
}


def agree(here: Any, there: Any) -> None:
    if isinstance(here, torch.Tensor):
        assert here.shape == there.shape
        assert here.dtype == there.dtype
        close(here, there)
    elif isinstance(here, (tuple, list)):
        assert len(here) == len(there)
        for one, other in zip(here, there):
            agree(one, other)
    elif isinstance(here, dict):
        assert here.keys() == there.keys()
        for name in here:
            agree(here[name], there[name])
    else:
        assert here == there


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("patched", ["before somebody looks", "after", "all"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::deberta_kernels.dispatch.DebertaKernelsWarning")
def test_who_looks_on_sees_what_hugging_face_shows(way, place, patched, version, build_either, batch):
    inputs, found = batch(4, 41), []
    for kernels in (False, True):
        model, seen = build_either(version), []
        if kernels and patched == "all":
            dk.patch_all(unpad=True, fast_linears=True)
        if kernels and patched == "before somebody looks":
            dk.patch(model, unpad=True, fast_linears=True)
        way(*PLACES[place](model.encoder), seen)
        if kernels and patched == "after":
            dk.patch(model, unpad=True, fast_linears=True)
        states = outputs(model, inputs)
        found.append((states, seen))
    (expected, there), (actual, here) = found
    assert there
    agree(here, there)
    close(actual, expected)


@pytest.mark.parametrize("version", [1, 2])
def test_attention_inside_watched_layers_is_still_fused(version, build_either, batch):
    model, inputs = build_either(version), batch(4, 41)
    expected = outputs(model, inputs)
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *unused: None)
    dk.patch(model, strict=True)
    close(outputs(model, inputs), expected)
    assert sum(dk.stats()["calls"].values()) == 2
    assert dk.stats()["fallbacks"] == {}


def test_position_weights_of_a_watched_version_one_get_their_gradients(build_either, batch):
    model, inputs = build_either(1), batch(4, 41)
    twin = copy.deepcopy(model)
    dk.patch(model, strict=True)
    for one in (model, twin):
        one.encoder.layer[0].register_forward_pre_hook(lambda *unused: None)
        one(**inputs).last_hidden_state.square().mean().backward()
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("way", [pre_hook, hook])
def test_a_hook_on_all_modules_sees_what_hugging_face_shows(way, build, batch):
    inputs, found = batch(4, 41), []
    for kernels in (False, True):
        model, seen = build(), []
        if kernels:
            dk.patch(model, unpad=True)

        def look(module, arguments, *output, seen=seen):
            if type(module).__name__ in ("DebertaV2Layer", "DebertaV2Attention", "DebertaV2Output"):
                seen.append(plain(arguments))

        registry = nn.modules.module
        register = (
            registry.register_module_forward_pre_hook if way is pre_hook else registry.register_module_forward_hook
        )
        handle = register(look)
        try:
            states = outputs(model, inputs)
        finally:
            handle.remove()
        found.append((states, seen))
    (expected, there), (actual, here) = found
    assert there
    agree(here, there)
    close(actual, expected)


def test_hooks_that_only_move_weights_cost_nothing(build):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = build()
    dk.patch(model)
    layer = model.encoder.layer[0]
    for module in (layer, layer.attention, layer.attention.self, layer.output.dense):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook())
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)

    def level() -> Handover:
        return handover.handover_of(layer, model.encoder, lambda attention, seen: True, False, set())

    assert level() is Handover.PACKED
    layer._hf_hook.hooks[0].pre_forward = lambda module, *arguments, **named: (arguments, named)
    assert level() is Handover.TENSORS
    del layer._hf_hook.hooks[0].pre_forward
    layer.output.dense.forward = lambda x: x  # the hook is still there, and no longer what runs
    assert level() is Handover.MASK


def test_a_checkpoint_of_ones_own_gets_tensors(build, batch):
    model, inputs = build().train(), batch(4, 41)
    dk.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []

    def own(function, *arguments, **named):
        seen.append([type(argument).__name__ for argument in arguments])
        return function(*arguments, **named)

    model(**inputs)
    for layer in model.encoder.layer:
        layer._gradient_checkpointing_func = own
    model(**inputs)
    assert seen
    assert not any("Mask" in name for names in seen for name in names)


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
