"""What attention costs in PyTorch's FlopCounterMode: the matrix products that eager attention would compute.

`torch.utils.flop_counter` imports triton, so it is left alone until somebody else has imported it. A counter copies the
registry when it is made; one that is active already is told as well.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from deberta_kernels import __name__ as PACKAGE
from deberta_kernels.position import attention_span

__all__ = ["attention_backward_flops", "attention_flops", "register"]

_OPERATORS = getattr(torch.ops, PACKAGE)
_COUNTER = "torch.utils.flop_counter"


def attention_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Count q.k, c2p, p2c and p.v.

    Args:
        args: those of the operator `attention`.
        out_val: its results.
        kwargs: those of its arguments that were given by name.
    """
    content, c2p, p2c = _products(_named(_OPERATORS.attention, args, kwargs))
    return 2 * content + c2p + p2c


def attention_backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Count one product per gradient that is asked for, and dout.v where the probabilities are differentiated.

    Args:
        args: those of the operator `attention_backward`.
        out_val: its results.
        kwargs: those of its arguments that were given by name.
    """
    named = _named(_OPERATORS.attention_backward, args, kwargs)
    content, c2p, p2c = _products(named)
    q, k, v, pos_key, pos_query = (int(need) for need in named["needs"])
    through_scores = int(any((q, k, pos_key, pos_query)))
    return content * (q + k + v + through_scores) + c2p * (q + pos_key) + p2c * (k + pos_query)


def _named(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**{x.name: value for x, value in zip(operator.default._schema.arguments, args)}, **kwargs}


def _products(named: dict[str, Any]) -> tuple[int, int, int]:
    """Return the operations, two per multiplication, of q.k (or p.v), of c2p and of p2c."""
    pos_key, pos_query, buckets = named["pos_key"], named["pos_query"], named["position_buckets"]
    batch, heads, nq, head_dim = named["q"].shape
    nk, cu_seqlens = named["k"].shape[2], named["cu_seqlens"]
    pairs = batch * nq * nk if cu_seqlens is None else _packed_pairs(cu_seqlens, named["max_seqlen"])
    per_pair = 2 * heads * head_dim
    table = pos_key if pos_key is not None else pos_query
    rows = 0
    if table is not None:
        # Eager attention multiplies whole tables of log buckets; linear ones it cuts to the length, as they are here.
        rows = 2 * attention_span(buckets, named["max_relative_positions"]) if buckets > 0 else table.shape[1]
    c2p = per_pair * batch * nq * rows if pos_key is not None else 0
    p2c = per_pair * batch * nk * rows if pos_query is not None else 0
    return per_pair * pairs, c2p, p2c


def _packed_pairs(cu_seqlens: Tensor, max_seqlen: int) -> int:
    if cu_seqlens.is_meta or type(cu_seqlens) is not Tensor:
        return (cu_seqlens.shape[0] - 1) * max_seqlen**2  # its values are unknown
    bounds = cu_seqlens.tolist()
    return sum((stop - start) ** 2 for start, stop in pairwise(bounds))


def register() -> None:
    """Make the formulas known, if there is somebody who counts."""
    module = sys.modules.get(_COUNTER)
    if module is None:
        return
    formulas = {
        _OPERATORS.attention: attention_flops,
        _OPERATORS.attention_backward: attention_backward_flops,
    }
    registries = [getattr(getattr(mode, "counter", None), "flop_registry", None) for mode in _modes()]
    for target, formula in formulas.items():
        if target not in module.flop_registry:
            module.register_flop_formula(target, get_raw=True)(formula)
        for registry in registries:
            if registry is not None:
                registry.setdefault(target, formula)


def _modes() -> list[Any]:
    return _get_current_dispatch_mode_stack()  # type: ignore[no-any-return, no-untyped-call]
