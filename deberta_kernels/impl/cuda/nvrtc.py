"""NVRTC, which PyTorch's CUDA builds bring along: CUDA C++ compiled at run time."""

from __future__ import annotations

import ctypes
import importlib.util
from contextlib import suppress
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch

__all__ = ["Compiler", "NvrtcError", "libraries"]

# The first to know sm_90a.
_OLDEST = (12, 0)
_MAJORS = (13, 12)
_OUT_OF_MEMORY = 1  # NVRTC_ERROR_OUT_OF_MEMORY of nvrtc.h
# The end of the compiler's log is where its last error stands; a template's errors can be megabytes.
_LOG_CHARACTERS = 2000
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
}


class NvrtcError(RuntimeError):
    """A program that NVRTC does not compile, or NVRTC that is not there.

    Attributes:
        passing: the same call may succeed later.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.passing = status == _OUT_OF_MEMORY


def libraries() -> list[str]:
    """Return what may be NVRTC, best first: of torch's own CUDA, by name for the loader, then in NVIDIA's wheels."""
    own = (torch.version.cuda or "").split(".")[0]
    majors = sorted(_MAJORS, key=lambda major: str(major) != own)
    found = [f"libnvrtc.so.{major}" for major in majors]
    for major in majors:
        found += _in_wheels(f"libnvrtc.so.{major}")
    return found


def _in_wheels(name: str) -> list[str]:
    wheels = importlib.util.find_spec("nvidia")
    places = list(wheels.submodule_search_locations or ()) if wheels else []
    return [str(path) for place in places for path in sorted(Path(place).glob(f"*/lib/{name}"))]


class Compiler:
    """NVRTC, opened.

    Attributes:
        version: (major, minor).
    """

    def __init__(self) -> None:
        """Open the first that is there and not too old.

        Raises:
            NvrtcError: there is none.
        """
        for name in libraries():
            try:
                self._handle = ctypes.CDLL(name)
                for function, types in _SIGNATURES.items():
                    getattr(self._handle, function).argtypes = types
            except (OSError, AttributeError):
                continue
            major, minor = c_int(), c_int()
            self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
            self.version = major.value, minor.value
            if self.version >= _OLDEST:
                self._load_builtins(name)
                return
        raise NvrtcError("NVRTC is not there (pip install nvidia-cuda-nvrtc, or a CUDA build of PyTorch)")

    def _load_builtins(self, library: str) -> None:
        """Load what NVRTC opens by its bare name at the first program: the loader finds it once it is loaded.

        NVIDIA's wheels lie where the loader does not look, and only PyTorch's CUDA builds load from there.
        """
        name = "libnvrtc-builtins.so.{}.{}".format(*self.version)
        for candidate in (name, str(Path(library).with_name(name)), *_in_wheels(name)):
            with suppress(OSError):
                self._builtins = ctypes.CDLL(candidate)
                return

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._handle, name)(*arguments)
        if status:
            raise NvrtcError(f"{name} failed with status {status}", status)

    def cubin(self, sources: dict[str, str], main: str, options: tuple[str, ...]) -> bytes:
        """Compile a program.

        Args:
            sources: text of every file, by the name that others include it with.
            main: the file to compile.
            options: of the compiler.

        Raises:
            NvrtcError: it does not compile; the message ends with the compiler's.
        """
        headers = {name.encode(): text.encode() for name, text in sources.items() if name != main}
        program, count = c_void_p(), len(headers)
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), sources[main].encode(), main.encode(), count,
            (c_char_p * count)(*headers.values()), (c_char_p * count)(*headers),
        )  # fmt: skip
        try:
            given = (c_char_p * len(options))(*(option.encode() for option in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), given)
            except NvrtcError as error:
                raise NvrtcError(f"{error}: {self._text(program, 'ProgramLog').decode(errors='replace')}") from error
            return self._text(program, "CUBIN")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _text(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw if what == "CUBIN" else buffer.value.strip()[-_LOG_CHARACTERS:]
