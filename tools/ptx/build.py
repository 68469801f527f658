"""Compile the machine: cpp/ with the cases that the table of opcodes makes."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ptx.instructions import HANDLERS
from ptx.opcodes import CPP_TYPES, OPCODES, Opcode

__all__ = ["NoCompiler", "compiler", "library", "made_once", "numbers"]

_SOURCES = Path(__file__).resolve().parent / "cpp"
_BUILD = Path(__file__).resolve().parents[2] / "build" / "ptx"
# Sums round after every step, as the instructions say; what is fused is written as fused.
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-fPIC",
    "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers",
)  # fmt: skip


class NoCompiler(RuntimeError):
    """There is no C++ compiler on this machine."""


def compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, else g++, c++ or clang++ on the PATH.

    Raises:
        NoCompiler: there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    names = given[:1] or ["g++", "c++", "clang++"]
    if found := next(filter(None, map(shutil.which, names)), None):
        return [found, *given[1:]]
    named = " or ".join(names)
    raise NoCompiler(f"the PTX machine needs a C++ compiler, and there is no {named}; install g++ or set CXX")


def _distinct() -> dict[Opcode, int]:
    """Return a number for each scalar computation; mov.b32 and mov.f32 are one."""
    found: dict[tuple[tuple[str, ...], str], int] = {}
    return {o: found.setdefault((o.types, o.expression), len(found)) for o in OPCODES.values()}


@cache
def numbers() -> dict[str, int]:
    """Return the number in the machine of every scalar opcode and handler."""
    scalar = _distinct()
    first = max(scalar.values()) + 1
    return {
        **{name: scalar[opcode] for name, opcode in OPCODES.items()},
        **{handler: first + i for i, handler in enumerate(HANDLERS)},
    }


def cases() -> str:
    """Return the generated header."""
    known = numbers()
    lines = ["#if defined(CASE)"]
    done = set()
    for name, opcode in OPCODES.items():
        if (number := known[name]) in done:
            continue
        done.add(number)
        result, *sources = (CPP_TYPES[kind] for kind in opcode.types)
        parameters = ", ".join(f"{kind} {letter}" for kind, letter in zip(sources, "abcd"))
        signature = f"{result}({', '.join(sources)})"
        # The section is for whoever reads the generated file.
        lines.append(f"// {name}: {opcode.section}")
        lines.append(f"EACH({number}, {signature}, ({parameters}), ({opcode.expression}))")
    lines += [f"CASE({known[handler]}, {handler})" for handler in HANDLERS]
    lines += [
        "#else",
        f"constexpr int kCopyOpcode = {known['mov.b32']}, kProductOpcode = {known['do_product']};",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


@cache
def library() -> ctypes.CDLL:
    """Load the machine, compiled before unless this very source has been.

    Raises:
        NoCompiler: there is no compiler.
        RuntimeError: the compiler fails, or the build folder cannot be written.
    """
    header = cases()
    sources = sorted(_SOURCES.glob("*"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    digest = hashlib.sha256(repr((compiler(), _FLAGS, header, text, _processor())).encode()).hexdigest()[:16]

    def compile_to(target: Path) -> None:
        generated = target.with_name("opcodes.h")
        generated.write_text(header, encoding="utf-8")
        main = _SOURCES / "machine.cpp"
        command = [*compiler(), *_FLAGS, f'-DOPCODES_H="{generated}"', str(main), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not target.exists():
            what = done.stderr[:4000] or f"it returned {done.returncode} and said nothing"
            raise RuntimeError(f"the PTX machine does not compile with {shlex.join(compiler())}; set CXX:\n{what}")

    return ctypes.CDLL(str(made_once(f"machine-{digest}.so", compile_to)))


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return a file of the build folder, which `make` writes unless it is there; other processes wait meanwhile.

    Raises:
        RuntimeError: it is not there, and the folder cannot be written.
    """
    target = _BUILD / name
    if target.exists():
        return target
    try:
        _BUILD.mkdir(parents=True, exist_ok=True)
        with (_BUILD / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=_BUILD) as folder:
                    make(Path(folder) / name)
                    os.replace(Path(folder) / name, target)
    except OSError as error:
        why = f"{name} is to be made in {_BUILD}, which fails ({error}); let that folder be written"
        raise RuntimeError(why) from error
    return target


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")
