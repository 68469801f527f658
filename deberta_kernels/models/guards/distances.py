"""A relative_pos tensor that holds nothing but the ordinary distances between tokens, as encoders make it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from deberta_kernels.models.anatomy import AttentionModule, anatomy_of
from deberta_kernels.position import log_bucket, plain_tensors
from deberta_kernels.torch_state.captures import capturing
from deberta_kernels.torch_state.modes import transformed, values_exist
from deberta_kernels.types import PositionSpec

__all__ = ["are_ordinary"]

_INTEGERS = (torch.int64, torch.int32, torch.int16)
# The tensor last read on a device, where reading waits, its version, and what it was compared with and found to be.
_read: tuple[weakref.ref[Tensor], int, PositionSpec, bool] | None = None


def are_ordinary(relative_pos: Tensor, module: AttentionModule, length: int) -> bool:
    """Tell whether relative_pos[..., i, j] is the bucket of i - j, or the distance itself where positions are linear.

    On the CPU every call reads it, a pass over N x N integers; elsewhere a tensor is read once, and that waits for the
    device. What cannot be read (while compiling, in a graph capture) is not ordinary; tensors without values are.

    Args:
        relative_pos: any shape and dtype.
        module: attention module.
        length: N, number of queries and of keys.
    """
    shape = tuple(relative_pos.shape)
    if relative_pos.dtype not in _INTEGERS or shape not in ((length,) * 2, (1, length, length), (1, 1, length, length)):
        return False
    if torch.compiler.is_compiling() or transformed():
        return False
    if relative_pos.is_meta or not values_exist():
        return relative_pos.is_meta
    spec = anatomy_of(module).position_spec(module)
    if relative_pos.device.type == "cpu":
        return _reads_ordinary(relative_pos, spec)
    if capturing(relative_pos.device):
        return False
    return _read_once(relative_pos, spec)


def _read_once(relative_pos: Tensor, spec: PositionSpec) -> bool:
    global _read
    version = 0 if relative_pos.is_inference() else relative_pos._version
    last = _read
    if last is not None and last[0]() is relative_pos and last[1:3] == (version, spec):
        return last[3]
    found = _reads_ordinary(relative_pos, spec)
    _read = weakref.ref(relative_pos), version, spec, found
    return found


def _reads_ordinary(relative_pos: Tensor, spec: PositionSpec) -> bool:
    length = relative_pos.shape[-1]
    if length == 0:
        return True
    with plain_tensors():
        given = relative_pos.detach().view(length, length)
        distances = torch.arange(length, device="cpu")
        below, right = (
            log_bucket(x, spec.position_buckets, spec.max_relative_positions).to(given.device, given.dtype)
            for x in (distances, -distances)
        )
        if not (torch.equal(given[:, 0], below) and torch.equal(given[0], right)):
            return False
        return torch.equal(given[1:, 1:], given[:-1, :-1])
