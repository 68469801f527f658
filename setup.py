"""Build the package together with its native CPU library.

The metadata stands in pyproject.toml; this file only adds `build_native`, which every kind of install runs: plain
compiler calls, once per instruction set, linked into one shared library with a C interface. It needs no torch header
and is tied to no Python version, so the wheel is tagged py3-none-<platform>. Without a working compiler the install
still succeeds, with a warning, and the package computes on its PyTorch path.

The sources of the CUDA kernels are copied into the package, where NVRTC compiles them when they are needed. A wheel
also gets them compiled, by nvcc, where that is asked for: it takes a minute.

    python setup.py build_native            build in place, skip what is up to date, warn on failure
    python setup.py build_native --strict   the same, but fail with the compiler's message
    python setup.py build_native --cuda     compile the CUDA kernels as well, if nvcc is there
    python setup.py build_native --sanitize build under AddressSanitizer and UndefinedBehaviorSanitizer instead, into
                                            build/sanitized, for `make test-sanitized`

Environment: CXX (compiler, default c++ then g++ then clang++), NVCC (default nvcc), DEBERTA_KERNELS_SKIP_NATIVE=1 (do
not build), DEBERTA_KERNELS_BUILD_CUDA=1 (compile the CUDA kernels into a wheel). The compiler
calls are in csrc/native_build.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tools")]

from index_page import index_page  # noqa: E402  (builds do not look for modules beside this file)
from native_build import (  # noqa: E402
    SANITIZED,
    BuildError,
    Layout,
    build_folder,
    build_library,
    package_file,
    put_in_place,
    read_record,
    record_absence,
    remove_library,
    run_compiler,
)

SKIP_VARIABLE = "DEBERTA_KERNELS_SKIP_NATIVE"
CUDA_VARIABLE = "DEBERTA_KERNELS_BUILD_CUDA"
OLDEST_SETUPTOOLS = 77
CUDA_SOURCES = ROOT / "csrc" / "cuda"
CUDA_TARGET = ROOT / "deberta_kernels" / "lib" / "cuda"
CUDA = package_file("impl/cuda/modules.py")


def copy_cuda_sources(sources: Path = CUDA_SOURCES, target: Path = CUDA_TARGET) -> dict[str, str]:
    """Copy the CUDA sources into the package, and delete copies of those that are gone; return their digests."""
    found = {path.name: path.read_bytes() for path in sorted(sources.glob("*")) if path.suffix in {".h", ".cu"}}
    for path in target.glob("*"):
        if path.suffix in {".h", ".cu"} and path.name not in found:
            path.unlink(missing_ok=True)
    # Nothing is written where nothing differs: the checkout may be read-only, and others may be reading.
    paths = {target / name: content for name, content in found.items()}
    changed = {
        path: content for path, content in paths.items() if not (path.is_file() and path.read_bytes() == content)
    }
    if changed:
        target.mkdir(parents=True, exist_ok=True)
        with build_folder(target) as folder:
            for path, content in changed.items():
                (folder / path.name).write_bytes(content)
                put_in_place(folder / path.name, path)
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def holds(target: Path, cubins: Any) -> bool:
    """Tell whether every CUDA module is in the folder with the digest that `cubins` records for it."""
    if not isinstance(cubins, dict) or list(cubins) != cubin_names():
        return False
    paths = {target / name: recorded for name, recorded in cubins.items()}
    return all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == paths[p] for p in paths)


def cubin_names() -> list[str]:
    """Return the file names of the CUDA modules."""
    return [f"{spec.name}.cubin" for spec in CUDA.MODULES]


def build_cubins(sources: Path = CUDA_SOURCES, target: Path = CUDA_TARGET) -> dict[str, Any]:
    """Compile the CUDA kernels with nvcc, unless those in place were compiled from exactly these sources.

    Returns:
        The record also written to build.json: sources (name -> digest), nvcc, flags, cubins (name -> digest).

    Raises:
        BuildError: no nvcc, no sources, or nvcc failed.
    """
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        raise BuildError("there is no nvcc on the PATH")
    digests = copy_cuda_sources(sources, target)
    if not digests:
        raise BuildError(f"{sources} holds no sources; build from a complete checkout or source archive")
    said = run_compiler([nvcc, "--version"], "asking nvcc for its version").strip()
    if not said:
        raise BuildError(f"{nvcc} --version says nothing; point NVCC to the nvcc of a CUDA toolkit")
    release = said.splitlines()[-1]
    record: dict[str, Any] = {"sources": digests, "nvcc": release, "flags": list(CUDA.NVCC_FLAGS)}
    path = target / "build.json"
    names, before = cubin_names(), read_record(path)
    if {**before, "cubins": None} == {**record, "cubins": None} and holds(target, before.get("cubins")):
        return before
    with build_folder(target) as folder:

        def compile_one(name: str, spec: Any) -> str:
            command = [nvcc, *CUDA.NVCC_FLAGS, *spec.definitions, "-o", f"{folder}/{name}", str(target / spec.source)]
            run_compiler(command, name)
            module = folder / name
            if not module.is_file() or not module.stat().st_size:
                raise BuildError(f"{name}: nvcc reported no error and wrote nothing")
            return hashlib.sha256(module.read_bytes()).hexdigest()

        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            record["cubins"] = dict(zip(names, pool.map(compile_one, names, CUDA.MODULES)))
        path.unlink(missing_ok=True)  # never beside modules that it does not describe
        for name in names:
            put_in_place(folder / name, target / name)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def is_set(variable: str) -> bool:
    """Tell whether an environment variable switches something on."""
    return os.environ.get(variable, "") not in ("", "0")


def say(text: str) -> None:
    """Write one line for the person installing; pip shows it with -v, and always when the build fails."""
    print(f"deberta_kernels: {text}", file=sys.stderr, flush=True)


def build_or_warn(layout: Layout | None = None, force: bool = False, strict: bool = False) -> bool:
    """Build the library in place and return whether there is one now; never raise unless `strict`."""
    if is_set(SKIP_VARIABLE):
        remove_or_say(layout, f"{SKIP_VARIABLE} was set; unset it")
        say(f"{SKIP_VARIABLE} is set: no native library, the package will use its PyTorch path")
        return False
    try:
        record = build_library(layout, force)
    except (BuildError, OSError) as error:
        remove_or_say(layout, str(error))
        if strict:
            raise SystemExit(f"deberta_kernels: {error}") from error
        say(f"WARNING: no native library: {error}")
        say("WARNING: the package works without it, on its slower PyTorch path; build it later with `make build`")
        return False
    left_out = record["left_out"]
    for name, reason in left_out.items():
        say(f"WARNING: variant {name} left out: {reason}")
    if strict and left_out:
        raise SystemExit("deberta_kernels: --strict builds every variant of this platform")
    if record["is_new"]:
        say(f"native library built with variants {record['variants']}")
    return True


def remove_or_say(layout: Layout | None, reason: str) -> None:
    """Delete an earlier library and leave the reason in its place, or say that it could not be done."""
    try:
        remove_library(layout)
        record_absence(reason, layout)
    except OSError as error:
        say(f"WARNING: an earlier native library could not be deleted: {error}")


def copy_cuda_sources_or_say() -> None:
    """Copy the CUDA sources; without them the package has no CUDA kernels, and works."""
    try:
        copy_cuda_sources()
    except OSError as error:
        say(f"WARNING: the CUDA sources could not be copied: {error}")


def build_cubins_or_say() -> None:
    """Compile the CUDA kernels where that is possible; the package works without."""
    try:
        say(f"CUDA kernels built: {', '.join(build_cubins()['cubins'])}")
    except (BuildError, OSError) as error:
        say(f"no CUDA kernels built: {error}; NVRTC compiles them when they are needed")


def build_cubins_or_leave() -> None:
    """Compile the CUDA kernels for a wheel that was asked to have them."""
    try:
        say(f"CUDA kernels built: {', '.join(build_cubins()['cubins'])}")
    except (BuildError, OSError) as error:
        raise SystemExit(f"deberta_kernels: {CUDA_VARIABLE} is set, but no CUDA kernels are built: {error}") from error


def check_setuptools(version: str) -> None:
    """Leave with what is needed where setuptools is too old to read pyproject.toml."""
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"deberta_kernels: building needs setuptools {OLDEST_SETUPTOOLS} or later, this is {version}; run "
            f"`pip install 'setuptools>={OLDEST_SETUPTOOLS}'`, or leave out --no-build-isolation"
        )


def main() -> None:
    """Hand over to setuptools with the commands that know about the library."""
    import setuptools

    check_setuptools(setuptools.__version__)
    from setuptools import Command, Distribution, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    class BuildNative(Command):
        """The command that builds the native library in place."""

        description = "build the native CPU library in place"
        user_options: ClassVar = [
            ("force", "f", "build even when up to date"),
            ("strict", None, "fail instead of warning"),
            ("cuda", None, "compile the CUDA kernels as well, if nvcc is there"),
            ("sanitize", None, "build into build/sanitized, under the sanitizers of g++, instead"),
        ]
        boolean_options: ClassVar = ["force", "strict", "cuda", "sanitize"]

        def initialize_options(self) -> None:
            self.force = self.strict = self.cuda = self.sanitize = False

        def finalize_options(self) -> None:
            pass

        def run(self) -> None:
            if self.sanitize:
                build_or_warn(SANITIZED, force=bool(self.force), strict=True)
                return
            copy_cuda_sources_or_say()
            if build_or_warn(force=bool(self.force), strict=bool(self.strict)) and self.cuda:
                build_cubins_or_say()

    class NativeDistribution(Distribution):
        """A distribution that is platform-specific exactly when the library is in the package."""

        def has_ext_modules(self) -> bool:
            return Layout().library.is_file()

    class NativeBuildPy(build_py):
        """The command that collects the package's files, after the library is built."""

        def run(self) -> None:
            self.run_command("build_native")
            super().run()

    class NativeWheel(bdist_wheel):
        """A wheel tagged for every Python: the library has a plain C interface."""

        def finalize_options(self) -> None:
            # The library decides whether the wheel is pure, so it comes first.
            self.run_command("build_native")
            super().finalize_options()

        def run(self) -> None:
            # Not where the options are finalised: an install in place does that as well, and would wait for minutes.
            if is_set(CUDA_VARIABLE):
                build_cubins_or_leave()
            super().run()

        def get_tag(self) -> tuple[str, str, str]:
            platform = super().get_tag()[2]
            return "py3", "none", platform

    commands = {"build_native": BuildNative, "build_py": NativeBuildPy, "bdist_wheel": NativeWheel}
    setup(
        cmdclass=commands,
        distclass=NativeDistribution,
        long_description=index_page(ROOT),
        long_description_content_type="text/markdown",
    )


if __name__ == "__main__":
    main()
