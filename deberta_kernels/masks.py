"""The mask vocabulary and the padded-row rule: the one place that says what a mask means.

Every form a caller may use becomes a `Masks` of at most three parts (keys, queries, pairs); what they allow is their
conjunction. A forbidden pair is excluded by selection: its score is -inf, never a finite constant that a large score
could outweigh.

The padded-row rule: a query row that is padding (`Masks.query` False), or that may attend to no key at all, gets the
mean of v over all Nk keys of its sample, forbidden ones included, without dropout. That is what the uniform softmax
of Hugging Face's finite masking gives. Its lse is -inf. In the backward such a row adds dout / Nk to dv of every key
and nothing to any other gradient. Packed sequences have no such rows.

A NaN in a key masked by `Masks.key`, or in a query masked by `Masks.query`, reaches only padded rows: backends read
those tokens as zero everywhere but in that mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deberta_kernels import dtypes
from deberta_kernels.checks.arguments import check_storage, check_tensor
from deberta_kernels.torch_state.modes import values_readable
from deberta_kernels.types import AttentionProblem, Masks

__all__ = ["allowed", "parse_attention_mask", "parse_huggingface_mask"]

_INTEGERS = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def parse_attention_mask(
    attention_mask: Tensor | None, *, batch: int, heads: int, nq: int, nk: int, device: torch.device
) -> Masks:
    """Parse the attention_mask of the functional interface.

    Args:
        attention_mask: None; (B, Nk), True = real key; or (B, 1 or H, Nq, Nk), True = may attend; bool, or integers 0
            and 1. Elsewhere than on the CPU reading integers would wait for the device: there whatever is not 0 keeps.
            A (B, Nk) mask forbids keys only: padded query rows compute ordinary attention.
        batch: B.
        heads: H.
        nq: Nq.
        nk: Nk.
        device: device of q.

    Raises:
        TypeError: if it is not a tensor of bool or integers. What a float mask means differs: 0 keeps where masks are
            added to scores, and forbids where they say what to keep.
        ValueError: if its shape or device is wrong, or an integer is neither 0 nor 1.
    """
    if attention_mask is None:
        return Masks()
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a bool tensor or None, got {type(attention_mask).__name__}; use torch.tensor(...)."
        )
    check_tensor("attention_mask", attention_mask)
    if attention_mask.dtype != torch.bool and attention_mask.dtype not in _INTEGERS:
        raise TypeError(
            f"attention_mask must be bool, or integers 0 and 1, got {dtypes.name(attention_mask.dtype)}; "
            "pass `mask == 0` if it is added to scores (0 keeps, -inf forbids), `mask != 0` if 1 keeps and 0 forbids."
        )
    shape = tuple(attention_mask.shape)
    if shape not in ((batch, nk), (batch, 1, nq, nk), (batch, heads, nq, nk)):
        raise ValueError(
            f"attention_mask must have shape (B, Nk) = {(batch, nk)} or (B, 1 or H, Nq, Nk) = ({batch}, 1 or {heads}, "
            f"{nq}, {nk}), got {shape}; a (B, Nq, Nk) mask needs .unsqueeze(1)."
        )
    if attention_mask.device != device:
        raise ValueError(
            f"attention_mask must be on the device of q, {device}, got {attention_mask.device}; use .to(q.device)."
        )
    check_storage("attention_mask", attention_mask)
    if attention_mask.dtype != torch.bool and attention_mask.device.type == "cpu" and values_readable(attention_mask):
        values = attention_mask.to(torch.int64)  # not every integer type can be indexed
        other = values[(values != 0) & (values != 1)]
        if other.numel():
            raise ValueError(
                f"attention_mask must hold 0 (forbidden) and 1 (kept) only, got {int(other[0])}; pass `mask != 0` if "
                "every other number keeps."
            )
    keep = _own(attention_mask)
    return Masks(key=keep) if keep.dim() == 2 else Masks(pair=keep)


def parse_huggingface_mask(mask: Tensor | None, *, batch: int, nq: int, nk: int) -> Masks:
    """Parse a mask as it reaches a Hugging Face DeBERTa encoder or attention; never waits for the device.

    Args:
        mask: None; (B, N): real tokens, forbids their keys and makes their query rows padding; (B, 1, 1, N): keys
            only; (B, N, N) or (B, 1 or H, N, N): pairs. Any dtype, not 0 = keep, NaN included. Dimensions of size 1
            broadcast, also B.
        batch: B.
        nq: Nq.
        nk: Nk.

    Raises:
        ValueError: if its shape fits none of these.
    """
    if mask is None:
        return Masks()
    keep = _own(mask)
    shape = tuple(keep.shape)
    fits = len(shape) in (2, 3, 4) and shape[0] in (1, batch) and shape[-1] in (1, nk)
    if fits and len(shape) == 2 and nq == nk:
        tokens = keep.expand(batch, nk)
        return Masks(key=tokens, query=tokens)
    if not fits or len(shape) == 2 or shape[-2] not in (1, nq):
        raise ValueError(
            f"attention_mask must have shape (B, N), (B, 1, 1, N), (B, N, N) or (B, 1 or H, N, N) with B = {batch}, "
            f"Nq = {nq}, Nk = {nk}, got {shape}; check that it belongs to this batch."
        )
    keep = keep.unsqueeze(1) if keep.dim() == 3 else keep
    if keep.shape[1] == 1 and keep.shape[2] == 1:
        return Masks(key=keep[:, 0, 0, :].expand(batch, nk))
    if keep.shape[1] == 1 and keep.shape[3] == 1:
        return Masks(query=keep[:, 0, :, 0].expand(batch, nq))
    return Masks(pair=keep.expand(batch, -1, nq, nk))


def _own(mask: Tensor) -> Tensor:
    """Return what a mask keeps, as bool; a copy where a backward may read it again.

    The caller may have changed the mask by then, through NumPy without a trace, or made it in inference mode, whose
    tensors no backward may keep.
    """
    if mask.dtype != torch.bool:
        return mask != 0
    if not torch.is_grad_enabled():
        return mask
    if torch.compiler.is_compiling() or 0 not in mask.stride():
        return mask.clone()
    once = mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())]  # an expanded mask stays one
    return once.clone().expand(mask.shape)


def allowed(problem: AttentionProblem) -> Tensor | None:
    """Return which query may attend to which key, as one dense mask; None = every pair.

    Returns:
        (B, 1 or H, Nq, Nk) bool; True = may attend. A row without any True is a padded row. For packed sequences
        (1, 1, T, T), True where both tokens belong to the same sequence.
    """
    batch, _, nq, _ = problem.q.shape
    nk = problem.k.shape[2]
    if problem.cu_seqlens is not None:
        starts = problem.cu_seqlens[1:].contiguous()
        tokens = torch.arange(nq, dtype=starts.dtype, device=starts.device)
        sequence = torch.searchsorted(starts, tokens, right=True)
        return (sequence[:, None] == sequence[None, :])[None, None]
    masks = problem.masks
    result = masks.pair
    for part in (
        None if masks.key is None else masks.key[:, None, None, :],
        None if masks.query is None else masks.query[:, None, :, None],
    ):
        if part is not None:
            result = part if result is None else result & part
    return None if result is None else result.expand(batch, -1, nq, nk)
