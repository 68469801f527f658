"""What a test needs and a machine may lack: skip where it cannot be there, fail where it should be.

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
from deberta_kernels.native.processor import features

__all__ = ["COMPILER", "native_library", "package", "required", "vector_library"]

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
_SKIP_BUILD = "DEBERTA_KERNELS_SKIP_NATIVE"

# Packages that this run was told to have: pytest --require NAME,NAME.
required: set[str] = set()


def native_library() -> None:
    """Skip without a compiler to build the native library; where it can be built, fail unless it is loaded."""
    status = native.library_status()
    if status["loaded"]:
        return
    if COMPILER is None or os.environ.get(_SKIP_BUILD):
        pytest.skip(f"no native library: {status['reason']}", allow_module_level=True)
    pytest.fail(f"the native library does not load, `make build` says more: {status['reason']}", pytrace=False)


def vector_library() -> None:
    """Skip, beside `native_library`, on a processor for which the library has no vector instructions."""
    native_library()
    if not {"avx2", "fma", "f16c"} <= features():
        pytest.skip("this processor has no AVX2", allow_module_level=True)


def package(name: str) -> Any:
    """Import a package that only some environments have, or skip; one that is installed or required must import."""
    top = name.partition(".")[0]
    # A package that makes itself lazy may have lost its spec, but is there.
    if top not in required and top not in sys.modules and importlib.util.find_spec(top) is None:
        pytest.skip(f"{top} is not installed", allow_module_level=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
