"""CUDA graphs: what cannot happen while one is captured, and memory that outlives the call that allocates it.

A capture records launches and nothing else: no kernel can be compiled or loaded, nothing copied from ordinary memory of
the host, no value read. And whatever is allocated while a graph is captured, or while `torch.compile` warms one up
(`mode="reduce-overhead"`), comes from the graph's own memory, which the graph takes as its own after the call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deberta_kernels.torch_state.apart import apart

__all__ = ["CaptureError", "capturing", "check_not_capturing", "kept_on_device"]

_Made = TypeVar("_Made")


class CaptureError(RuntimeError):
    """A call under a CUDA graph's capture that needs what a capture cannot do; after a call outside it succeeds."""


def capturing(device: torch.device) -> bool:
    """Tell whether the current stream of a device is captured into a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device, work: str) -> None:
    """Check that a device can do what a capture cannot, before anything is touched that would invalidate the graph.

    Args:
        device: where the call runs.
        work: what has to be done, as the end of "the first call ... has to".

    Raises:
        CaptureError: a CUDA graph is being captured.
    """
    if capturing(device):
        raise CaptureError(
            f"a CUDA graph is being captured on {device}, but the first such call has to {work}, which no capture can "
            "do; make a call like it before the capture: same shapes, dtype, masks and dropout, backward included."
        )


def kept_on_device(most: int) -> Callable[[Callable[..., _Made]], Callable[..., _Made]]:
    """Keep what a function makes on a device for later calls, on any stream, and in memory that is no graph's.

    It is made in a thread of its own, see `apart`: graphs take what their thread allocates. What a captured graph reads
    is kept for the life of the process, for replays follow its addresses.

    Args:
        most: values kept; the oldest makes room, once its device has finished what may read it.

    Returns:
        a decorator of functions whose first argument is a torch.device, and whose arguments can be hashed. The function
        must have finished all work on the device when it returns.
    """

    def decorate(make: Callable[..., _Made]) -> Callable[..., _Made]:
        kept: dict[tuple[Any, ...], _Made] = {}
        read_by_graphs: dict[tuple[Any, ...], _Made] = {}
        lock = threading.Lock()

        @functools.wraps(make)
        def find(device: torch.device, *arguments: Any) -> _Made:
            key = (device, *arguments)
            found = kept.get(key)
            if found is None:
                found = read_by_graphs.get(key)
            if found is None:
                check_not_capturing(device, f"put {make.__name__.strip('_').replace('_', ' ')} on the device")
                with lock:
                    found = kept.get(key)
                    if found is None:
                        if len(kept) >= most:
                            _drop_oldest(kept)
                        found = kept[key] = apart(make, *key)
            elif capturing(device):
                read_by_graphs[key] = found
            return found

        return find

    return decorate


def _drop_oldest(kept: dict[tuple[Any, ...], Any]) -> None:
    key = next(iter(kept))
    if key[0].type == "cuda":
        torch.cuda.synchronize(key[0])  # a kernel on a stream that the allocator does not know of may still read it
    del kept[key]
