"""Which variants are known to be right on which device: by a committed result, or by a self-test of this user's.

A proof is worth what it was made with, so it is kept under the names and versions of everything that takes part, the
digest of the kernels' source included; where one of them changes, nothing is known.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from deberta_kernels import __version__, dtypes
from deberta_kernels.impl import cache
from deberta_kernels.proof.variants import Variant

__all__ = ["covered", "covers", "described", "identity", "keep", "kept", "known"]

Identity = dict[str, Any]

_PACKAGE = Path(__file__).resolve().parents[1]
# Backend: what it is made of. What was built of the CUDA sources is listed with its digests in build.json; a checkout
# takes them from its own folder.
_SOURCES = {"triton": ("impl/triton",), "cuda": ("impl/cuda", "lib/cuda", "../csrc/cuda")}
_SHARED = ("impl/common.py", "impl/gpu_tables.py", "dropout.py", "position.py")
_SUFFIXES = (".py", ".json", ".h", ".cu")
# What a row of it must name at least: another device, or other kernels, are not proven by it.
_NAMED = {"backend", "device", "capability", "kernels"}
_COVERED = _PACKAGE / "proof" / "covered.json"
_PREFIX = "self_test_"
# Without a folder that can be trusted, or on a system that has no such thing, nothing is kept and nothing is said.
_NO_CACHE = (cache.CacheError, OSError, AttributeError)


def identity(backend: str, device: torch.device) -> Identity:
    """Return what a proof of a backend on a device depends on, by name."""
    return {"backend": backend, **_device(device), **_versions(), "kernels": _digest(backend)}


def described(found: Identity) -> str:
    """Return the device and the versions of an identity in words."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("deberta_kernels", "torch", "triton", "cuda", "driver"))
    return f"{found['device']} of capability {found['capability']}, {versions}"


@lru_cache(maxsize=32)
def _device(device: torch.device) -> Identity:
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    if torch.version.hip is not None:
        capability = str(properties.gcnArchName).split(":")[0]
    return {"device": properties.name, "capability": capability}


@lru_cache(maxsize=1)
def _versions() -> Identity:
    triton = "none"
    for package in ("triton", "pytorch-triton-rocm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            triton = importlib.metadata.version(package)
            break
    return {
        "deberta_kernels": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver(),
    }


def _driver() -> str:
    """Return the version of the NVIDIA driver where Linux says it, else the newest CUDA that it supports."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text):
            return found[0]
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if version is None else str(version())


@lru_cache(maxsize=8)
def _digest(backend: str) -> str:
    """Return the digest of the source that a backend is made of."""
    paths = [_PACKAGE / name for name in _SHARED]
    for folder in _SOURCES[backend]:
        paths += (_PACKAGE / folder).resolve().rglob("*")
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in _SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE.parent).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


# ---- Committed results


@lru_cache(maxsize=1)
def covered() -> list[Identity]:
    """Return what committed results prove; docs/gpu.md says how one gets here."""
    rows: list[Identity] = json.loads(_COVERED.read_text(encoding="utf-8"))
    return rows


def covers(row: Identity, found: Identity) -> bool:
    """Tell whether a row of `covered` is about an identity: all that it names is the same, but for its result."""
    return row.keys() >= _NAMED and all(found.get(name) == value for name, value in row.items() if name != "result")


# ---- Self-tests of this user's


def known(variant: Variant, found: Identity) -> bool:
    """Tell whether a variant need not be tested."""
    if any(covers(row, found) for row in covered()):
        return True
    name, content = _file(variant, found)
    with suppress(*_NO_CACHE):
        return cache.read(name) == content
    return False


def keep(variant: Variant, found: Identity) -> None:
    """Keep that a variant is right; where that is not possible, every process tests it."""
    with suppress(*_NO_CACHE):
        cache.write(*_file(variant, found))


def kept() -> int:
    """Return how many proofs are kept, of any device and version."""
    with suppress(*_NO_CACHE):
        return sum(name.startswith(_PREFIX) for name in cache.names())
    return 0


def _file(variant: Variant, found: Identity) -> tuple[str, bytes]:
    """Return the name and the content of the file that says so."""
    named = {**variant._asdict(), "dtype": dtypes.name(variant.dtype)}
    content = json.dumps({**found, "variant": named}, sort_keys=True).encode()
    return _PREFIX + hashlib.sha256(content).hexdigest()[:32], content
