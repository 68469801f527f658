"""The attention cores of other packages on the same tensors, each called the fastest way its own model takes.

Both are pinned to the release that was read, since neither promises the functions used here. Projections are taken out
on every side: q, k, v and the projected tables are handed over. Whatever they derive from tables or lengths alone is
made beforehand where their own model keeps it between calls.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.candidates import CORES, Inputs
from benchmarks.harness.work import GEOMETRY
from benchmarks.registry import CANDIDATES
from deberta_kernels.testing.geometries import settings

__all__ = ["ABSENT", "available", "disentangled_flash", "flashdeberta", "register"]

ABSENT = "not installed"
SCALE = 1.0 / math.sqrt(3 * GEOMETRY.dim)


def available(name: str) -> str:
    """Return "" when a rival can be called, else why not."""
    package, release = CANDIDATES["gpu"][name].needs[0], CANDIDATES["gpu"][name].release
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT
    if found != release:
        return f"version {found} is installed, {release} was read"
    return "" if importlib.util.find_spec(package) else "not importable"


def register() -> None:
    """Make the rivals candidates, under their distributions' names."""
    CORES["flashdeberta"] = flashdeberta
    CORES["disentangled-flash"] = disentangled_flash


def _flash_module() -> Any:
    """Import the operators alone: the package itself also imports model heads, which move between transformers."""
    if "flashdeberta" not in sys.modules:
        spec = importlib.util.find_spec("flashdeberta")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("flashdeberta is not installed")
        shell = types.ModuleType("flashdeberta")
        shell.__path__ = list(spec.submodule_search_locations)
        sys.modules["flashdeberta"] = shell
    return importlib.import_module("flashdeberta.ops.flash_attention")


def flashdeberta(sets: list[Inputs]) -> Callable[[int], Tensor]:
    """Return FlashDeBERTa's operator, on contiguous (B, H, N, D) tensors: its own module copies its projections so.

    The copies are made here, on every call, as there.
    """
    attention = _flash_module().flash_attention_with_disentangled

    def call(index: int) -> Tensor:
        x = sets[index % len(sets)]
        q, k, v = (tensor.contiguous() for tensor in (x.q, x.k, x.v))
        pos_key, pos_query = (table.unsqueeze(0).contiguous() for table in (x.pos_key, x.pos_query))
        out: Tensor = attention(
            q,
            k,
            v,
            None,
            pos_key,
            pos_query,
            causal=False,
            sm_scale=SCALE,
            position_buckets=GEOMETRY.position_buckets,
            max_relative_distance=GEOMETRY.max_relative_positions,
        )
        return out

    return call


def disentangled_flash(sets: list[Inputs]) -> Callable[[int], Tensor]:
    """Return DisentangledFlash's attention: its inference class without gradients, its training class with them."""
    return _training(sets) if sets[0].q.requires_grad else _inference(sets)


def _config() -> Any:
    chosen = settings("v3-base", share_att_key=False, max_relative_positions=GEOMETRY.max_relative_positions)
    chosen |= {"vocab_size": 1024, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return types.SimpleNamespace(**chosen)


def _tokens(x: Tensor) -> Tensor:
    """Return (B, N, H * D) of (B, H, N, D), without a copy for the layout of a model."""
    return x.transpose(1, 2).flatten(2)


def _heads_last(out: Tensor, like: Tensor) -> Tensor:
    """Return (B, H, N, D) of what their modules return, (B, N, H * D) or (B, H, N, D)."""
    batch, heads, length, dim = like.shape
    if out.shape == like.shape:
        return out
    return out.view(batch, length, heads, dim).transpose(1, 2)


def _inference(sets: list[Inputs]) -> Callable[[int], Tensor]:
    package = importlib.import_module("disentangled_flash.kernel")
    modules = []
    for inputs in sets:
        module = package.DisentangledFlashAttention(_config(), assume_unpadded=True).eval().to(inputs.q)
        module._cached_qkv_weight = inputs.q.new_empty(1)  # "prepared", as far as its own checks go
        module._cached_pos_key, module._cached_pos_query = inputs.pos_key, inputs.pos_query
        module._project_qkv = lambda _, x=inputs: tuple(_tokens(tensor) for tensor in (x.q, x.k, x.v))
        plan = module.prepare_shape(inputs.q.shape[2], inputs.q.device)
        modules.append((module, plan))
    mask = torch.ones(sets[0].q.shape[0], sets[0].q.shape[2], dtype=torch.bool, device=sets[0].q.device)

    def call(index: int) -> Tensor:
        inputs, (module, plan) = sets[index % len(sets)], modules[index % len(sets)]
        with torch.no_grad():
            out: Tensor = module.forward_prepared(_tokens(inputs.q), mask, plan)[0]
        return _heads_last(out, inputs.q)

    return call


def _training(sets: list[Inputs]) -> Callable[[int], Tensor]:
    package = importlib.import_module("disentangled_flash.training.attention")
    module = package.TritonTrainingDisentangledSelfAttention(_config(), assume_unpadded=True).train().to(sets[0].q)
    given: dict[str, Inputs] = {}
    module._project_qkv = lambda _: tuple(_tokens(getattr(given["now"], name)) for name in ("q", "k", "v"))
    # Its own model projects the rows that a length reaches, and no others.
    module._project_active_positions = lambda _, slots: (
        given["now"].pos_key.index_select(1, slots),
        given["now"].pos_query.index_select(1, slots),
    )
    q = sets[0].q
    mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    embeddings = torch.empty(2 * GEOMETRY.position_buckets, GEOMETRY.hidden, device=q.device, dtype=q.dtype)

    def call(index: int) -> Tensor:
        given["now"] = sets[index % len(sets)]
        out: Tensor = module(_tokens(given["now"].q), mask, rel_embeddings=embeddings)[0]
        return _heads_last(out, q)

    return call
