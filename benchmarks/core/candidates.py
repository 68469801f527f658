"""What is timed of the attention core: inputs, our own calls, SDPA, Hugging Face's eager attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.clock import rotating
from benchmarks.harness.work import GEOMETRY
from benchmarks.registry import Shape
from deberta_kernels import dispatch
from deberta_kernels.testing.geometries import settings
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = [
    "CORES",
    "Inputs",
    "candidates",
    "draw",
    "hugging_face_core",
    "our_core",
    "ours",
    "problem",
    "rotation",
]

# Inputs rotate through this much memory: beyond the caches of one core, as the tables of twelve layers are.
ROTATED_BYTES = 48 << 20


@dataclass(frozen=True)
class Inputs:
    """One set of inputs in the layout of a model: (B, N, H * D) and (2 * span, H * D) memory.

    Attributes:
        q: (B, H, N, D) view.
        k: (B, H, N, D) view.
        v: (B, H, N, D) view.
        pos_key: (H, 2 * span, D) view of the projected table.
        pos_query: (H, 2 * span, D) view of the projected table.
        dout: (B, H, N, D) view, a random output gradient.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pos_key: Tensor
    pos_query: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the five tensors that have gradients."""
        return self.q, self.k, self.v, self.pos_key, self.pos_query

    def requiring_grad(self) -> Inputs:
        """Return the same values as leaves that require gradients."""
        q, k, v, pos_key, pos_query = (x.detach().requires_grad_() for x in self.leaves)
        return Inputs(q, k, v, pos_key, pos_query, self.dout)


def draw(shape: Shape, seed: int = 0, device: str = "cpu") -> Inputs:
    """Draw normal inputs in the timed dtype; the position tables are as large as the projections make them."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    heads, dim = GEOMETRY.heads, GEOMETRY.dim

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, heads, dim, generator=generator, device=device).to(dtype)

    tokens = [normal(shape.batch * shape.length).view(shape.batch, shape.length, heads, dim) for _ in range(4)]
    tables = [normal(2 * GEOMETRY.position_buckets).transpose(0, 1) for _ in range(2)]
    q, k, v, dout = (x.transpose(1, 2) for x in tokens)
    return Inputs(q, k, v, tables[0], tables[1], dout)


def rotation(shape: Shape, device: str = "cpu") -> list[Inputs]:
    """Draw as many sets as `ROTATED_BYTES` hold, at least 2 and at most 8."""
    first = draw(shape, device=device)
    size = sum(x.numel() * x.element_size() for x in (*first.leaves, first.q))
    count = max(2, min(8, ROTATED_BYTES // size))
    return [first, *(draw(shape, seed, device) for seed in range(1, count))]


def ours(inputs: Inputs, backend: str, *, prepare: bool, lse: bool = False) -> Callable[[], Any]:
    """Return a call of our core.

    Args:
        inputs: what it runs on.
        backend: explicit backend name.
        prepare: True does what a patched model does in eval on the CPU: the tables are brought into the backend's own
            layout beforehand. False hands over the bare tables.
        lse: return (out, lse) instead of out.
    """
    from deberta_kernels.api import run_attention

    pos_key, pos_query, spec, prepared = inputs.pos_key, inputs.pos_query, _spec(), None
    if prepare:
        from deberta_kernels.position import reachable_rows

        # A patched model keeps the tables of its longest call so far, but of 512 tokens at least.
        covered = max(512, 1 << (inputs.q.shape[2] - 1).bit_length())
        start, stop = reachable_rows(covered, covered, spec)
        spec = _spec(start)
        pos_key, pos_query = pos_key[:, start:stop], pos_query[:, start:stop]
        prepared = _prepare(backend, pos_key, pos_query, spec)

    def call() -> Any:
        return run_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            pos_key,
            pos_query,
            masks=Masks(),
            position=spec,
            prepared=prepared,
            return_lse=lse,
            backend=backend,
        )

    return call


def our_core(sets: list[Inputs], backend: str, *, prepare: bool = False) -> Callable[[int], Any]:
    """Return our core over sets of inputs in turn, as a function of a counter."""
    return rotating(lambda call: call(), [ours(inputs, backend, prepare=prepare) for inputs in sets])


def _spec(first_row: int = 0) -> PositionSpec:
    return PositionSpec(GEOMETRY.position_buckets, GEOMETRY.max_relative_positions, first_row)


def _prepare(backend: str, pos_key: Tensor, pos_query: Tensor, spec: PositionSpec) -> Tensor | None:
    prepare = getattr(dispatch.load(backend), "prepare", None)
    return None if prepare is None else prepare(pos_key, pos_query, spec)


class _Given(nn.Module):
    """A projection that returns what was projected already."""

    value: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def hugging_face_core(sets: list[Inputs], *, compiled: bool = False) -> Callable[[int], Tensor]:
    """Return Hugging Face's own `DisentangledSelfAttention.forward` with the projections taken out.

    Scores, both gathers, mask, softmax and probabilities times v run as transformers wrote them. The projected
    q, k, v and tables are handed over; relative positions and the (B, 1, N, N) mask are built beforehand, as the
    encoder does once per forward. `compiled` passes it through `torch.compile`.
    """
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2 import modeling_deberta_v2 as hub

    config = DebertaV2Config(**settings("v3-base", vocab_size=1024, share_att_key=False))
    module = hub.DisentangledSelfAttention(config).eval()
    names = ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj")
    given = [_Given() for _ in names]
    for name, projection in zip(names, given, strict=True):
        setattr(module, name, projection)
    q = sets[0].q
    batch, _, length, _ = q.shape
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=q.device)
    positions = hub.build_relative_position(
        q, q, bucket_size=GEOMETRY.position_buckets, max_position=GEOMETRY.max_relative_positions
    )
    flat = [[_flat(x) for x in inputs.leaves] for inputs in sets]
    run = torch.compile(module, dynamic=False) if compiled else module
    embeddings = torch.empty(2 * GEOMETRY.position_buckets, GEOMETRY.hidden, device=q.device)

    def call(index: int) -> Tensor:
        for projection, value in zip(given, flat[index % len(flat)], strict=True):
            projection.value = value
        out: Tensor = run(given[0].value, mask, relative_pos=positions, rel_embeddings=embeddings)[0]
        return out.view(batch, length, GEOMETRY.heads, GEOMETRY.dim).transpose(1, 2)

    return call


