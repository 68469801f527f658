"""The registry of backends: a new one is one row here and one module in `impl`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

__all__ = ["BACKENDS", "REGISTRY", "Backend", "order"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the attention call.

    Attributes:
        module: where it is in this package: `forward`, `backward`, `refusal`, and what the rest of the row says.
        devices: device types that "auto" tries it on; None means every one.
        by_name_only: "auto" never tries it.
        gradients: the backend that computes the gradients of calls which `backward_refusal` of its own refuses. Both
            keep to one meaning of out and lse, all that a backward takes from a forward.
        prepares: its `prepare` lays position tables out once for many calls.
        direct: whoever has checked the arguments may call it as it is. It looks itself at the memory it reads and at
            the rows of sliced tables, and its results are no views, of which autograd remembers where they were made.
        own_graph: its `attention` is made of differentiable operators, and autograd, forward-mode differentiation and
            functional transforms work on those, to any order.
        self_tested: it answers on a device only after `proof.self_test`.
        costs: what running it costs where a faster one could run, a clause for the user; "" for the fastest.
    """

    module: str
    devices: tuple[str, ...] | None = None
    by_name_only: bool = False
    gradients: str | None = None
    prepares: bool = False
    direct: bool = False
    own_graph: bool = False
    self_tested: bool = False
    costs: str = ""


_TILED_COSTS = "tiled PyTorch is as exact, and several times slower than a kernel"

# Slowest first. The CUDA kernels lose "by_name_only" where a committed measurement shows them right and ahead: on those
# devices, dtypes and lengths. There is none yet.
REGISTRY = {
    "reference": Backend(".impl.reference", by_name_only=True, own_graph=True),
    "torch": Backend(".impl.torch_tiled", costs=_TILED_COSTS),
    "cpu": Backend(".impl.cpu", ("cpu",), prepares=True, direct=True),
    "triton": Backend(".impl.triton", ("cuda",), prepares=True, self_tested=True),
    "cuda": Backend(".impl.cuda", ("cuda",), by_name_only=True, gradients="triton", prepares=True, self_tested=True),
}
BACKENDS = tuple(REGISTRY)


@cache
def order(device_type: str) -> tuple[str, ...]:
    """Return what backend="auto" tries on a device type, best first."""
    return tuple(
        name
        for name, row in reversed(REGISTRY.items())
        if not row.by_name_only and (row.devices is None or device_type in row.devices)
    )
