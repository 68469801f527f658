"""A model and its patched twin live the same random life, and answer alike after each event of it.

Lives are made of what users do: forwards of any shape, training steps, edits of weights in every way PyTorch knows,
hooks, LoRA, moves between dtypes, copies, pickles, patches with other options. Weights stay bit-equal: the gradients of
the unpatched model move both.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import nn
from torch.nn.utils import parametrize

import deberta_kernels as dk
from tests.integrations.conftest import SMALL

# Allowed differences, in shares of the largest number: rounding is far below, and what is mistaken far above. DeBERTa
# v1 normalises in float32 whatever it is given.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15}
WAYS = ("in place", "data", "copied", "loaded", "another parameter", "numpy", "data exchanged", "set", "swapped rows")
HOOKS = ("pre", "pre with kwargs", "forward", "forward with kwargs", "backward", "instance forward", "wrapper")


def scale_first(module: nn.Module, arguments: Any, named: Any = None) -> Any:
    changed = (arguments[0] * 1.25, *arguments[1:])
    return changed if named is None else (changed, named)


def scale_output(module: nn.Module, arguments: Any, *rest: Any) -> Any:
    output = rest[-1]
    return (output[0] * 0.75, *output[1:]) if isinstance(output, tuple) else output * 0.75


def scale_gradient(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(x * 0.5 if x is not None and x.is_floating_point() else x for x in inputs)


class Forward:
    """A forward in the place of a module's own, as wrappers of other packages put it on an instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return scale_output(self.module, arguments, type(self.module).forward(self.module, *arguments, **named))


