"""The projected relative embeddings of one attention module: only the rows a call can reach, kept in eval on the CPU.

The projections are called as modules, never by their weights, so that whatever wraps them (LoRA, hooks, quantised
layers) takes part. In eval, on the CPU, the projected tables of a module are kept. `_validity` is the one place that
decides whether they may be kept, and what they depend on; kept tables whose dependencies changed are never used.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deberta_kernels import native
from deberta_kernels.checks.arguments import storage_fits
from deberta_kernels.linear.hidden_dropout import is_dropout
from deberta_kernels.linear.layers import is_linear, is_linear_class
from deberta_kernels.models.anatomy import Apply, AttentionModule, anatomy_of
from deberta_kernels.position import attention_span, reachable_rows
from deberta_kernels.torch_state.modes import values_exist
from deberta_kernels.torch_state.onlookers import has_forward_hooks, has_hooks, is_watched, sees_every_call
from deberta_kernels.types import PositionSpec

__all__ = [
    "PositionTables",
    "content_key",
    "forget",
    "forget_all",
    "projected_tables",
    "register_row_wise",
]

# A kept table covers at least this many tokens: with the usual 256 buckets that is every row but one, so that calls
# of growing length do not project again and again.
_KEPT_LENGTH = 512
# How the names of modules begin whose linear layers make each row from that row alone, and attributes that, where they
# are true, say that a part of such a layer does not.
_row_wise: tuple[str, ...] = ("peft.tuners.",)
_gates: tuple[str, ...] = ()
# Words that one product of `_keyed_sums` reads: bounds what its secret numbers take, at little cost in calls.
_BLOCK = 1 << 18


class PositionTables(NamedTuple):
    """What one attention call needs to know about positions.

    Attributes:
        pos_key: (H, rows, D) or None; K_r of the paper, rows `position.first_row ...` of the full table.
        pos_query: (H, rows, D) or None; Q_r of the paper.
        position: how distances index these rows.
        prepared: the backend's own layout of exactly these tables, or None.
    """

    pos_key: Tensor | None
    pos_query: Tensor | None
    position: PositionSpec
    prepared: Tensor | None = None


class _Kept(NamedTuple):
    """The tables of one module in eval, and everything they were computed from."""

    validity: tuple[Any, ...]
    start: int
    stop: int
    tables: PositionTables


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def projected_tables(
    module: AttentionModule,
    rel_embeddings: Tensor | None,
    length: int,
    apply: Apply,
    *,
    prepare: Callable[[PositionTables], Tensor | None] | None = None,
    rel_key: Callable[[Tensor], tuple[Any, ...] | None] | None = None,
    closed: bool = False,
) -> PositionTables:
    """Project the relative embeddings into the position tables of one call.

    Args:
        module: attention module with Hugging Face's attributes.
        rel_embeddings: (at least 2 * att_span, hidden size); None is right only where no position term is on, and
            turns them off in DeBERTa v1.
        length: number of queries and of keys, in tokens.
        apply: calls a projection, or the dropout before it.
        prepare: makes a backend's own layout of tables that will be kept.
        rel_key: returns `content_key` of rel_embeddings; lets all layers of one forward share the reading.
        closed: PyTorch's code is its own, and so are its ways to call modules: the encoder has made sure.

    Raises:
        ValueError: rel_embeddings is missing or has too few rows.
    """
    anatomy = anatomy_of(module)
    spec, projections = anatomy.position_spec(module), anatomy.position_projections(module)
    if not projections or (rel_embeddings is None and not anatomy.counts_distances):
        return PositionTables(None, None, spec)
    rel = _checked(rel_embeddings, spec)
    validity = None
    if not module.training:
        read = content_key if rel_key is None else rel_key
        validity = _validity(module, projections, spec, rel, read, closed)
    if validity is None:
        if module.training and not torch.compiler.is_compiling():
            forget(module)
        if _shows_nobody(module, projections, closed):
            return _project(module, projections, rel, _rows(length, spec), spec, apply)
        return _project_as_hugging_face(module, projections, rel, length, spec, apply)
    start, stop = reachable_rows(length, length, spec)
    kept = _kept.get(module)
    if kept is None or kept.validity != validity or start < kept.start or stop > kept.stop:
        kept = _projected_to_keep(module, projections, rel, length, spec, apply, prepare, validity)
        if _validity(module, projections, spec, rel, content_key) == validity:  # read anew: nothing changed meanwhile
            with _lock:
                _kept[module] = kept
    return kept.tables


def register_row_wise(prefix: str, gate: str) -> None:
    """Register another package's linear layers, which make each row from that row alone.

    Args:
        prefix: how the names of the modules that define them begin.
        gate: attribute of a part of a layer; where it is true, rows depend on others.
    """
    global _row_wise, _gates
    _row_wise, _gates = (*_row_wise, prefix), (*_gates, gate)


def _projected_to_keep(
    module: AttentionModule,
    projections: dict[str, nn.Module],
    rel: Tensor,
    length: int,
    spec: PositionSpec,
    apply: Apply,
    prepare: Callable[[PositionTables], Tensor | None] | None,
    validity: tuple[Any, ...],
) -> _Kept:
    covered = max(_KEPT_LENGTH, 1 << max(length - 1, 0).bit_length())
    start, stop = reachable_rows(covered, covered, spec)
    # Tables made under inference_mode could not take part in a later differentiable call.
    with torch.inference_mode(False), torch.no_grad():
        tables = _project(module, projections, rel, (start, stop), spec, apply)
        if prepare is not None:
            tables = tables._replace(prepared=prepare(tables))
    return _Kept(validity, start, stop, tables)


def forget(module: nn.Module) -> None:
    """Drop the tables kept for one module, if there are any."""
    with _lock:
        _kept.pop(module, None)


def forget_all() -> None:
    """Drop the tables kept for every module; a module that needs them again projects them again."""
    with _lock:
        _kept.clear()


def content_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return a value that follows the tensor's content; None where that cannot be told cheaply.

    Version counters alone do not do: an edit through `.data`, such as the merge of a LoRA, leaves them as they were.
    So every element is read, under keys that are random in every process, lest somebody find two contents that look the
    same: by the native library's checksum at the speed of memory, or without the library by `_keyed_sums`.
    """
    keys = _content_keys([tensor])
    return None if keys is None else keys[0]


