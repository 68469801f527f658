"""States that PyTorch may be in when a call comes, each as a function that probes one and returns the answer."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LENGTH = 4


class Subclass(Tensor):
    """A tensor of another class."""


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def distances():
    """Return (N, N) float32, the distance of each query from each key."""
    positions = torch.arange(LENGTH, dtype=torch.float32)
    return positions[:, None] - positions


def _within(context, change=lambda x: x):
    def state(probe):
        x = change(distances())
        with context():
            return probe(x)

    return state


def _made_within(context, make=distances):
    def state(probe):
        with context():
            return probe(make())

    return state


def _called_by(transform):
    """Let a transform call the probe with what it makes of a tensor."""

    def state(probe):
        answers = []

        def function(x):
            answers.append(probe(x))
            return x.sum()

        transform(function)
        return answers[0]

    return state


def _profiled():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def _dual(probe):
    with forward_ad.dual_level():
        return probe(forward_ad.make_dual(distances(), torch.ones(LENGTH, LENGTH)))


def _meta():
    return distances().to("meta")


def _compiling(probe):
    """As ordinary code in a trace finds it; what the tracer makes of the code itself is tested with the compiler."""
    real, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True
    try:
        return probe(distances())
    finally:
        torch.compiler.is_compiling = real


def _exporting(probe):
    real, torch.compiler._is_exporting_flag = torch.compiler._is_exporting_flag, True
    try:
        return probe(distances())
    finally:
        torch.compiler._is_exporting_flag = real


def _fake_after_its_mode(probe):
    with FakeTensorMode():
        x = distances()
    return probe(x)


STATES = {
    "eager": _within(nullcontext),
    "no_grad": _within(torch.no_grad),
    "inference": _made_within(torch.inference_mode),
    "parameter": _within(nullcontext, nn.Parameter),
    "autocast": _within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "compiling": _compiling,
    "exporting": _exporting,
    "jit trace": _called_by(lambda f: torch.jit.trace(f, distances(), check_trace=False)),
    "dispatch mode": _within(_Mode),
    "fake mode": _made_within(FakeTensorMode),
    "fake tensor": _fake_after_its_mode,
    "meta": _made_within(nullcontext, _meta),
    "function mode": _within(_Functions),
    "default device": _within(lambda: torch.device("cpu")),
    "vmap": _called_by(lambda f: torch.vmap(f)(distances().expand(2, -1, -1))),
    "func.grad": _called_by(lambda f: torch.func.grad(f)(distances())),
    "func.jvp": _called_by(lambda f: torch.func.jvp(f, (distances(),), (distances(),))),
    "functionalize": _called_by(lambda f: torch.func.functionalize(f)(distances())),
    "batched gradients": _called_by(lambda f: _vmap(f)(distances().expand(2, -1, -1))),
    "dual level": _dual,
    "profiler": _within(_profiled),
    "subclass": _within(nullcontext, lambda x: x.as_subclass(Subclass)),
    "zero tensor": _made_within(nullcontext, lambda: torch._efficientzerotensor((LENGTH, LENGTH))),
}
