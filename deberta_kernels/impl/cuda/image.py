"""The compiled module of a dtype and head size: built with the wheel, kept by an earlier process, or compiled now.

The sources, and what nvcc made of them when the wheel was built, lie in the package's `lib/cuda`; `build.json` beside
them says what belongs together. Everything is held to its digest before the driver sees it. A package that is imported
from a checkout has its sources in `csrc/cuda`, and needs no build.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from deberta_kernels import dtypes
from deberta_kernels.impl import cache
from deberta_kernels.impl.cuda import modules, nvrtc
from deberta_kernels.impl.cuda.arguments import Info
from deberta_kernels.impl.cuda.modules import ModuleSpec

__all__ = ["DTYPES", "ImageError", "compiled", "images", "info_of", "packaged", "spec_of", "status"]

DTYPES = tuple(dtype for dtype, name in dtypes.SHORT_NAMES.items() if name in modules.DTYPES)

_FOLDER = Path(__file__).resolve().parents[2] / "lib" / "cuda"
_CHECKOUT = Path(__file__).resolve().parents[3]
AnInfo = TypeVar("AnInfo", bound=Info)
_lock = threading.Lock()
# Modules compiled by this process that the cache could not take.
_unwritten: dict[str, bytes] = {}
_logger = logging.getLogger(__name__)


class ImageError(RuntimeError):
    """A compiled module is not there, or cannot be trusted."""


def spec_of(which: str, dtype: torch.dtype, head_dim: int) -> ModuleSpec:
    """Return what the module of "forward" or "backward" is compiled for."""
    return ModuleSpec(which, dtypes.short_name(dtype), head_dim)


def images(which: str, dtype: torch.dtype, head_dim: int) -> Iterator[bytes | ImageError]:
    """Yield the compiled module of "forward" or "backward", best source first, or why a source has none.

    Nothing is compiled before it is due.
    """
    for find in (packaged, compiled):
        try:
            yield find(which, dtype, head_dim)
        except (ImageError, nvrtc.NvrtcError, OSError) as error:
            # What it was raised from tells whether it may pass.
            found = ImageError(str(error))
            found.__cause__ = error
            yield found


def packaged(which: str, dtype: torch.dtype, head_dim: int) -> bytes:
    """Return the module that was built with the wheel.

    Raises:
        ImageError: there is none, it is damaged, or it was built from other sources.
    """
    name = f"{spec_of(which, dtype, head_dim).name}.cubin"
    record = _record()
    if name not in record.get("cubins", {}):
        raise ImageError("no CUDA module was built with the package")
    if record.get("sources") != {file: _sha256(text.encode()) for file, text in _sources().items()}:
        raise ImageError(f"{name} was built from other sources")
    try:
        content = (_FOLDER / name).read_bytes()
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror})") from error
    if _sha256(content) != record["cubins"][name]:
        raise ImageError(f"{name} is damaged: its digest is not that of the build")
    return content


def compiled(which: str, dtype: torch.dtype, head_dim: int) -> bytes:
    """Return the module as NVRTC compiles it, from the private cache where an earlier process left it there.

    Raises:
        ImageError: the sources are not in the package.
        NvrtcError: NVRTC is not there, or does not compile them.
    """
    spec, sources = spec_of(which, dtype, head_dim), _sources()
    main = spec.source
    if main not in sources:
        raise ImageError(f"the CUDA sources are not in the package ({_source_folder()} holds none)")
    options = (*modules.NVRTC_FLAGS, *spec.definitions)
    with _lock:
        compiler = _compiler()
        digest = _sha256(json.dumps([compiler.version, main, options, sources], sort_keys=True).encode())
        name = f"{spec.name}_{digest[:32]}.cubin"
        if name in _unwritten:
            return _unwritten[name]
        made = None
        try:
            made = cache.read(name)
            if made is None:
                made = compiler.cubin(sources, main, options)
                cache.write(name, made)
        except cache.CacheError as error:
            _logger.warning("the CUDA kernels are compiled anew in every process: %s", error)
            # Kept here, since loading them may fail, and be tried again.
            made = _unwritten[name] = made if made is not None else compiler.cubin(sources, main, options)
        return made


def info_of(cubin: bytes, layout: type[AnInfo]) -> AnInfo:
    """Return what a compiled module says of itself; no device is needed.

    Raises:
        ImageError: the module is damaged, or made for another version of the package.
    """
    try:
        info = layout(*modules.constants(cubin))
    except (struct.error, IndexError, ValueError) as error:
        raise ImageError(f"the CUDA module is damaged ({error})") from error
    if info.abi_version != layout.VERSION:
        raise ImageError(f"the CUDA module has version {info.abi_version} of its arguments, not {layout.VERSION}")
    return info


def status() -> dict[str, Any]:
    """Describe what there is to load.

    Returns:
        "built": names of the modules that came with the package; "nvcc": the compiler's version, or None; "sources":
        whether the sources are in the package; "nvrtc": version of NVRTC, or why it cannot be used.
    """
    record, sources = _record(), _sources()
    try:
        found = ".".join(map(str, _compiler().version))
    except nvrtc.NvrtcError as error:
        found = str(error)
    return {
        "built": sorted(record.get("cubins", {})), "nvcc": record.get("nvcc"),
        "sources": all(spec.source in sources for spec in modules.MODULES), "nvrtc": found,
    }  # fmt: skip


@lru_cache(maxsize=1)
def _compiler() -> nvrtc.Compiler:
    return nvrtc.Compiler()


def _record() -> dict[str, Any]:
    try:
        found = json.loads((_FOLDER / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _source_folder() -> Path:
    """Return the folder of the sources: in a checkout its own, of which those in the package are perhaps old copies."""
    own = _CHECKOUT / "csrc" / "cuda"
    return own if own.is_dir() and (_CHECKOUT / "pyproject.toml").is_file() else _FOLDER


def _sources() -> dict[str, str]:
    paths = sorted(path for path in _source_folder().glob("*.*") if path.suffix in (".h", ".cu"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
