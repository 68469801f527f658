"""Python frames entered per layer of a patched model, and the host time of its forwards.

A frame is one entry into a Python function, counted by `sys.setprofile` over one forward of a patched encoder of 12
layers (12 heads of 64, as v3-base) and divided by 12; a generator counts each time it goes on. Frames of the package
are those whose code lies in `deberta_kernels`; the others are PyTorch's and transformers'. Faster linear layers
(`fast_linears`) have frames of their own.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2Model

import deberta_kernels as dk
from benchmarks.harness.clock import least_cpu_time
from deberta_kernels.testing.geometries import settings

__all__ = ["MODES", "Frames", "entered", "forward_time", "frames", "package_name", "packing_decision_time"]

MODES = ("eval", "ragged", "training")
_LAYERS = 12
_BATCH, _TOKENS = 4, 16
_REPEATS = 60  # of which the fastest counts: others were interrupted
_PACKAGE = os.path.dirname(os.path.abspath(dk.__file__)) + os.sep


class Frames(NamedTuple):
    """Python frames of one layer.

    Attributes:
        package: those of this package.
        total: all.
        top: the package's functions that are entered most often, as (name, frames).
    """

    package: float
    total: float
    top: list[tuple[str, float]]


def build(fast_linears: str | bool, heads: int = 12, head_dim: int = 64) -> DebertaV2Model:
    """Return a patched model whose layers differ from v3-base's in the width of their feed-forward blocks only."""
    sizes = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "intermediate_size": 64}
    model = DebertaV2Model(DebertaV2Config(**settings("v3-base", vocab_size=128, **sizes))).eval()
    dk.patch(model, fast_linears=fast_linears)
    return model


def mask_of(ragged: bool) -> Tensor:
    """Return a (B, N) mask; ragged, half of each sample but the first is padding."""
    mask = torch.ones(_BATCH, _TOKENS, dtype=torch.long)
    if ragged:
        mask[1:, _TOKENS // 2 :] = 0
    return mask


def call_of(model: Any, mode: str) -> Callable[[], Any]:
    """Return a forward of the encoder, without the embeddings before it."""
    mask = mask_of(mode == "ragged")
    model.train(mode == "training")
    states = torch.randn(*mask.shape, model.config.hidden_size) * mask[:, :, None]  # padding enters as zeros

    def call() -> Any:
        with torch.set_grad_enabled(mode == "training"):
            return model.encoder(states, mask, output_hidden_states=False)

    return call


@contextmanager
def entered() -> Iterator[list[CodeType]]:
    """Give a list of the Python functions that are entered inside, in their order."""
    found: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.append(frame.f_code)

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def package_name(code: CodeType) -> str | None:
    """Return file and name of a function of the package, as "api.py:run_attention"; None of another one."""
    if not code.co_filename.startswith(_PACKAGE):
        return None
    return f"{code.co_filename.removeprefix(_PACKAGE)}:{getattr(code, 'co_qualname', code.co_name)}"


def frames(mode: str, fast_linears: str | bool = False, most: int = 12) -> Frames:
    """Count the frames of one layer.

    Args:
        mode: "eval": no padding; "ragged": a batch with padding, packed; "training": with gradients and dropout.
        fast_linears: as in `patch`.
        most: how many functions to name.
    """
    call = call_of(build(fast_linears), mode)
    for _ in range(3):
        call()  # so that tables are kept, and what is looked up once is
    with entered() as found:
        call()
    own = Counter(name for code in found if (name := package_name(code)) is not None)
    top = [(name, count / _LAYERS) for name, count in own.most_common(most)]
    return Frames(own.total() / _LAYERS, len(found) / _LAYERS, top)


def packing_decision_time(repeats: int = _REPEATS) -> float:
    """Return the CPU time, in seconds, that one ragged forward takes to decide whether to pack.

    That is everything but the packed forward itself: finding the packing of the batch, and asking every layer whether
    it may be given packed states.
    """
    from deberta_kernels.models import encoder

    spent = [0.0]

    def timed(function: Any) -> Any:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[0] += time.process_time() - start

        return wrapper

    call = call_of(build(False, 4, 16), "ragged")
    module: Any = encoder
    functions = {name: getattr(module, name) for name in ("handover_of", "find_packing")}
    for name, function in functions.items():
        setattr(module, name, timed(function))
    try:
        times = []
        for _ in range(repeats):
            spent[0] = 0.0
            call()
            times.append(spent[0])
    finally:
        for name, function in functions.items():
            setattr(module, name, function)
    return min(times)


def forward_time(mode: str, fast_linears: str | bool = False, repeats: int = _REPEATS) -> float:
    """Return the CPU time, in seconds, of a forward of 12 layers so narrow that most of it is Python."""
    call = call_of(build(fast_linears, 4, 16), mode)
    call()
    return least_cpu_time(call, repeats)
