"""The native library as a file: sealed when it is built, looked at before it is loaded.

Loading a library that was cut off or damaged ends the process by a signal, so that has to be found out before. The
build ends the file with its seal, a line with the length and the digest of what precedes it. Loaders ignore it, and
every copy keeps it. A library without one was built by hand or rewritten by `strip` or `patchelf`: it is held to what
its ELF headers promise, which tells at least whether it is whole.

setup.py reads this file by its path, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct

__all__ = ["damage", "seal"]

_SEAL = re.compile(rb"\ndeberta_kernels: (\d+) bytes, sha256 ([0-9a-f]{64})\n\Z")
_SEAL_LENGTH = 256  # bytes, at most
_MAGIC = b"\x7fELF"
_PROGRAM_HEADER, _SECTION_HEADER = 56, 64  # bytes of one
_LOADED, _DYNAMIC = 1, 2  # types of segments
_NAMES, _NO_BYTES = 3, 8  # types of sections


def seal(content: bytes) -> bytes:
    """Return what the build appends to a library of this content; nothing for other formats than ELF."""
    if not content.startswith(_MAGIC):
        return b""
    return b"\ndeberta_kernels: %d bytes, sha256 %s\n" % (len(content), _digest(content))


def damage(path: str | os.PathLike[str], *, foreign: bool = False) -> str | None:
    """Return why the file cannot be a library that this process may load, a clause; None where nothing speaks against.

    Args:
        path: of the library, or of what is in its place.
        foreign: it was cross-compiled, for another processor than this one.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file"
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return f"it is a link to {os.readlink(path)}, which is missing" if os.path.islink(path) else "it is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not content:
        return "it is empty"
    if not content.startswith(_MAGIC):
        return "it is no ELF library" if _own_header() else None
    return _damage_of_seal(content) or _damage_of_elf(content, foreign)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _damage_of_seal(content: bytes) -> str | None:
    found = _SEAL.search(content[-_SEAL_LENGTH:])
    if found is None:
        return None
    length = len(content) - len(found[0])
    if length != int(found[1]):
        return f"it was built with {int(found[1])} bytes and now has {length}"
    if _digest(content[:length]) != found[2]:
        return "its content is not what was built: the digest differs"
    return None


def _own_header() -> bytes:
    """Return the first bytes of the running program's ELF file; nothing where programs are in another format."""
    try:
        with open("/proc/self/exe", "rb") as file:
            header = file.read(64)
    except OSError:
        return b""
    return header if header.startswith(_MAGIC) else b""


def _damage_of_elf(content: bytes, foreign: bool) -> str | None:
    if len(content) < 64:
        return "it is cut off within its first header"
    own = _own_header()
    if own and not foreign and content[4:6] + content[18:20] != own[4:6] + own[18:20]:
        return "it was built for another kind of processor"
    if content[4] != 2:  # not 64 bits
        return None
    order = "<" if content[5] == 1 else ">"
    (kind,) = struct.unpack_from(order + "H", content, 16)
    programs, sections = struct.unpack_from(order + "QQ", content, 32)
    program_size, program_count, section_size, section_count, names = struct.unpack_from(order + "5H", content, 54)
    if kind != 3:
        return "it is an ELF file of another kind than a shared library"
    if program_size != _PROGRAM_HEADER or (section_count and section_size != _SECTION_HEADER):
        return "its headers are damaged"
    last = max(programs + program_size * program_count, sections + section_size * section_count)
    if last <= len(content):  # the headers themselves are there
        loaded = [
            struct.unpack_from(order + "I4xQ16xQ", content, programs + program_size * i) for i in range(program_count)
        ]
        named = [
            struct.unpack_from(order + "4xI16xQQ", content, sections + section_size * i) for i in range(section_count)
        ]
        if not {_LOADED, _DYNAMIC} <= {part[0] for part in loaded} or (
            named and named[names % len(named)][0] != _NAMES
        ):
            return "its headers are damaged"
        ends = [start + size for kind, start, size in loaded + named if kind != _NO_BYTES]
        last = max(last, *ends)
    return None if last <= len(content) else f"it is cut off: {last} bytes are described, {len(content)} are there"
