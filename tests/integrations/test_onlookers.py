"""Whoever stands between the modules, or looks at them, sees what Hugging Face would show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deberta_kernels as dk
from deberta_kernels.models.guards import handover
from deberta_kernels.models.guards.handover import Handover
from tests import needs


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
    hooks = needs.package("accelerate.hooks")

    class Look(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
            seen.append((plain(arguments), plain(named)))
            return arguments, named

    hooks.add_hook_to_module(getattr(parent, name), Look())


def accelerate_sequence(parent: Any, name: str, seen: list) -> None:
    hooks = needs.package("accelerate.hooks")
    hooks.add_hook_to_module(getattr(parent, name), hooks.AlignDevicesHook())

    class Look(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
            seen.append((plain(arguments), plain(named)))
            return arguments, named

    hooks.add_hook_to_module(getattr(parent, name), Look(), append=True)


def own_call(parent: Any, name: str, seen: list) -> None:
    module = getattr(parent, name)
    kept = module._call_impl

    def call(*arguments: Any, **named: Any) -> Any:
        seen.append((plain(arguments), plain(named)))
        return kept(*arguments, **named)

    module._call_impl = call


def accelerate_post_forward(parent: Any, name: str, seen: list) -> None:
    hooks = needs.package("accelerate.hooks")
    look = hooks.ModelHook()
    look.post_forward = lambda module, output: seen.append(plain(output)) or output
    hooks.add_hook_to_module(getattr(parent, name), look)


WAYS = [
    pre_hook,
    hook,
    wrapper,
    replaced_forward,
    subclass,
    own_call,
    accelerate_hook,
    accelerate_sequence,
    accelerate_post_forward,
]
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
    hooks = needs.package("accelerate.hooks")
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


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("terms", [["c2p", "p2c"], ["c2p"], ["p2c"]])
@pytest.mark.parametrize("version", [1, 2])
def test_hooks_on_projections_are_called_as_hugging_face_calls_them(version, terms, share, build, batch):
    inputs, found = batch(2, 11), []
    settings = {"pos_att_type": terms} | ({} if version == 1 else {"share_att_key": share})
    for kernels in (False, True):
        model, seen = build("DebertaModel" if version == 1 else "DebertaV2Model", **settings), []
        if kernels:
            dk.patch(model, unpad=True)
        for name, part in model.encoder.layer[1].attention.self.named_children():
            if name != "dropout":

                def look(_, args, out, name=name, seen=seen):
                    seen.append((name, args[0].shape))

                part.register_forward_hook(look)
        states = outputs(model, inputs)
        found.append((states, seen))
    (expected, there), (actual, here) = found
    assert here == there
    close(actual, expected)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "layer": lambda encoder: encoder.layer[0],
    "attention": lambda encoder: encoder.layer[1].attention,
    "self": lambda encoder: encoder.layer[1].attention.self,
    "a projection": lambda encoder: encoder.layer[1].attention.self.query_proj,
    "a dense layer": lambda encoder: encoder.layer[0].intermediate.dense,
    "the convolution": lambda encoder: encoder.conv,
    "its norm": lambda encoder: encoder.conv.LayerNorm,
}


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("place", CHANGES.values(), ids=CHANGES)
def test_a_hook_may_change_the_relative_embeddings_in_the_middle_of_a_forward(place, unpad, build, batch):
    inputs, found = batch(4, 41), []
    for kernels in (False, True):
        model = build(norm_rel_ebd="none", conv_kernel_size=3, num_hidden_layers=3)
        if kernels:
            dk.patch(model, unpad=unpad, strict=True)
            outputs(model, inputs)
        weight = model.encoder.rel_embeddings.weight
        kept = weight.detach().clone()

        def change(module, arguments, weight=weight, kept=kept):
            weight.data.copy_(3 * kept)

        handle = place(model.encoder).register_forward_pre_hook(change)
        during = outputs(model, inputs)
        weight.data.copy_(kept)
        handle.remove()
        found.append((during, outputs(model, inputs)))
    close(*found)


def test_a_hook_on_the_convolution_may_change_padded_rows(build, batch):
    inputs, found = batch(4, 41), []
    for kernels in (False, True):
        model = build(conv_kernel_size=3)
        if kernels:
            dk.patch(model, unpad=True, strict=True)
        model.encoder.conv.register_forward_hook(lambda _, args, out: out + torch.linspace(0, 1, 41)[:, None])
        found.append(outputs(model, inputs))
    close(*found)


@pytest.mark.parametrize("edit", ["mask", "distances"])
def test_a_hook_may_change_in_place_what_all_layers_share(edit, build, batch):
    inputs, found = batch(4, 41), []

    def change(module, arguments, named):
        (arguments[1] if edit == "mask" else named["relative_pos"]).fill_(1)

    for kernels in (False, True):
        model = build(num_hidden_layers=3)
        if kernels:
            dk.patch(model, unpad=True)
        model.encoder.layer[0].register_forward_pre_hook(change, with_kwargs=True)
        found.append(outputs(model, inputs))
    close(*found)


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook", "forward_hook"])
def test_hooks_on_the_attention_dropout_take_part(kind, build, batch):
    inputs, gradients = batch(4, 41), []
    for kernels in (False, True):
        model = build()
        if kernels:
            dk.patch(model)
        dropout = model.encoder.layer[0].attention.self.dropout
        zero = {
            "full_backward_hook": lambda _, into, out: (torch.zeros_like(into[0]),),
            "full_backward_pre_hook": lambda _, out: (torch.zeros_like(out[0]),),
            "forward_hook": lambda _, args, out: out.detach(),
        }[kind]
        getattr(dropout, f"register_{kind}")(zero)
        model(**inputs).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_a_function_mode_sees_the_functions_of_the_attention(build, batch):
    class Softer(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            return 0.5 * output if function is nn.functional.softmax else output

    inputs, found = batch(4, 41), []
    for kernels in (False, True):
        model = build()
        if kernels:
            dk.patch(model, unpad=True)
            outputs(model, inputs)
        with Softer():
            found.append(outputs(model, inputs))
    close(*found)
