"""What a test needs and a machine may lack: leave it out where it cannot be there, fail where it should be.

Whether it should be there is told by facts outside the package, a compiler on the PATH or an installed distribution,
never by what the package says of itself: a package that is broken would then skip the tests that would notice.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import warnings
from typing import Any

import pytest

from deberta_kernels import native
from deberta_kernels.impl.cuda import nvrtc
from deberta_kernels.native.processor import features

__all__ = [
    "COMPILER",
    "PACKAGES",
    "cuda_absence",
    "library_absence",
    "machine_absence",
    "missing",
    "native_library",
    "package",
    "required",
    "vector_library",
]

_COMPILERS = (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")
COMPILER = next(filter(None, map(shutil.which, _COMPILERS)), None)
_SKIP_BUILD = "DEBERTA_KERNELS_SKIP_NATIVE"

# Packages that only some environments have, and the target of make that makes one with them.
PACKAGES = {
    "accelerate": "test",
    "adapters": "test-tf4",
    "bitsandbytes": "test-ecosystem",
    "fastapi": "test-serving",
    "gliner": "test-ecosystem",
    "httpx": "test-serving",
    "kernels": "test-ecosystem",
    "matplotlib": "test",
    "onnx": "test",
    "onnxruntime": "test",
    "onnxscript": "test",
    "presidio_analyzer": "test-ecosystem",
    "pyspark": "test-serving",
    "ray": "test-serving",
    "sentence_transformers": "test-ecosystem",
    "spacy": "test-ecosystem",
    "spacy_transformers": "test-ecosystem",
    "tensorflow": "test-tensorflow",
    "torchao": "test-ecosystem",
    "triton": "test-triton",
    "uvicorn": "test-serving",
}

# Packages that this run was told to have: pytest --require NAME,NAME.
required: set[str] = set()


def library_absence() -> str | None:
    """Return why this machine cannot have the native library, or None where it has it or should have it."""
    status = native.library_status()
    if status["loaded"] or (COMPILER is not None and not os.environ.get(_SKIP_BUILD)):
        return None
    return f"no native library: {status['reason']}"


def machine_absence() -> str | None:
    """Return why this machine cannot execute PTX, in the words of pytest's header, or None where it can or has to."""
    if COMPILER is not None or "compiler" in required:
        return None
    return "there is no C++ compiler (install g++ or set CXX; make test-ptx)"


def cuda_absence() -> str | None:
    """Return why the CUDA kernels' PTX cannot be made here, or None where it can or has to."""
    if "cuda_compiler" in required or shutil.which(os.environ.get("NVCC", "nvcc")):
        return None
    try:
        nvrtc.Compiler()
    except nvrtc.NvrtcError:
        return "there is no CUDA compiler (install nvidia-cuda-nvrtc, or nvcc; make test-ptx)"
    return None


def native_library() -> None:
    """Skip without a compiler to build the native library; where it can be built, fail unless it is loaded."""
    if (absence := library_absence()) is not None:
        pytest.skip(absence, allow_module_level=True)
    status = native.library_status()
    if not status["loaded"]:
        pytest.fail(f"the native library does not load, `make build` says more: {status['reason']}", pytrace=False)


def vector_library() -> None:
    """Skip, beside `native_library`, on a processor for which the library has no vector instructions."""
    native_library()
    if not {"avx2", "fma", "f16c"} <= features():
        pytest.skip("this processor has no AVX2", allow_module_level=True)


def missing(name: str) -> bool:
    """Tell whether a package, or the one that a module is in, is neither installed nor required."""
    top = name.partition(".")[0]
    # A package that makes itself lazy may have lost its spec, but is there.
    return top not in required and top not in sys.modules and importlib.util.find_spec(top) is None


def package(name: str) -> Any:
    """Import one of `PACKAGES`, or a module of one, or skip; one that is installed or required must import."""
    target = PACKAGES[name.partition(".")[0]]
    if missing(name):
        pytest.skip(f"{name} is not installed (make {target})", allow_module_level=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
