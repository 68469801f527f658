"""The backends that a run proves, and the problems it does so on.

The most telling come first: a run may be stopped by its time limit. What a backend is made for and does not run is a
failure.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.plan import Plan
from deberta_kernels.dtypes import SHORT_NAMES
from deberta_kernels.impl.cuda import modules
from deberta_kernels.testing.inputs import DOUTS, LAYOUTS, MASKS, TERMS, Case

__all__ = ["asked", "cases", "has_own_backward", "is_for", "long_cases"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
# Beyond this distance every pair is saturated, so a longer problem has far tiles on both sides.
FAR = 1200


def asked(plan: Plan) -> tuple[str, ...]:
    """Return the backends of a run: the one it names, and the CUDA kernels on every device that they are made for."""
    others = ("cuda",) if _is_hopper(plan.device) and plan.backend != "cuda" else ()
    return (plan.backend, *others)


def _is_hopper(device: str) -> bool:
    if device == "cpu" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == modules.CAPABILITY


def is_for(backend: str, case: Case) -> bool:
    """Tell whether a backend computes problems of this dtype and head size, as its documentation says."""
    return backend != "cuda" or (
        SHORT_NAMES[case.dtype] in modules.DTYPES and case.head_dim in modules.HEAD_DIMS["forward"]
    )


def has_own_backward(backend: str, case: Case) -> bool:
    """Tell whether the gradients of a problem that `is_for` a backend are its own."""
    return backend != "cuda" or case.head_dim in modules.HEAD_DIMS["backward"]


def cases(plan: Plan) -> list[Case]:
    """Return the problems that are checked whole."""
    if plan.small:
        chosen = (*_first(), *_masks()[:3], *_packed()[:1], *_dropout()[:1])
        return _without_repeats([_shrunk(case) for case in chosen])
    if plan.smoke:
        return [*_first(), *_masks()[:4], *_packed()[:1], *_dropout()[:2]]
    return _without_repeats(
        [*_first(), *_masks(), *_packed(), *_dropout(), *_lengths(), *_head_dims(), *_forms(), *_positions()]
    )


def long_cases(plan: Plan) -> list[Case]:
    """Return the long problems, one or two heads each."""
    lengths = (96,) if plan.small else (2048,) if plan.smoke else (2048, 4096, 8192, 16384)
    found = [Case(batch=1, heads=1, nq=n, dtype=BF16) for n in lengths]
    if not (plan.small or plan.smoke):
        found += [Case(batch=1, heads=1, nq=4096, dtype=dtype) for dtype in (FP16, FP32)]
        found += [Case(batch=2, heads=1, nq=3000, dtype=BF16, mask=mask) for mask in ("right", "holes", "left")]
        found += [Case(batch=3, heads=1, nq=3000, dtype=BF16, packed=True)]
        found += [Case(batch=1, heads=1, nq=3000, dtype=BF16, dropout_p=0.1)]
    return found


def _shrunk(case: Case) -> Case:
    return replace(case, nq=min(case.nq, 80), heads=2, head_dim=min(case.head_dim, 32))


def _without_repeats(found: list[Case]) -> list[Case]:
    return list(dict.fromkeys(found))


def _first() -> list[Case]:
    """Every dtype, short and across all zones, forward and backward."""
    return [Case(nq=n, dtype=dtype) for n in (111, FAR) for dtype in DTYPES]


def _masks() -> list[Case]:
    names = [name for name in MASKS if name != "none"]
    found = [Case(nq=300, dtype=BF16, mask=name) for name in ("right_tokens", "holes", "blocks")]
    found += [Case(nq=300, dtype=BF16, mask=name) for name in names]
    found += [Case(nq=FAR, batch=2, heads=2, dtype=BF16, mask=name) for name in ("right", "left", "holes", "sparse")]
    found += [Case(nq=300, dtype=dtype, mask=name) for dtype in (FP16, FP32) for name in ("right", "holes", "heads")]
    return found


def _packed() -> list[Case]:
    found = [Case(batch=5, nq=200, dtype=BF16, packed=True)]
    found += [Case(batch=4, nq=FAR, heads=2, dtype=BF16, packed=True)]
    found += [Case(batch=5, nq=200, dtype=dtype, packed=True) for dtype in (FP16, FP32)]
    found += [Case(batch=40, nq=31, dtype=BF16, packed=True), Case(batch=1, nq=1, dtype=BF16, packed=True)]
    return found


def _dropout() -> list[Case]:
    found = [Case(nq=300, dtype=BF16, dropout_p=0.1), Case(batch=5, nq=200, dtype=BF16, packed=True, dropout_p=0.1)]
    found += [Case(nq=300, dtype=dtype, dropout_p=0.3) for dtype in (FP16, FP32)]
    found += [Case(nq=300, dtype=BF16, dropout_p=0.1, mask=name) for name in ("right_tokens", "holes", "sparse")]
    found += [Case(nq=FAR, heads=2, dtype=BF16, dropout_p=0.1), Case(nq=100, dtype=BF16, dropout_p=0.9)]
    found += [Case(nq=n, dtype=dtype, dropout_p=0.1) for n in (1, 2, 3) for dtype in (BF16, FP16)]
    found += [Case(nq=300, dtype=BF16, dropout_p=0.1, mask="one_token")]
    found += [Case(batch=40, nq=1, dtype=BF16, packed=True, dropout_p=0.1), Case(nq=2, dtype=BF16, dropout_p=0.5)]
    return found


def _lengths() -> list[Case]:
    found = [Case(nq=n, dtype=BF16) for n in (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 511, 512, 513, 700)]
    found += [Case(nq=n, dtype=FP16, heads=2) for n in (1, 64, 513)]
    return found


def _head_dims() -> list[Case]:
    found = [Case(nq=150, dtype=BF16, head_dim=d) for d in (128, 32, 16, 256, 24, 40, 48, 80, 96, 160, 8, 1)]
    found += [Case(nq=FAR, heads=2, dtype=BF16, head_dim=d) for d in (32, 128, 256)]
    found += [Case(nq=150, dtype=dtype, head_dim=d) for dtype in (FP16, FP32) for d in (32, 128, 256)]
    return found


def _forms() -> list[Case]:
    found = [Case(nq=150, dtype=BF16, layout=layout) for layout in LAYOUTS]
    found += [Case(nq=150, dtype=BF16, dout=dout) for dout in DOUTS]
    found += [Case(nq=150, dtype=BF16, spread=spread) for spread in (0.01, 3.0, 8.0)]
    found += [Case(nq=150, dtype=FP16, spread=8.0), Case(batch=1, heads=40, nq=150, dtype=BF16)]
    return found


def _positions() -> list[Case]:
    found = [Case(nq=300, dtype=BF16, terms=terms) for terms in TERMS]
    found += [Case(nq=FAR, heads=2, dtype=BF16, terms=terms) for terms in ("c2p", "p2c")]
    found += [Case(nq=100, nk=333, dtype=BF16), Case(nq=333, nk=100, dtype=BF16), Case(nq=1, nk=FAR, dtype=BF16)]
    found += [Case(nq=200, nk=230, dtype=BF16, prefix_length=30), Case(nq=FAR, nk=FAR + 7, dtype=BF16, prefix_length=7)]
    for buckets, most in ((32, 128), (-1, 128), (64, 2000), (256, 300), (16, 32)):
        found.append(Case(nq=400, dtype=BF16, position_buckets=buckets, max_relative_positions=most))
    found += [Case(nq=200, dtype=BF16, reachable=True), Case(nq=FAR, heads=2, dtype=BF16, reachable=True)]
    return found
