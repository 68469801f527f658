"""Attention problems to draw: every shape, mask, stride and upstream gradient that a backend must get right.

A `Case` is plain numbers and names, so its id says everything and the same case always gives the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from deberta_kernels import dropout, dtypes
from deberta_kernels.position import attention_span, reachable_rows
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

__all__ = ["DOUTS", "KEY_MASKS", "LAYOUTS", "MASKS", "PAIR_MASKS", "TERMS", "Case", "dout", "masks", "problem"]

TERMS = ("c2p+p2c", "c2p", "p2c", "none")
# Padding patterns. As they are, they mask keys; "<name>_tokens" also makes the padded queries padding (Nq = Nk).
KEY_MASKS = ("right", "left", "holes", "one_token", "all_padding")
# blocks: block-diagonal, (B, 1, Nq, Nk); heads: another one per head; sparse: few pairs, some rows empty;
# sparse+holes: together with a key mask.
PAIR_MASKS = ("blocks", "heads", "sparse", "sparse+holes")
MASKS = ("none", *KEY_MASKS, *(f"{name}_tokens" for name in KEY_MASKS), *PAIR_MASKS)
# heads_first: contiguous (B, H, N, D). heads_inside: views of (B, N, H * D), what projections give. fused: slices of
# one (B, N, 3 * H * D). one_sample: batch stride 0. one_head: head stride 0. every_other: each second token.
# wide_elements: each second number of the last dimension.
LAYOUTS = ("heads_inside", "heads_first", "fused", "one_sample", "one_head", "every_other", "wide_elements")
# sum: stride 0 everywhere, what `out.sum()` sends. transposed: (B, H, D, N) memory. every_other: each second token of
# a longer tensor. slice: part of a wider tensor, what torch.cat sends.
DOUTS = ("randn", "sum", "transposed", "every_other", "slice")


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes:
        batch: B; number of sequences when packed.
        heads: H.
        nq: Nq, in tokens.
        nk: Nk, in tokens; None = Nq. With prefix_length it counts the prefix keys.
        head_dim: D.
        dtype: of q, k, v, the tables and dout.
        terms: one of `TERMS`.
        position_buckets: see `PositionSpec`.
        max_relative_positions: see `PositionSpec`.
        prefix_length: leading keys without a position.
        mask: one of `MASKS`.
        layout: one of `LAYOUTS`.
        dout: one of `DOUTS`.
        spread: standard deviation of q, k and the tables; scaled scores then have that of spread ** 2. v has 1.
        dropout_p: probability that one attention probability is dropped.
        reachable: pass only the rows of the tables that the lengths can reach.
        packed: B sequences of random lengths up to Nq, packed one after the other.
        seed: of every random number.
    """

    batch: int = 2
    heads: int = 3
    nq: int = 111
    nk: int | None = None
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    terms: str = "c2p+p2c"
    position_buckets: int = 256
    max_relative_positions: int = 512
    prefix_length: int = 0
    mask: str = "none"
    layout: str = "heads_inside"
    dout: str = "randn"
    spread: float = 1.0
    dropout_p: float = 0.0
    reachable: bool = False
    packed: bool = False
    seed: int = 0

    @property
    def keys(self) -> int:
        """Nk, in tokens; Nq when packed."""
        return self.nq if self.nk is None or self.packed else self.nk

    @property
    def id(self) -> str:
        """Name of the case in test reports, such as B2-N111-H3-D64-bf16-c2p+p2c."""
        length = f"N{self.nq}" if self.nk in (None, self.nq) else f"Nq{self.nq}-Nk{self.nk}"
        dtype = dtypes.short_name(self.dtype)
        parts = [f"B{self.batch}", length, f"H{self.heads}", f"D{self.head_dim}", dtype, self.terms]
        if (self.position_buckets, self.max_relative_positions) != (256, 512):
            parts.append(f"buckets{self.position_buckets}of{self.max_relative_positions}")
        optional = (
            (self.prefix_length, f"prefix{self.prefix_length}"),
            (self.mask != "none", self.mask),
            (self.layout != "heads_inside", self.layout),
            (self.dout != "randn", f"dout_{self.dout}"),
            (self.spread != 1.0, f"spread{self.spread:g}"),
            (self.dropout_p, f"dropout{self.dropout_p:g}"),
            (self.reachable, "reachable"),
            (self.packed, "packed"),
            (self.seed, f"seed{self.seed}"),
        )
        return "-".join([*parts, *(text for given, text in optional if given)])


