"""The file of the native library: whatever is in its place is named, and never ends the process."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

from deberta_kernels.native import library_file
from deberta_kernels.native.absence import INSTALLED

needs_library = pytest.mark.skipif(
    not INSTALLED.exists() or not sys.platform.startswith("linux"), reason="there is no library of ELF format"
)

USE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, deberta_kernels as dk
    from deberta_kernels import info, native
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    for _ in range(2):
        out = dk.disentangled_attention(x, x, x)
        out.sum().backward()
said = [str(warning.message) for warning in caught if "deberta" in str(warning.message)]
path = native.library_status()["path"]
print(json.dumps([path, native.unavailable(), said, dk.stats()["calls"], info.format_info()]))
"""


def use(path, folder=None):
    """Compute with the library at `path` in a process of its own; return what it says."""
    environment = {**os.environ, "DEBERTA_KERNELS_LIBRARY": str(path), "PYTHONPATH": str(INSTALLED.parents[2])}
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def content():
    return INSTALLED.read_bytes()


def unsealed():
    whole = content()
    return whole[: library_file._SEAL.search(whole).start()]


def zeroed(whole, start, stop):
    return whole[:start] + bytes(stop - start) + whole[stop:]


def with_bytes(whole, at, form, value):
    return whole[:at] + struct.pack(form, value) + whole[at + struct.calcsize(form) :]


DAMAGES = {
    "empty": (lambda: b"", "it is empty"),
    "one byte": (lambda: content()[:1], "it is no ELF library"),
    "text": (lambda: b"#!/bin/sh\nexit 1\n", "it is no ELF library"),
    "magic alone": (lambda: content()[:4], "it is cut off within its first header"),
    "half a header": (lambda: content()[:40], "it is cut off within its first header"),
    "one header": (lambda: content()[:64], "it is cut off: "),
    "cut in the middle": (lambda: content()[: len(content()) // 2], "it is cut off: "),
    "cut by a page": (lambda: content()[:-4096], "it is cut off: "),
    "cut by a byte before the seal": (lambda: unsealed()[:-1], "it is cut off: "),
    "one bit": (lambda: with_bytes(content(), 9000, "B", content()[9000] ^ 1), "the digest differs"),
    "a page of zeros": (lambda: zeroed(content(), 8192, 12288), "the digest differs"),
    "a hole": (lambda: content()[:8192] + content()[12288:], "bytes and now has"),
    "zeros to the end": (lambda: zeroed(content(), 8192, len(content())), "its headers are damaged"),
    "zeros after one header": (lambda: zeroed(content(), 64, len(content())), "its headers are damaged"),
    "another processor": (lambda: with_bytes(unsealed(), 18, "<H", 0xF3), "built for another kind of processor"),
    "32 bits": (lambda: with_bytes(unsealed(), 4, "B", 1), "built for another kind of processor"),
    "the other byte order": (lambda: with_bytes(unsealed(), 5, "B", 2), "built for another kind of processor"),
    "an object file": (lambda: with_bytes(unsealed(), 16, "<H", 1), "another kind than a shared library"),
    "endless headers": (lambda: with_bytes(unsealed(), 40, "<Q", 2**64 - 1), "it is cut off: "),
    "headers of no size": (lambda: with_bytes(unsealed(), 54, "<H", 0), "its headers are damaged"),
}


@needs_library
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(kind, tmp_path):
    make, message = DAMAGES[kind]
    (tmp_path / "library.so").write_bytes(make())
    assert message in library_file.damage(tmp_path / "library.so")


@needs_library
@pytest.mark.parametrize(
    "kind", ["empty", "cut in the middle", "cut by a page", "a page of zeros", "another processor"]
)
def test_a_damaged_library_is_named_once_and_torch_computes(kind, tmp_path):
    make, message = DAMAGES[kind]
    path = tmp_path / "library.so"
    path.write_bytes(make())
    opened, reason, warned, calls, report = use(path)
    assert opened is None
    assert (message in reason, str(path) in reason, "setup.py build_native" in reason) == (True, True, True)
    assert len(warned) == 1
    assert message in warned[0]
    assert message in report
    assert (calls["torch"], calls["cpu"]) == (2, 0)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "link.so").symlink_to("gone.so")
    os.mkfifo(tmp_path / "pipe.so")
    assert library_file.damage(tmp_path) == "it is a folder"
    assert library_file.damage(tmp_path / "missing.so") == "it is missing"
    assert library_file.damage(tmp_path / "link.so") == "it is a link to gone.so, which is missing"
    assert library_file.damage(tmp_path / "pipe.so") == "it is not a regular file"
    assert library_file.damage(tmp_path / "link.so" / "library.so").startswith("it is missing")
    for path, message in ((tmp_path, "it is a folder"), (tmp_path / "link.so", "a link to gone.so")):
        opened, reason, warned, calls, report = use(path)
        assert (opened, len(warned), calls["torch"]) == (None, 1, 2)
        assert message in reason
        assert message in report


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "library.so"
    path.write_bytes(b"x")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert library_file.damage(path) == "it cannot be read (Permission denied)"


@needs_library
def test_a_library_without_a_seal_is_loaded_where_it_is_whole(tmp_path):
    (tmp_path / "mine.so").write_bytes(unsealed())
    assert library_file.damage(tmp_path / "mine.so") is None
    assert unsealed() + library_file.seal(unsealed()) == content()


@needs_library
@pytest.mark.parametrize("name", ["mine.so", "./mine.so", "folder/../mine.so"])
def test_a_relative_path_starts_at_the_current_folder(name, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.copy(INSTALLED, tmp_path / "mine.so")
    opened, reason, warned, calls, _ = use(name, tmp_path)
    assert (opened, reason, warned) == (str(tmp_path / "mine.so"), None, [])
    assert calls["cpu"] == 2


def test_other_formats_than_elf_are_not_sealed():
    assert library_file.seal(b"\xcf\xfa\xed\xfe") == b""
