"""Fixtures of the unit tests that call operators: inputs, backends, and a mode that sees what is dispatched."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deberta_kernels as dk
from tests import needs
from tests.unit import new_device


class Watch(TorchDispatchMode):
    """A mode that records which operators of the package were dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deberta_kernels":
            self.seen.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched():
    """A dispatch mode: calls inside it take the route through the dispatcher."""
    return Watch


@pytest.fixture
def tensors():
    """A function that makes q, k, v, pos_key, pos_query for position_buckets=8, max_relative_positions=16."""

    def make(nq=11, nk=None, batch=2, heads=3, head_dim=8, dtype=torch.float32, grad=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(batch, heads, n, head_dim) for n in (nq, nk or nq, nk or nq)] + [(heads, 16, head_dim)] * 2
        return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]

    return make


@pytest.fixture(params=["torch", "cpu"] if needs.library_absence() is None else ["torch"])
def backend(request):
    if request.param == "cpu":
        needs.native_library()
    return request.param


@pytest.fixture
def counted():
    """Start and leave with every count of stats() at zero."""
    dk.reset_stats()
    yield
    dk.reset_stats()


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The backend "triton" of a machine whose only device is new to everybody."""
    return new_device.installed(monkeypatch, tmp_path / "cache")