def _content_keys(tensors: list[Tensor]) -> list[tuple[Any, ...]] | None:
    """Return `content_key` of each; None where one has none."""
    library, keys = native.opened(), []
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu:
            return None
        if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_complex() or tensor.is_neg():
            return None
        if not storage_fits(tensor):
            return None  # its memory was freed or cut: whoever computes with it says so
        plain = tensor.detach()  # which has no memory to read inside a transform of torch.func
        version = None if tensor.is_inference() else tensor._version
        content = _keyed_sums(plain.view(-1)) if library is None else library.checksum(plain)
        keys.append((version, tensor.dtype, tuple(tensor.shape), content))
    return keys


def _keyed_sums(plain: Tensor) -> tuple[int, ...]:
    """Return, for each block of a flat tensor, the sum of its words times secret numbers, modulo 2^64.

    Words have 32 bits at most, so that their difference is a multiple of no more than 2^31: any two contents have the
    same sums with probability 2^-33 at most.
    """
    words = plain
    for dtype, size in ((torch.int32, 4), (torch.int16, 2), (torch.int8, 1)):
        ratio = max(size // plain.element_size(), 1)
        if not plain.numel() % ratio and not plain.storage_offset() % ratio:
            words = plain.view(dtype)
            break
    with torch.inference_mode(False), torch.no_grad():
        with _lock:  # two threads that draw them at once would draw different ones
            numbers = _secret_numbers()
        return tuple(int(torch.mv(numbers[:, : part.numel()], part.long())) for part in words.split(_BLOCK))


@cache
def _secret_numbers() -> Tensor:
    """Return (1, _BLOCK) random integers, others in every process; PyTorch's generator is left alone."""
    return torch.frombuffer(bytearray(os.urandom(8 * _BLOCK)), dtype=torch.int64).unsqueeze(0)


def _checked(rel_embeddings: Tensor | None, spec: PositionSpec) -> Tensor:
    rows = 2 * attention_span(spec.position_buckets, spec.max_relative_positions)
    if rel_embeddings is None or rel_embeddings.dim() != 2 or rel_embeddings.shape[0] < rows:
        got = "None" if rel_embeddings is None else str(tuple(rel_embeddings.shape))
        raise ValueError(
            f"rel_embeddings must have shape (2 * att_span, hidden size) with 2 * att_span = {rows}, got {got}; "
            "pass the encoder's get_rel_embedding()."
        )
    return rel_embeddings


def _shows_nobody(module: AttentionModule, projections: dict[str, nn.Module], closed: bool) -> bool:
    """Tell whether nobody sees which rows are projected, and each projected row depends on that row alone."""
    if closed and not torch.compiler.is_compiling() and _are_plain(module, projections, closed):
        # All that may have come since are hooks.
        return not has_hooks(module.pos_dropout, *projections.values())
    parts = [part for projection in projections.values() for part in projection.modules()]
    if any(getattr(part, gate, False) for gate in _gates for part in parts):
        return False
    if torch.compiler.is_compiling():
        return not any(map(has_forward_hooks, (module.pos_dropout, *parts)))
    if (
        not is_dropout(module.pos_dropout)
        or sees_every_call() is not None
        or any(map(is_watched, (module.pos_dropout, *parts)))
    ):
        return False
    return all(is_linear(x) or type(x).__module__.startswith(_row_wise) for x in projections.values())


def _are_plain(module: AttentionModule, projections: dict[str, nn.Module], closed: bool) -> bool:
    """Tell whether the dropout and the projections compute what PyTorch's own do; `closed` as in `projected_tables`."""
    if closed:
        return type(module.pos_dropout) is nn.Dropout and all(map(is_linear_class, projections.values()))
    return is_dropout(module.pos_dropout) and all(map(is_linear, projections.values()))


def _project_as_hugging_face(
    module: AttentionModule,
    projections: dict[str, nn.Module],
    rel: Tensor,
    length: int,
    spec: PositionSpec,
    apply: Apply,
) -> PositionTables:
    """Project the rows that Hugging Face projects, by the very calls that it makes."""
    anatomy = anatomy_of(module)
    span = attention_span(spec.position_buckets, spec.max_relative_positions)
    reach = anatomy.position_reach(length, span)
    rows = apply(module.pos_dropout, rel)[span - reach : span + reach].unsqueeze(0)
    projected = [(call, apply(call, rows)) for call in anatomy.position_calls(module)]
    tables = {
        name: next(_in_heads(module, found) for call, found in projected if call is projection)
        for name, projection in projections.items()
    }
    return PositionTables(tables.get("pos_key"), tables.get("pos_query"), replace(spec, first_row=span - reach))


def _in_heads(module: AttentionModule, projected: Tensor) -> Tensor:
    """View (1, rows, H * D) as (H, rows, D)."""
    heads: Tensor = projected.squeeze(0).unflatten(-1, (module.num_attention_heads, -1)).transpose(0, 1)
    return heads


def _rows(length: int, spec: PositionSpec) -> tuple[int, int]:
    """Return [start, stop) of the rows to project; while compiling, bounds that stay symbolic in the length."""
    if not torch.compiler.is_compiling():
        return reachable_rows(length, length, spec)
    span = attention_span(spec.position_buckets, spec.max_relative_positions)
    middle = max(spec.position_buckets // 2, 1)
    # From here on the log bucket never exceeds the distance, so length - 1 rows on each side are enough.
    if spec.position_buckets <= 0 or (spec.max_relative_positions - 1) / middle >= math.e:
        # Symbolic where the length is: the tracer turns these into `torch.sym_max` and `torch.sym_min`.
        return max(span - length + 1, 0), min(span + length, 2 * span)
    return 0, 2 * span


def _project(
    module: AttentionModule,
    projections: dict[str, nn.Module],
    rel: Tensor,
    window: tuple[int, int],
    spec: PositionSpec,
    apply: Apply,
) -> PositionTables:
    # (1, rows, hidden): wrapped projections see the three dimensions that Hugging Face gives them.
    rows = apply(module.pos_dropout, rel[slice(*window)]).unsqueeze(0)
    tables = {name: _in_heads(module, apply(projection, rows)) for name, projection in projections.items()}
    position = PositionSpec(spec.position_buckets, spec.max_relative_positions, window[0])
    return PositionTables(tables.get("pos_key"), tables.get("pos_query"), position)


def _validity(
    module: AttentionModule,
    projections: dict[str, nn.Module],
    spec: PositionSpec,
    rel: Tensor,
    rel_key: Callable[[Tensor], tuple[Any, ...] | None],
    closed: bool = False,
) -> tuple[Any, ...] | None:
    """Return everything the projected tables depend on, or None when they may not be kept.

    They may be kept only in eval, on the CPU, without gradients to anything they come from, and when each projection
    computes what `nn.Linear` does, without hooks: then rows, weights, biases and the autocast state are all there is.
    Anything else (a LoRA of any make, a quantised layer, a parametrisation) is projected anew each call, so that no
    switch it has can be missed.
    """
    if not values_exist() or module.training or module.pos_dropout.training:
        return None
    linears: list[Any] = list(projections.values())
    if not _are_plain(module, projections, closed) or has_hooks(module.pos_dropout, *linears):
        return None
    sources: list[Tensor] = []
    for linear in linears:
        for source in (linear.weight, linear.bias):
            if source is not None:
                sources.append(source)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rel, *sources)):
        return None
    rows, weights = rel_key(rel), _content_keys(sources)
    if rows is None or weights is None:
        return None
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return (tuple(projections), spec, module.num_attention_heads, autocast, rows, *weights)