def problem(case: Case, device: torch.device | str = "cpu") -> AttentionProblem:
    """Draw the tensors of a case; the dropout seed is the one a call draws after `torch.manual_seed(case.seed)`."""
    generator = torch.Generator().manual_seed(case.seed)
    batch, nq, nk = case.batch, case.nq, case.keys
    cu_seqlens = None
    if case.packed:
        lengths = [1 + int(torch.randint(nq, (), generator=generator)) for _ in range(batch)]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        batch, nq, nk = 1, sum(lengths), sum(lengths)
    q, k, v = (_to(x, device) for x in _activations(case, batch, nq, nk, generator))
    spec = _position(case)
    pos_key, pos_query = (None if x is None else _to(x, device) for x in _tables(case, spec, generator))
    seed = None
    if case.dropout_p > 0:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            seed = dropout.draw_seed(device)
    factor = 1 + (pos_key is not None) + (pos_query is not None)
    return AttentionProblem(
        q,
        k,
        v,
        pos_key,
        pos_query,
        masks=Masks() if case.packed else masks(case, device),
        position=spec,
        scale=(case.head_dim * factor) ** -0.5,
        dropout_p=case.dropout_p,
        seed=seed,
        cu_seqlens=None if cu_seqlens is None else _to(cu_seqlens, device),
        max_seqlen=max(lengths) if case.packed else max(nq, nk),
    )


