"""Small DeBERTa models, ragged batches, and the error budget that a patched model is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deberta_kernels as dk
from deberta_kernels import notices
from deberta_kernels.models import encoder
from deberta_kernels.testing import geometries
from tools.ecosystem_table import EcosystemTables

SMALL = geometries.settings("tiny", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)


class Tally(dict):
    """Counts that remember whether any of them ever rose, whoever sets them back."""

    rose = False

    def __setitem__(self, name: str, count: int) -> None:
        self.rose |= count > 0
        super().__setitem__(name, count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that draws a batch for a model although no kernel ran and nobody was told why not.

    The original code gives the original's results: such a test would pass with a patch that does nothing.
    """
    tallies = [Tally(notices._calls), Tally(notices._fallbacks)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(notices, "_calls", tallies[0])
        patched.setattr(notices, "_fallbacks", tallies[1])
        yield
    seen = any(tally.rose for tally in tallies) or notices._warned
    if "batch" in item.fixturenames and not seen and item.get_closest_marker("no_kernels") is None:
        pytest.fail("no kernel ran in this test; mark it no_kernels if none is meant to", pytrace=False)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(notices, "_warned", set())
    dk.reset_stats()
    yield
    dk.unpatch_all()


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> Iterator[EcosystemTables]:
    """The tables of docs/ecosystem.md: a test reports what it saw, which must be what they say."""
    document = Path(__file__).parents[2] / "docs" / "ecosystem.md"
    tables = EcosystemTables(document, request.config.getoption("--write-tables"))
    yield tables
    tables.save()


@pytest.fixture
def build() -> Callable[..., Any]:
    """Build a small random model: build(head="DebertaV2Model", **config); head names a class, or is one."""

    def build(head: Any = "DebertaV2Model", **settings: Any) -> Any:
        torch.manual_seed(0)
        cls = getattr(transformers, head) if isinstance(head, str) else head
        model = cls(cls.config_class(**{**SMALL, **settings})).eval()
        with torch.no_grad():  # biases and norms start as constants, which would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def build_either(build: Callable[..., Any]) -> Callable[..., Any]:
    """Build a small random DeBERTa: build_either(1, **config) or build_either(2, **config)."""
    return lambda version, **settings: build("DebertaModel" if version == 1 else "DebertaV2Model", **settings)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record what each forward of a patched encoder decided for a batch with padding: a packing, or None for padded."""
    decided: list[Any] = []
    original = encoder._packing

    def recording(*arguments: Any) -> Any:
        decided.append(original(*arguments))
        return decided[-1]

    monkeypatch.setattr(encoder, "_packing", recording)
    return decided


@pytest.fixture
def run() -> Callable[..., tuple[list, dict]]:
    """Run a model: run(model, inputs, grad=True) -> all hidden states, and the gradient of every parameter by name.

    The gradients are those of a random linear loss over every row.
    """

    def run(model: Any, inputs: dict[str, torch.Tensor], grad: bool = True) -> tuple[list, dict]:
        model.zero_grad(set_to_none=True)
        states = model(**inputs, output_hidden_states=True).hidden_states
        if grad:
            generator = torch.Generator().manual_seed(1)
            weight = torch.randn(states[-1].shape, generator=generator, dtype=torch.float64)
            (states[-1] * weight.to(states[-1].dtype)).sum().backward()
        return [s.detach() for s in states], {n: p.grad for n, p in model.named_parameters()}

    return run


@pytest.fixture
def batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Draw token ids and a mask: batch(size, length, padding="none" | "right" | "left" | "holes" | "sample")."""

    def batch(size: int = 3, length: int = 37, padding: str = "right") -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(size * 1000 + length)
        mask = torch.ones(size, length, dtype=torch.long)
        if padding in ("right", "left"):
            for row in range(1, size):
                cut = max(1, length - row * (length // (size + 1)))
                mask[row, cut:] = 0
        if padding == "left":
            mask = mask.flip(1)
        if padding == "holes":
            mask = (torch.rand(size, length, generator=generator) > 0.3).long()
            mask[:, length // 2] = 1
        if padding == "sample":
            mask[-1] = 0
        ids = torch.randint(3, SMALL["vocab_size"], (size, length), generator=generator)
        return {"input_ids": ids, "attention_mask": mask}

    return batch


@pytest.fixture
def assert_within_budget() -> Callable[..., None]:
    """Hold a fused tensor to three times the eager one's error against float64, and a floor of last bits."""

    def check(name: str, fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, scale: float = 1.0) -> None:
        assert fused.dtype == eager.dtype, name
        assert fused.shape == eager.shape, name
        floor = 1e-6 if eager.dtype == torch.float32 else 1e-5
        floor *= max(scale, truth.abs().max().item())
        eager_error = (eager.double() - truth).abs().max().item()
        error = (fused.double() - truth).abs().max().item()
        assert error <= 3 * (eager_error + floor), f"{name}: error {error:.3g}, eager's {eager_error:.3g}"

    return check


@pytest.fixture
def in_double() -> Callable[[Any], Any]:
    """Return a float64 copy of a model: the truth that both are measured against.

    DeBERTa v1's own layer norm computes in float32 whatever it is given, so the copy gets PyTorch's.
    """

    def in_double(model: Any) -> Any:
        model = copy.deepcopy(model).double()
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm).__name__ == "DebertaLayerNorm":
                    exact = torch.nn.LayerNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=torch.float64)
                    exact.load_state_dict(norm.state_dict())
                    setattr(parent, name, exact)
        return model

    return in_double
