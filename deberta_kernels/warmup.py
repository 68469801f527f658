"""Kernels compiled ahead of the first call, on the device that will run them: for images and clusters."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from deberta_kernels import api
from deberta_kernels.dispatch import Explanation

__all__ = ["Kind", "folder", "kinds", "warm"]

_HEADS, _LENGTH, _ROWS = 1, 128, 512  # kernels are compiled for no number of heads and for no length


class Kind(NamedTuple):
    """Calls that the same kernels compute.

    Attributes:
        dtype: of q, k, v and the tables.
        mask: "none", "key" or "pair".
        training: with gradients.
        dropout: probability that an attention probability is dropped.
    """

    dtype: torch.dtype
    mask: str
    training: bool
    dropout: float

    def __str__(self) -> str:
        what = "training" if self.training else "inference"
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{str(self.dtype).removeprefix('torch.')}, {what}, mask {self.mask}{dropout}"


def kinds(dtypes: Iterable[torch.dtype], masks: Iterable[str], *, training: bool, dropout: float) -> list[Kind]:
    """Return the kinds of calls that a model makes: in eval, and when it trains with dropout."""
    ways = [(False, 0.0), *([(True, dropout)] if training else [])]
    return [Kind(dtype, mask, *way) for dtype, way, mask in itertools.product(dtypes, ways, masks)]


def warm(
    wanted: Iterable[Kind], head_dim: int, device: torch.device, say: Callable[[str], None], backend: str = "auto"
) -> bool:
    """Compile and prove what each kind needs, as its first call would; return whether kernels of a GPU run them all.

    Args:
        wanted: see `kinds`.
        head_dim: D.
        device: where the kernels will run.
        say: gets a line for each kind.
        backend: as in `disentangled_attention`.
    """
    complete = True
    for kind in wanted:
        started = time.perf_counter()
        found = _chosen(kind, head_dim, device, backend)
        complete &= found.chosen in ("triton", "cuda")
        reason = "" if found.chosen in ("triton", "cuda") else f"; not triton: {found.reasons.get('triton', '')}"
        say(f"{kind}: {found.chosen}, {time.perf_counter() - started:.1f} s{reason}")
    return complete


def folder() -> str:
    """Return where Triton keeps what it compiles; TRITON_CACHE_DIR names another place."""
    from triton import knobs

    return str(knobs.cache.dir)


def _chosen(kind: Kind, head_dim: int, device: torch.device, backend: str) -> Explanation:
    place: dict[str, Any] = {"dtype": kind.dtype, "device": device}
    # As a model has them: heads inside of tokens, so that pointers and strides are as in its calls.
    q, k, v = (torch.empty(1, _LENGTH, _HEADS, head_dim, **place).transpose(1, 2) for _ in range(3))
    tables = [torch.empty(_ROWS, _HEADS, head_dim, **place).transpose(0, 1) for _ in range(2)]
    for x in (q, *tables):
        x.requires_grad_(kind.training)
    shape = {"none": None, "key": (1, _LENGTH), "pair": (1, 1, _LENGTH, _LENGTH)}[kind.mask]
    mask = None if shape is None else torch.ones(shape, dtype=torch.bool, device=device)
    return api.explain(q, k, v, *tables, attention_mask=mask, dropout_p=kind.dropout, backend=backend)
