"""Code that somebody replaced runs: a module is fused only where the code it would run is Hugging Face's own."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.deberta import modeling_deberta as hf_one
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

import deberta_kernels as dk
from deberta_kernels import dispatch

WARNING = dispatch.DebertaKernelsWarning


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what `make` makes of it, as it is found at that moment."""
    found, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, make(found))
    try:
        yield
    finally:
        setattr(owner, name, found) if is_own else delattr(owner, name)


def halves_the_output(old: Any) -> Any:
    @functools.wraps(old)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        output = old(self, *arguments, **named)
        return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output

    return forward


def halves_the_states(old: Any) -> Any:
    def forward(self: Any, hidden_states: Any, *arguments: Any, **named: Any) -> Any:
        return old(self, 0.5 * hidden_states, *arguments, **named)

    return forward


DENSE = [
    *(getattr(hf, name) for name in ("DebertaV2Intermediate", "DebertaV2Output", "DebertaV2SelfOutput")),
    *(getattr(hf_one, name) for name in ("DebertaIntermediate", "DebertaOutput", "DebertaSelfOutput")),
]
ROUTES = [hf.DebertaV2Attention, hf.DebertaV2Layer, hf_one.DebertaAttention, hf_one.DebertaLayer]
ATTENTIONS = [hf.DisentangledSelfAttention, hf_one.DisentangledSelfAttention]
ENCODERS = [hf.DebertaV2Encoder, hf_one.DebertaEncoder]
# An encoder returns no tuple of tensors.
CHANGES = [
    pytest.param(cls, make, id=f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}-{make.__name__}")
    for cls in (*DENSE, *ROUTES, *ATTENTIONS, *ENCODERS)
    for make in ((halves_the_states,) if cls in ENCODERS else (halves_the_states, halves_the_output))
]


