"""The launches to compile: every variant where it matters most, a representative elsewhere.

A variant is a kernel, a dtype, a head size and a set of features. All eight feature sets are compiled for bfloat16 with
head size 64, which is where most users are, on one device of each kind and with the oldest and the newest Triton; other
dtypes, head sizes and devices get the fullest set.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deberta_kernels.dtypes import KERNEL_FLOATS, short_name
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = ["Variant", "deterministically", "kernel_title", "launches", "problem", "selection"]

DTYPES = {short_name(dtype): dtype for dtype in KERNEL_FLOATS}
FULL = "bias+mask+dropout"
# Masks without positions take the kernels with positions, so that these are all there are.
ALL_FEATURES = (
    "none", "dropout", "bias", "bias+dropout", "bias+mask", FULL, "bias+pair", "bias+pair+dropout",
)  # fmt: skip
BATCH, HEADS, LENGTH = 2, 12, 2048


@dataclass(frozen=True)
class Variant:
    """One forward or backward to compile, with all its kernels.

    Attributes:
        chip: name of a device in `chips.CHIPS`.
        direction: "forward" or "backward".
        dtype: "bf16", "fp16" or "fp32".
        head_dim: D.
        features: "none", or some of "bias", "mask" (of tokens), "pair" (of pairs) and "dropout" joined by "+".
    """

    chip: str
    direction: str
    dtype: str
    head_dim: int
    features: str

    @property
    def title(self) -> str:
        """Return what every table calls it, without the chip."""
        return f"{self.dtype} D{self.head_dim} {self.features}"


# What Triton's compiler fails on, all versions up to 3.9: truth values of a tile that change their layout. A call that
# needs one is refused when its backend is chosen, and the next backend answers.
FAILING = (Variant("gfx942", "forward", "bf16", 64, "bias+pair+dropout"),)


def selection(*, oldest: bool) -> list[Variant]:
    """Return the variants to compile, the longest compilations first.

    Args:
        oldest: True for the oldest supported Triton, which gets the main dtype and head size alone.
    """
    wanted: list[tuple[str, str, int, str]] = []
    for chip in ("gfx942", "sm_100", "sm_80", "sm_90"):
        wanted += [(chip, "bf16", 64, features) for features in reversed(ALL_FEATURES)]
    if not oldest:
        wanted += [("sm_90", "bf16", dim, FULL) for dim in (256, 128, 32)]
        wanted += [("sm_90", dtype, 64, FULL) for dtype in ("fp32", "fp16")]
        wanted += [("sm_86", "bf16", 64, FULL), ("sm_86", "bf16", 128, FULL), ("sm_86", "fp32", 64, FULL)]
        wanted += [("sm_120", "bf16", 64, FULL)]
    found = [
        Variant(chip, direction, dtype, dim, features)
        for chip, dtype, dim, features in wanted
        for direction in ("backward", "forward")
    ]
    return [variant for variant in found if variant not in FAILING]


def problem(variant: Variant) -> AttentionProblem:
    """Return a problem on the meta device that needs exactly the features of a variant."""
    dtype, features = DTYPES[variant.dtype], variant.features.split("+")

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = (empty(BATCH, LENGTH, HEADS, variant.head_dim).transpose(1, 2) for _ in range(3))
    tables = [empty(512, HEADS, variant.head_dim).transpose(0, 1) if "bias" in features else None for _ in range(2)]
    tokens = empty(BATCH, LENGTH, dtype=torch.bool) if "mask" in features else None
    pair = empty(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool) if "pair" in features else None
    dropout = "dropout" in features
    return AttentionProblem(
        q,
        k,
        v,
        tables[0],
        tables[1],
        Masks(key=tokens, query=tokens, pair=pair),
        PositionSpec(),
        (3 * variant.head_dim) ** -0.5,
        dropout_p=0.1 if dropout else 0.0,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        max_seqlen=LENGTH,
    )


@functools.lru_cache(maxsize=64)
def launches(variant: Variant) -> tuple[Any, ...]:
    """Return the launches of a variant as the package plans them, then those that only a deterministic backward has."""
    from deberta_kernels.impl.triton import launch

    call = problem(variant)
    forward = launch.forward_launches(call, variant.chip)
    if variant.direction == "forward":
        return tuple(forward.launches)
    out, lse = forward.results
    found: dict[str, Any] = {}
    for deterministic in (False, True):
        with deterministically(deterministic):
            plan = launch.backward_launches(call, torch.empty_like(out), None, out, lse, (True,) * 5, variant.chip)
        for step in plan.launches:
            found.setdefault(kernel_title(variant, step), step)
    return tuple(found.values())


@contextmanager
def deterministically(enabled: bool) -> Iterator[None]:
    """Plan with or without `torch.use_deterministic_algorithms`, which the gradients of the tables depend on."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# Constant of a kernel -> the feature that each of its values stands for.
_CONSTANTS: dict[str, dict[Any, str]] = {
    "HAS_BIAS": {True: "bias"}, "MASKED": {1: "mask", 2: "pair"}, "DROPOUT": {True: "dropout"},
    "FUSED": {True: "tables"},  # a kernel that also sums the gradients of a table
}  # fmt: skip


def kernel_title(variant: Variant, launch: Any) -> str:
    """Return the name of a kernel and of its variant: with those features alone that the kernel knows."""
    values = {constant: launch.constants.get(constant) for constant in _CONSTANTS}
    present = [names[values[constant]] for constant, names in _CONSTANTS.items() if values[constant]]
    knows = any(constant in launch.constants for constant in _CONSTANTS)
    features = f" {'+'.join(present) or 'none'}" if knows else ""
    name = launch.kernel.__name__.removeprefix("_disentangled_")
    return f"{name} {variant.dtype} D{variant.head_dim}{features}"
