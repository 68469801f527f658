"""The variants of GPU kernels, and the small problem that each is tested with."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.impl.common import has_positions, masked
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = ["Variant", "drawn", "on_device", "variant_of"]

_SAMPLES, _HEADS = 2, 2
# Queries and keys: more than two tiles of 64 behind the distance from which all are saturated, so that every zone of a
# kernel has its tile, the last one cut.
_LENGTH, _SATURATED = 200, 64
# Linear distances: how a distance becomes a row is no part of a variant, and eager's logarithm depends on the default
# dtype.
_POSITION = PositionSpec(position_buckets=-1, max_relative_positions=_SATURATED)
_SEED, _DROPOUT = 0x2545F4914F6CDD1D, 0.1


class Variant(NamedTuple):
    """What decides which code of a backend computes a call.

    Attributes:
        backend: its name.
        dtype: of q.
        head_dim: D.
        masks: "none", "tokens", "pairs" or "packed".
        positions: some score has a position term.
        dropout: probabilities are dropped.
        backward: the gradients are this backend's too.
        tf32: products of float32 are rounded to TF32.
        deterministic: gradients must be the same bits every time.
    """

    backend: str
    dtype: torch.dtype
    head_dim: int
    masks: str
    positions: bool
    dropout: bool
    backward: bool
    tf32: bool
    deterministic: bool

    def __str__(self) -> str:
        words = (
            f"{dtypes.name(self.dtype)} with head_dim {self.head_dim}",
            "" if self.masks == "none" else self.masks if self.masks == "packed" else f"mask of {self.masks}",
            "" if self.positions else "no position terms",
            "dropout" if self.dropout else "",
            "gradients" if self.backward else "",
            "TF32" if self.tf32 else "",
            "deterministic" if self.deterministic else "",
        )
        return ", ".join(filter(None, words))


def variant_of(backend: str, problem: AttentionProblem, backward: bool) -> Variant:
    """Return the variant of a call.

    Args:
        backend: name of the backend that runs it.
        problem: the call.
        backward: whether the backend's own gradients are wanted.
    """
    q = problem.q
    if problem.cu_seqlens is not None:
        masks = "packed"
    else:
        masks = "pairs" if problem.masks.pair is not None else "tokens" if masked(problem) else "none"
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    deterministic = backward and torch.are_deterministic_algorithms_enabled()
    positions, dropout = has_positions(problem), problem.dropout_p > 0
    return Variant(backend, q.dtype, q.shape[-1], masks, positions, dropout, backward, tf32, deterministic)


def drawn(variant: Variant) -> tuple[AttentionProblem, Tensor]:
    """Return the problem of a variant and the gradient of its out, on the CPU; always the same numbers.

    They are float16 for TF32, which has as many bits: what eager code loses in float16 is what TF32 may lose.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if variant.tf32 else variant.dtype
    packed = variant.masks == "packed"
    batch, length = (1, _LENGTH + 3 + _SATURATED) if packed else (_SAMPLES, _LENGTH)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    q, k, v, dout = (draw(batch, length, _HEADS, variant.head_dim).transpose(1, 2) for _ in range(4))
    pos_key, pos_query = (draw(2 * _SATURATED, _HEADS, variant.head_dim).transpose(0, 1) for _ in range(2))
    bounds = torch.tensor([0, _LENGTH, _LENGTH + 3, length], dtype=torch.int32, device="cpu") if packed else None
    seed = torch.tensor([_SEED], dtype=torch.int64, device="cpu")
    return AttentionProblem(
        q,
        k,
        v,
        pos_key if variant.positions else None,
        pos_query if variant.positions else None,
        masks=_masks(variant.masks, generator),
        position=_POSITION,
        scale=(variant.head_dim * (3 if variant.positions else 1)) ** -0.5,
        dropout_p=_DROPOUT if variant.dropout else 0.0,
        seed=seed if variant.dropout else None,
        cu_seqlens=bounds,
        max_seqlen=_LENGTH,
    ), dout


def _masks(kind: str, generator: torch.Generator) -> Masks:
    if kind == "tokens":
        # One sample with holes and a padded end, and one that fills only the first tile and a bit of the second.
        tokens = torch.rand(_SAMPLES, _LENGTH, generator=generator, dtype=torch.float32, device="cpu") < 0.9
        tokens[0, 150:] = False
        tokens[1] = torch.arange(_LENGTH, device="cpu") < 70
        return Masks(key=tokens, query=tokens)
    if kind == "pairs":
        # From rows with hardly a key to full ones, and a row with none.
        shares = torch.rand(_SAMPLES, 1, _LENGTH, 1, generator=generator, dtype=torch.float32, device="cpu")
        shape = (_SAMPLES, 1, _LENGTH, _LENGTH)
        pair = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < shares
        pair[:, :, 3] = False
        return Masks(pair=pair)
    return Masks()


def on_device(problem: AttentionProblem, dtype: torch.dtype, device: torch.device) -> AttentionProblem:
    """Return a problem with its numbers in another dtype, on another device."""

    def move(x: Tensor | None, to: torch.dtype | None = None) -> Tensor | None:
        return None if x is None else x.to(device=device, dtype=to)

    numbers = {name: move(getattr(problem, name), dtype) for name in ("q", "k", "v", "pos_key", "pos_query")}
    others = {name: move(getattr(problem, name)) for name in ("seed", "cu_seqlens")}
    return replace(problem, masks=problem.masks.map(lambda x: x.to(device)), **numbers, **others)  # type: ignore[arg-type]