@pytest.fixture
def build_for(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build a small random model of the version that a modelling file, or a class in it, belongs to."""

    def build_for(code: Any, **settings: Any) -> Any:
        home = getattr(code, "__module__", None) or code.__name__
        return build("DebertaV2Model" if "deberta_v2" in home else "DebertaModel", **settings)

    return build_for


def states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["before", "after", "all"])
@pytest.mark.parametrize(("cls", "make"), CHANGES)
@pytest.mark.filterwarnings("ignore::deberta_kernels.dispatch.DebertaKernelsWarning")
def test_a_forward_replaced_for_its_class(cls, make, way, build_for, batch):
    model, inputs = build_for(cls), batch(4, 41)
    untouched = states(model, inputs)
    with replaced(cls, "forward", make):
        expected = states(model, inputs)
        if way == "before":
            dk.patch(model, unpad=True, fast_linears=True)
            close(states(model, inputs), expected)
    assert not torch.allclose(untouched, expected, atol=1e-2)
    if way != "before":
        (dk.patch_all if way == "all" else functools.partial(dk.patch, model))(unpad=True, fast_linears=True)
        with replaced(cls, "forward", make):
            close(states(model, inputs), expected)
    elif cls in (*ATTENTIONS, *ENCODERS):  # which were left alone
        dk.patch(model)
    close(states(model, inputs), untouched)


@pytest.mark.parametrize("cls", [*DENSE, *ROUTES])
def test_patch_all_goes_around_forwards_replaced_before(cls, build_for, batch):
    model, inputs = build_for(cls), batch(4, 41)
    with replaced(cls, "forward", halves_the_states):
        expected = states(model, inputs)
        dk.patch_all(unpad=True, fast_linears=True)
        close(states(model, inputs), expected)
    dk.unpatch_all()


@pytest.mark.no_kernels
@pytest.mark.parametrize("cls", [*ATTENTIONS, *ENCODERS])
def test_patch_all_refuses_forwards_it_cannot_replace(cls, build_for, batch):
    model, inputs = build_for(cls), batch(4, 41)
    with replaced(cls, "forward", halves_the_states):
        expected = states(model, inputs)
        with pytest.raises(NotImplementedError, match=f"cannot patch {cls.__name__}: .* was replaced by"):
            dk.patch_all()
        close(states(model, inputs), expected)


@pytest.mark.parametrize("name", ["DebertaV2Intermediate", "DebertaV2SelfOutput", "DisentangledSelfAttention"])
def test_a_replaced_forward_is_told_once_or_refused(name, build, batch):
    model, inputs, cls = build(), batch(), getattr(hf, name)
    dk.patch(model, fast_linears=True)
    with replaced(cls, "forward", halves_the_output):
        with pytest.warns(WARNING, match=f"the forward of {name} was replaced by"):
            states(model, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            states(model, inputs)
    (reason,) = dk.stats()["fallbacks"]
    assert f"halves_the_output of {__file__}" in reason or f"forward of {__file__}" in reason
    dk.patch(model, strict=True, fast_linears=True)
    with replaced(cls, "forward", halves_the_output), pytest.raises(NotImplementedError, match=f"of {name} was"):
        states(model, inputs)
    states(model, inputs)


def negated(old: Any) -> Any:
    return lambda *arguments, **named: -old(*arguments, **named)


def doubled(old: Any) -> Any:
    return lambda *arguments, **named: 2 * old(*arguments, **named)


FUNCTIONS = [
    (hf, "build_relative_position", negated),
    (hf, "make_log_bucket_position", lambda old: lambda distance, *more: distance.clamp(-7, 7)),
    (hf, "scaled_size_sqrt", doubled),
    (hf_one, "build_relative_position", negated),
    (hf_one, "scaled_size_sqrt", doubled),
    (hf_one, "compute_attention_span", lambda old: lambda *arguments: torch.tensor(5)),
    (torch, "bmm", doubled),
    (torch, "gather", lambda old: lambda x, dim=-1, index=None: old(x, dim, index.flip(-1))),
    (nn.functional, "softmax", lambda old: lambda x, dim: old(0.5 * x, dim)),
    (nn.functional, "dropout", lambda old: lambda x, *more: 0.5 * x),
    (torch.Tensor, "softmax", lambda old: lambda x, *more, **named: old(0.5 * x, *more, **named)),
    (torch.Tensor, "bool", lambda old: lambda x: old(x) | (torch.arange(x.shape[-1]) % 3 == 0)),
    (hf, "torch", lambda old: SimpleNamespace(**{**vars(old), "bmm": lambda x, y: 2 * old.bmm(x, y)})),
]


@pytest.mark.parametrize("way", ["before", "after", "all"])
@pytest.mark.parametrize(("owner", "name", "make"), FUNCTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_replaced_function(owner, name, make, way, build_for, batch):
    model, inputs = build_for(owner if owner in (hf, hf_one) else hf), batch(4, 41)
    untouched = states(model, inputs)
    with replaced(owner, name, make):
        expected = states(model, inputs)
        assert not torch.allclose(untouched, expected, atol=1e-2)
        if way == "before":
            dk.patch(model, unpad=True, fast_linears=True)
            with pytest.warns(WARNING, match=name):
                close(states(model, inputs), expected)
    if way != "before":
        dk.patch_all(unpad=True) if way == "all" else dk.patch(model, unpad=True)
        with replaced(owner, name, make), pytest.warns(WARNING, match=name):
            close(states(model, inputs), expected)
    dk.reset_stats()
    close(states(model, inputs), untouched)
    assert sum(dk.stats()["calls"].values()) == 2
    if way != "all":
        dk.patch(model, strict=True)
        with replaced(owner, name, make), pytest.raises(NotImplementedError, match=name):
            states(model, inputs)


@pytest.mark.parametrize("holder", ["encoder", "attention", "both"])
@pytest.mark.parametrize(
    ("name", "value"), [("max_relative_positions", 20), ("position_buckets", 8), ("position_buckets", -1)]
)
@pytest.mark.filterwarnings("ignore::deberta_kernels.dispatch.DebertaKernelsWarning")
def test_an_attribute_of_the_encoder_or_its_attention(name, value, holder, build, batch):
    inputs, found = batch(4, 41), []
    for patched in (False, True):
        model = build()
        if patched:
            dk.patch(model)
            states(model, inputs)
        inner = [layer.attention.self for layer in model.encoder.layer]
        for part in {"encoder": [model.encoder], "attention": inner, "both": [model.encoder, *inner]}[holder]:
            setattr(part, name, value)
        found.append(states(model, inputs))
    close(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_buckets_are_counted_in_the_default_dtype(dtype, build, batch):
    model, inputs = build(position_buckets=32, max_relative_positions=40), batch(2, 61)
    torch.set_default_dtype(dtype)
    try:
        expected = states(model, inputs)
        dk.patch(model)
        close(states(model, inputs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((torch.int8, value) for value in (16, 2)),
        *((torch.float32, value) for value in (16, 2, float("nan"), float("inf"))),
    ],
    ids=str,
)
def test_masks_of_other_values_mean_what_their_products_mean(value, dtype, build, batch):
    model, inputs = build(), batch(3, 23)
    states_in = torch.randn(3, 23, 32, generator=torch.Generator().manual_seed(4))
    mask = torch.where(inputs["attention_mask"] == 1, torch.tensor(value), torch.tensor(0)).to(dtype)
    with torch.no_grad():
        expected = model.encoder(states_in, mask).last_hidden_state
        dk.patch(model, unpad=True)
        close(model.encoder(states_in, mask).last_hidden_state, expected)


def test_a_model_of_stand_alone_modules_is_patched(build, batch):
    model, inputs = build(), batch(4, 41)
    expected = states(model, inputs)
    for layer in model.encoder.layer:
        ours = dk.DisentangledSelfAttention(model.config).eval()
        ours.load_state_dict(layer.attention.self.state_dict())
        layer.attention.self = ours
    assert dk.patch(model, strict=True).encoders == 1
    close(states(model, inputs), expected)


class Drawing(nn.ModuleList):
    """Layers of which each pass through the list draws some, the last one always."""

    def __iter__(self) -> Iterator[nn.Module]:
        draws = torch.rand(len(self))
        draws[-1] = 1
        return (layer for layer, draw in zip(super().__iter__(), draws) if draw > 0.5)


class Changing(nn.ModuleList):
    """Layers whose list changes the third one just before it is its turn."""

    def __iter__(self) -> Iterator[nn.Module]:
        for number, layer in enumerate(super().__iter__()):
            if number == 2:
                dense = layer.output.dense
                dense.forward = partial(lambda dense, x: nn.functional.linear(x.cumsum(1), dense.weight), dense)
            yield layer


@pytest.mark.parametrize("layers", [Drawing, Changing])
def test_a_list_that_goes_through_its_layers_in_a_way_of_its_own_does_so_once(layers, build_either, batch):
    inputs = batch(4, 41)
    for version in (1, 2):
        found = []
        for is_patched in (False, True):
            model = build_either(version, num_hidden_layers=4)
            model.encoder.layer = layers(model.encoder.layer)
            if is_patched:
                dk.patch(model, unpad=True)
            torch.manual_seed(3)
            with torch.no_grad():
                states = [model(**inputs).last_hidden_state for _ in range(4)]
            found.append((states, torch.get_rng_state()))
        (expected, generator), (actual, generator_after) = found
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)
        assert torch.equal(generator, generator_after)


class OwnWeight(nn.Parameter):
    """A weight whose code sees what it is multiplied by, and acts on it."""

    act: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is nn.functional.linear:
                cls.act(arguments[0])
            return function(*arguments, **(named or {}))


def test_a_weight_with_code_of_its_own_sees_padded_states_and_may_change_later_layers(build_either, batch, monkeypatch):
    for version in (1, 2):
        found = []
        for is_patched in (False, True):
            model, seen = build_either(version, num_hidden_layers=4), []
            first, last = (model.encoder.layer[number].output.dense for number in (1, 3))

            def act(states: torch.Tensor, seen: Any = seen, dense: Any = last) -> None:
                seen.append(states.shape)
                dense.forward = lambda states: nn.functional.linear(states.cumsum(1), dense.weight)  # mixes tokens

            monkeypatch.setattr(OwnWeight, "act", staticmethod(act))
            first.weight = OwnWeight(first.weight.detach())
            if is_patched:
                dk.patch(model, unpad=True)
            with torch.no_grad():
                found.append((model(**batch(4, 41)).last_hidden_state, seen))
        assert found[1][1] == found[0][1] != []
        torch.testing.assert_close(found[1][0], found[0][0], atol=3e-5, rtol=1e-5)
