"""Run tests on this machine with the native library for aarch64, which an emulator executes.

    make test-aarch64                                       every test of the native library, on a sample of its cases
    make test-aarch64 ARGS=--every-case                     on all of them: half an hour
    python tools/aarch64.py python -m pytest --emulated ... some of them
    python tools/aarch64.py --absence                       say what is missing for it; nothing where all is there

The library is built by a cross compiler. Python stays on this machine: tests/aarch64/proxy.cpp takes its calls to
tests/aarch64/worker.cpp, which qemu-aarch64-static runs beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc"))

import native_build  # noqa: E402  (builds do not look for modules beside this file)

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# The system that the worker is linked with, as Debian's cross compiler brings it.
SYSTEM = "/usr/aarch64-linux-gnu"
SOURCES = ROOT / "tests" / "aarch64"
FOLDER = ROOT / "build" / "aarch64"
FLAGS = ("-O2", "-std=c++17", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}")


def emulator() -> str | None:
    """Return the emulator's path, or None."""
    return next(filter(None, map(shutil.which, EMULATORS)), None)


def absence() -> str | None:
    """Return what this machine lacks, and where Debian has it; None where it lacks nothing."""
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER} (apt install g++-aarch64-linux-gnu)"
    if emulator() is None:
        return f"there is no {EMULATORS[0]} (apt install qemu-user-static)"
    return None


def build_library() -> Path:
    """Build the library with every variant; return its path."""
    layout = native_build.Layout(library=FOLDER / native_build.LIBRARY_NAME)
    with mock.patch.dict(os.environ, CXX=COMPILER):
        left_out = native_build.build_library(layout)["left_out"]
    if left_out:
        sys.exit(f"[aarch64] {COMPILER} is too old: {left_out}")
    return layout.library


def build() -> dict[str, str]:
    """Build the library, the worker and the proxy; return the environment in which Python uses them."""
    own = native_build.find_compiler()
    library, worker, proxy = build_library(), FOLDER / "worker", FOLDER / "proxy.so"
    for command in (
        [COMPILER, *FLAGS, "-fopenmp", str(SOURCES / "worker.cpp"), "-o", str(worker), "-ldl"],
        [*own, *FLAGS, "-fPIC", "-shared", "-fvisibility=hidden", str(SOURCES / "proxy.cpp"), "-o", str(proxy)],
    ):
        subprocess.run(command, check=True)
    words = (emulator(), "-cpu", "max", "-L", SYSTEM, worker, library)
    return {"DEBERTA_KERNELS_LIBRARY": str(proxy), "EMULATED_WORKER": " ".join(map(str, words))}


def main() -> None:
    """Build, and run the command that was given."""
    command, missing = sys.argv[1:], absence()
    if command == ["--absence"]:
        print(missing or "", end="\n" if missing else "")
        return
    if missing:
        sys.exit(f"[aarch64] {missing}")
    sys.exit(subprocess.run(command, env={**os.environ, **build()}, check=False).returncode)


if __name__ == "__main__":
    main()