def _flat(x: Tensor) -> Tensor:
    """Return (B, N, H * D) of (B, H, N, D), and (1, rows, H * D) of (H, rows, D), without a copy."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    return x.transpose(1, 2).flatten(2)


# Attention cores written by others: name -> sets of inputs -> function of a counter that picks one and returns out.
CORES: dict[str, Callable[[list[Inputs]], Callable[[int], Tensor]]] = {"huggingface": hugging_face_core}


def candidates(
    shape: Shape, wanted: frozenset[str], backend: str, device: str = "cpu"
) -> dict[str, Callable[[int], object]]:
    """Return the timed calls of one shape: "prepared", "bare", "sdpa", "eager" and those of `CORES`, as wanted.

    Each is a function of a counter that picks the inputs; all rotate through the same sets. With
    `shape.backward` a call is a forward and a backward to all five gradients (three for SDPA, which has no tables).
    """
    sets = rotation(shape, device)
    if shape.backward:
        sets = [inputs.requiring_grad() for inputs in sets]
    found: dict[str, Callable[[int], Any]] = {}
    if "prepared" in wanted:
        found["prepared"] = our_core(sets, backend, prepare=True)
    if "bare" in wanted:
        found["bare"] = our_core(sets, backend)
    if "sdpa" in wanted:
        attention = nn.functional.scaled_dot_product_attention
        found["sdpa"] = lambda index: attention(*sets[index % len(sets)].leaves[:3])
    for name in sorted(wanted & CORES.keys()):
        found[name] = CORES[name](sets)
    if "eager" in wanted:
        found["eager"] = _eager_core(sets)
    if not shape.backward:
        return {name: _without_grad(call) for name, call in found.items()}
    return {name: _with_backward(call, sets, 3 if name == "sdpa" else 5) for name, call in found.items()}


def problem(inputs: Inputs) -> AttentionProblem:
    """Return the call with bare full tables, as the error budget takes it."""
    scale = 1.0 / math.sqrt(3 * GEOMETRY.dim)
    return AttentionProblem(*inputs.leaves, Masks(), _spec(), scale, max_seqlen=inputs.q.shape[2])


def _eager_core(sets: list[Inputs]) -> Callable[[int], Any]:
    from deberta_kernels.testing import eager

    problems = [problem(inputs) for inputs in sets]
    return rotating(lambda one: eager.attention(one)[0], problems)


def _without_grad(call: Callable[[int], Any]) -> Callable[[int], object]:
    def run(index: int) -> object:
        with torch.no_grad():
            return call(index)

    return run


def _with_backward(call: Callable[[int], Any], sets: list[Inputs], count: int) -> Callable[[int], object]:
    def run(index: int) -> object:
        inputs = sets[index % len(sets)]
        return torch.autograd.grad(call(index), inputs.leaves[:count], inputs.dout)

    return run