def masks(case: Case, device: torch.device | str = "cpu") -> Masks:
    """Draw the masks of a case."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    name = case.mask.removesuffix("_tokens")
    with_queries = name != case.mask
    if name == "none":
        return Masks()
    if name in PAIR_MASKS:
        key = _key_mask("holes", case.batch, case.keys, generator) if name == "sparse+holes" else None
        pair = _to(_pair_mask(name, case, generator), device)
        return Masks(key=None if key is None else _to(key, device), pair=pair)
    if with_queries and case.nq != case.keys:
        raise ValueError(f"mask {case.mask} needs Nq = Nk, got {case.nq} and {case.keys}")
    tokens = _to(_key_mask(name, case.batch, case.keys, generator), device)
    return Masks(key=tokens, query=tokens if with_queries else None)


def dout(case: Case, like: AttentionProblem) -> Tensor:
    """Draw the upstream gradient of out, (B, H, Nq, D) in the dtype of q, with the strides the case names."""
    shape = like.q.shape
    batch, heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(case.seed + 2)
    make: dict[str, Callable[[], Tensor]] = {
        "randn": lambda: _randn(shape, generator),
        "sum": lambda: torch.ones(()).expand(shape),
        "transposed": lambda: _randn((batch, heads, head_dim, length), generator).transpose(-1, -2),
        "every_other": lambda: _randn((batch, heads, 2 * length, head_dim), generator)[:, :, ::2],
        "slice": lambda: _randn((batch, length, heads, head_dim + 5), generator)[..., 3:-2].transpose(1, 2),
    }
    value = make[case.dout]()
    # Casting and moving keep the strides of dense tensors only, so both go through the storage.
    return _restrided(value, case.dtype, like.q.device)


def _restrided(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride())) if value.numel() else 0
    storage = torch.zeros(size, dtype=dtype, device=device)
    view = storage.as_strided(value.shape, value.stride())
    if value.numel():
        storage.copy_(value.as_strided((size,), (1,), value.storage_offset()))
    return view


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _to(x: Tensor, device: torch.device | str) -> Tensor:
    return x if torch.device(device).type == "cpu" else _restrided(x, x.dtype, torch.device(device))


def _position(case: Case) -> PositionSpec:
    spec = PositionSpec(case.position_buckets, case.max_relative_positions, 0, case.prefix_length)
    if not case.reachable:
        return spec
    first_row, _ = reachable_rows(case.nq, case.keys - case.prefix_length, spec)
    return PositionSpec(case.position_buckets, case.max_relative_positions, first_row, case.prefix_length)


def _tables(case: Case, spec: PositionSpec, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    rows = 2 * attention_span(case.position_buckets, case.max_relative_positions)
    stop = reachable_rows(case.nq, case.keys - case.prefix_length, spec)[1] if case.reachable else rows
    tables: list[Tensor | None] = []
    for term in ("c2p", "p2c"):
        if term not in case.terms:
            tables.append(None)
        elif case.layout == "heads_first":
            table = _randn((case.heads, rows, case.head_dim), generator).mul(case.spread).to(case.dtype)
            tables.append(table[:, spec.first_row : stop])
        else:
            table = _randn((rows, case.heads, case.head_dim), generator).mul(case.spread).to(case.dtype)
            tables.append(table[spec.first_row : stop].transpose(0, 1))
    return tables[0], tables[1]


def _activations(case: Case, batch: int, nq: int, nk: int, generator: torch.Generator) -> list[Tensor]:
    """Draw q, k and v, (B, H, N, D) each, in the layout of the case."""
    heads, head_dim = case.heads, case.head_dim
    if case.layout == "fused" and nq == nk:
        fused = _randn((batch, nq, 3, heads, head_dim), generator)
        fused[:, :, :2] *= case.spread
        return [x.transpose(1, 2) for x in fused.to(case.dtype).unbind(2)]
    tensors = []
    for length, spread in ((nq, case.spread), (nk, case.spread), (nk, 1.0)):

        def draw(*shape: int, spread: float = spread) -> Tensor:
            return _randn(shape, generator).mul(spread).to(case.dtype)

        if case.layout == "heads_first":
            x = draw(batch, heads, length, head_dim)
        elif case.layout == "one_sample":
            x = draw(1, length, heads, head_dim).transpose(1, 2).expand(batch, -1, -1, -1)
        elif case.layout == "one_head":
            x = draw(batch, 1, length, head_dim).expand(-1, heads, -1, -1)
        elif case.layout == "every_other":
            x = draw(batch, 2 * length, heads, head_dim).transpose(1, 2)[:, :, ::2]
        elif case.layout == "wide_elements":
            x = draw(batch, length, heads, 2 * head_dim).transpose(1, 2)[..., ::2]
        else:  # heads_inside, and fused when Nq and Nk differ: an offset into a wider row
            x = draw(batch, length, heads + (case.layout == "fused"), head_dim).transpose(1, 2)[:, -heads:]
        tensors.append(x)
    return tensors


def _key_mask(name: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Return (B, N) bool, True = real token; only all_padding and one_token leave a sample fewer than two tokens."""
    positions = torch.arange(length)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if name == "right":
        return positions < lengths
    if name == "left":
        return positions >= length - lengths
    if name == "holes":
        keep = torch.rand(batch, length, generator=generator) < 0.6
        keep[torch.arange(batch), torch.randint(length, (batch,), generator=generator)] = True
        return keep
    if name == "one_token":
        return positions == torch.randint(length, (batch, 1), generator=generator)
    if name == "all_padding":
        keep = positions < lengths
        keep[batch // 2 :] = False
        return keep
    raise ValueError(f"mask must be one of {MASKS}, got {name!r}")


def _pair_mask(name: str, case: Case, generator: torch.Generator) -> Tensor:
    """Return (B, 1 or H, Nq, Nk) bool, True = may attend."""
    batch, nq, nk = case.batch, case.nq, case.keys
    heads = case.heads if name == "heads" else 1
    if name in ("blocks", "heads"):
        length = max(nq, nk)
        starts = torch.rand(batch, heads, length, generator=generator) < 4 / length
        block = starts.cumsum(-1)
        return block[..., :nq, None] == block[..., None, :nk]
    return torch.rand(batch, 1, nq, nk, generator=generator) < torch.rand(batch, 1, nq, 1, generator=generator) ** 2 / 2