class Wrapper(nn.Module):
    """A module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return scale_output(self, arguments, self.inner(*arguments, **named))


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * x


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]


class Lives(RuleBasedStateMachine):
    """Both models, and what was done to them."""

    @initialize(version=st.sampled_from((1, 2)), heads=st.sampled_from((2, 4)), share=st.booleans(),
                buckets=st.sampled_from((-1, 8)), dtype=st.sampled_from((torch.float32, torch.bfloat16)))  # fmt: skip
    def begin(self, version: int, heads: int, share: bool, buckets: int, dtype: torch.dtype) -> None:
        """Build two equal models, and patch one."""
        torch.manual_seed(version)
        cls = transformers.DebertaModel if version == 1 else transformers.DebertaV2Model
        own = {} if version == 1 else {"share_att_key": share, "position_buckets": buckets}
        model = cls(cls.config_class(**{**SMALL, **own, "num_attention_heads": heads})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.eager, self.handles, self.lora = model.to(dtype), [], False
        self.twin = copy.deepcopy(self.eager)
        self.random = torch.Generator().manual_seed(5)
        dk.patch(self.twin)

    def both(self) -> tuple[Any, Any]:
        return self.eager, self.twin

    def dtype(self) -> torch.dtype:
        return next(self.eager.parameters()).dtype

    def inputs(self, size: int, length: int, padding: str) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, SMALL["vocab_size"], (size, length), generator=self.random)
        mask = torch.ones(size, length, dtype=torch.long)
        if padding == "holes":
            mask = (torch.rand(size, length, generator=self.random) > 0.4).long()
        elif padding != "none":
            for row in range(1, size):
                mask[row, length - length * row // size :] = 0
        return {"input_ids": ids, "attention_mask": mask.flip(1) if padding == "left" else mask}

    def close(self, actual: torch.Tensor, expected: torch.Tensor, what: str, times: float = 1.0) -> None:
        assert actual.dtype == expected.dtype, what
        assert actual.shape == expected.shape, what
        actual, expected = actual.detach().double(), expected.detach().double()
        assert torch.equal(actual.isfinite(), expected.isfinite()), what
        if not expected.isfinite().all():
            return
        allowed = times * TOLERANCE[self.dtype()] * max(float(expected.abs().max()), 1.0)
        assert float((actual - expected).abs().max()) <= allowed, what

    def compare(self, inputs: dict[str, torch.Tensor], **named: Any) -> None:
        expected, actual = (model(**inputs, output_hidden_states=True, **named) for model in self.both())
        for number, (a, b) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
            self.close(a, b, f"states {number}")

    @rule(size=st.integers(1, 4), length=st.sampled_from((1, 2, 7, 16, 33, 70)),
          padding=st.sampled_from(("none", "right", "left", "holes")),
          mode=st.sampled_from((torch.no_grad, torch.inference_mode, torch.enable_grad)))  # fmt: skip
    def run(self, size: int, length: int, padding: str, mode: Any) -> None:
        with mode():
            self.compare(self.inputs(size, length, padding))

    @rule()
    def ask_for_attentions(self) -> None:
        with torch.no_grad():
            self.compare(self.inputs(2, 9, "right"), output_attentions=True)

    @rule(padding=st.sampled_from(("none", "right", "holes")))
    def train(self, padding: str) -> None:
        inputs = self.inputs(3, 12, padding)
        weights = torch.randn(3, 12, SMALL["hidden_size"], generator=self.random)
        for model in self.both():
            model.zero_grad()
            states = model(**inputs).last_hidden_state
            if not states.requires_grad:
                return
            (states * weights.to(states.dtype)).sum().backward()
        with torch.no_grad():
            pairs = zip(self.eager.named_parameters(), self.twin.named_parameters(), strict=True)
            for (name, expected), (_, actual) in pairs:
                assert (expected.grad is None) == (actual.grad is None), name
                if expected.grad is None:
                    continue
                self.close(actual.grad, expected.grad, f"gradient of {name}", times=4.0)
                step = expected.grad / expected.grad.abs().max().clamp(min=1e-20) * 1e-2
                if step.isfinite().all():
                    expected.sub_(step)
                    actual.sub_(step)
        self.after()

    @rule(number=st.integers(0, 10_000), way=st.sampled_from(WAYS))
    def edit(self, number: int, way: str) -> None:
        names = [name for name, _ in self.eager.named_parameters() if "parametrizations" not in name]
        name = names[number % len(names)]
        change = 0.2 * torch.randn(self.eager.get_parameter(name).shape, generator=self.random)
        for model in self.both():
            parameter = model.get_parameter(name)
            new = parameter.detach() + change.to(parameter.dtype)
            if way == "in place":
                with torch.no_grad():
                    parameter.add_(change.to(parameter.dtype))
            elif way == "data":
                parameter.data += change.to(parameter.dtype)
            elif way == "copied":
                with torch.no_grad():
                    parameter.copy_(new)
            elif way == "loaded":
                model.load_state_dict({**model.state_dict(), name: new})
            elif way == "another parameter":
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, nn.Parameter(new, parameter.requires_grad))
            elif way == "data exchanged":
                parameter.data = new
            elif way == "set":
                with torch.no_grad():
                    parameter.set_(new)
            elif way == "swapped rows":
                parameter.data.copy_(parameter.detach().flip(0))
            elif parameter.dtype != torch.bfloat16:
                parameter.detach().numpy()[...] = new.numpy()
        self.after()

    @rule(number=st.integers(0, 10_000), kind=st.sampled_from(HOOKS))
    def watch(self, number: int, kind: str) -> None:
        names = [name for name, module in self.eager.named_modules() if self.may_be_watched(name, module)]
        name = names[number % len(names)]
        for model in self.both():
            module = model.get_submodule(name)
            if kind.startswith("pre"):
                handle = module.register_forward_pre_hook(scale_first, with_kwargs="kwargs" in kind)
            elif kind == "backward":
                handle = module.register_full_backward_hook(scale_gradient)
            elif kind == "instance forward":
                module.forward, handle = Forward(module), None
            elif kind == "wrapper":
                parent, _, last = name.rpartition(".")
                handle = setattr(model.get_submodule(parent), last, Wrapper(module))
            else:
                handle = module.register_forward_hook(scale_output, with_kwargs="kwargs" in kind)
            if handle is not None:
                self.handles.append(handle)
        self.after()

    def may_be_watched(self, name: str, module: nn.Module) -> bool:
        """Leave out what is not called with states first, and modules whose forward a wrapper of their owner reads."""
        return ".layer." in f".{name}." and type(module) is not nn.ModuleList and "lora" not in name

    @precondition(lambda self: self.handles)
    @rule()
    def look_away(self) -> None:
        for _ in range(2):
            self.handles.pop().remove()
        self.after()

    @rule(number=st.integers(0, 10_000), training=st.booleans())
    def switch(self, number: int, training: bool) -> None:
        """Dropout is 0: eval and training answer alike, in any mixture."""
        names = [name for name, _ in self.eager.named_modules()]
        for model in self.both():
            model.get_submodule(names[number % len(names)]).train(training)
        self.after()

    @rule(number=st.integers(0, 10_000), needed=st.booleans())
    def freeze(self, number: int, needed: bool) -> None:
        names = [name for name, _ in self.eager.named_parameters()]
        for model in self.both():
            model.get_parameter(names[number % len(names)]).requires_grad_(needed)

    @rule(dtype=st.sampled_from(tuple(TOLERANCE)))
    def move(self, dtype: torch.dtype) -> None:
        for model in self.both():
            model.to(dtype)
        self.after()

    @rule(number=st.integers(0, 10_000))
    def parametrize(self, number: int) -> None:
        names = [name for name, _ in linears(self.eager) if ".layer." in f".{name}."]
        if names:
            for model in self.both():
                parametrize.register_parametrization(
                    model.get_submodule(names[number % len(names)]), "weight", Scaled()
                )
        self.after()

    @rule(first=st.integers(0, 10_000), second=st.integers(0, 10_000))
    def tie(self, first: int, second: int) -> None:
        names = [name for name, module in linears(self.eager) if module.in_features == module.out_features]
        if names:
            one, other = names[first % len(names)], names[second % len(names)]
            for model in self.both():
                model.get_submodule(one).weight = model.get_submodule(other).weight
        self.after()

    @precondition(lambda self: not self.lora)
    @rule()
    def attach_lora(self) -> None:
        peft = pytest.importorskip("peft")
        targets = {name.rpartition(".")[2] for name, _ in linears(self.eager) if ".layer." in f".{name}."}
        if not targets or any(isinstance(module, Wrapper) for module in self.eager.modules()):
            return  # PEFT takes a name for all modules that have it
        config = peft.LoraConfig(r=2, target_modules=sorted(targets), init_lora_weights=False)
        for model in self.both():
            torch.manual_seed(3)
            peft.inject_adapter_in_model(config, model)
        self.lora = True
        self.after()

    @precondition(lambda self: self.lora)
    @rule(merged=st.booleans(), enabled=st.booleans())
    def change_lora(self, merged: bool, enabled: bool) -> None:
        for model in self.both():
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.enable_adapters(True)
                    if merged != module.merged:
                        (module.merge if merged else module.unmerge)()
                    if not merged:
                        module.enable_adapters(enabled)
        self.after()

    @rule(unpad=st.sampled_from(("auto", True, False)), fast=st.sampled_from(("auto", True, False)),
          backend=st.sampled_from(("auto", "torch")))  # fmt: skip
    def patch(self, unpad: Any, fast: Any, backend: str) -> None:
        dk.patch(self.twin, unpad=unpad, fast_linears=fast, backend=backend)
        self.after()

    @rule()
    def unpatch(self) -> None:
        dk.unpatch(self.twin)
        self.after()

    @precondition(lambda self: not self.handles)
    @rule()
    def copy(self) -> None:
        self.eager, self.twin = copy.deepcopy(self.eager), copy.deepcopy(self.twin)
        self.after()

    @precondition(lambda self: not self.handles and not self.is_parametrized())
    @rule()
    def pickle(self) -> None:
        self.eager, self.twin = (pickle.loads(pickle.dumps(model)) for model in self.both())
        self.after()

    def is_parametrized(self) -> bool:
        return any(parametrize.is_parametrized(module) for module in self.eager.modules())

    def after(self) -> None:
        """Answer alike, of which some comes from what was kept before the event."""
        for (name, expected), (_, actual) in zip(
            self.eager.named_parameters(), self.twin.named_parameters(), strict=True
        ):
            assert torch.equal(actual, expected), name
        with torch.no_grad():
            self.compare(self.inputs(2, 9, "right"))


def live(lives: int, events: int) -> None:
    with torch.random.fork_rng():
        run_state_machine_as_test(
            Lives,
            settings=settings(
                max_examples=lives, stateful_step_count=events, deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip


def test_a_patched_model_lives_as_its_twin_does():
    live(8, 14)


@pytest.mark.every_case
def test_a_thousand_lives():
    live(1000, 30)
