"""Small files in a folder of the user's own: compiled modules, proofs. Nobody else may have a say in what is there."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from deberta_kernels import env

__all__ = ["CacheError", "names", "read", "write"]

_DIGEST_BYTES = 32


class CacheError(RuntimeError):
    """The cache cannot be used."""


@contextmanager
def _folder() -> Iterator[int]:
    """Open the folder, made if need be; what is done in it goes through this descriptor, so it cannot be exchanged."""
    path = env.cache_folder()
    if path is None:
        raise CacheError(f"no home directory is known for a cache; set {env.CACHE}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CacheError(f"the cache {path} cannot be used ({error.strerror}); set {env.CACHE}") from error
    try:
        found = os.fstat(folder)
        if found.st_uid != os.getuid():
            raise CacheError(f"the cache {path} belongs to user {found.st_uid}; set {env.CACHE}")
        if found.st_mode & 0o077:
            raise CacheError(f"the cache {path} is open to others (mode {stat.S_IMODE(found.st_mode):o}); chmod 700 it")
        yield folder
    finally:
        os.close(folder)


def read(name: str) -> bytes | None:
    """Return what was kept under a name; None when there is nothing, or nothing that can be trusted.

    Raises:
        CacheError: the folder cannot be used.
    """
    with _folder() as folder:
        try:
            # Opening a pipe that nobody writes to would wait.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            return None
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            os.close(file)
            return None
        with os.fdopen(file, "rb") as stream:
            digest, content = stream.read(_DIGEST_BYTES), stream.read()
    return content if digest == hashlib.sha256(content).digest() else None


def write(name: str, content: bytes) -> None:
    """Keep bytes under a name; a reader sees all of them or none.

    Raises:
        CacheError: the folder cannot be used or written to.
    """
    with _folder() as folder:
        half_written = f".{name}.{os.getpid()}"
        try:
            with suppress(FileNotFoundError):
                os.unlink(half_written, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(half_written, flags, 0o600, dir_fd=folder), "wb") as stream:
                stream.write(hashlib.sha256(content).digest() + content)
            os.replace(half_written, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            with suppress(OSError):  # on a full disk it would take what is left
                os.unlink(half_written, dir_fd=folder)
            raise CacheError(f"the cache cannot be written ({error.strerror}); set {env.CACHE}") from error


def names() -> list[str]:
    """Return the names of all that is kept; nothing is made for it.

    Raises:
        CacheError: the folder cannot be used.
    """
    path = env.cache_folder()
    if path is None or not os.path.isdir(path):
        return []
    with _folder() as folder:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
