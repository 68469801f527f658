"""What goes wrong around a build: killed in the middle, compilers that lie or babble, read-only checkouts."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from tests.checkout import ROOT, build, native_build

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on the PATH")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    (sources / "kernel.cpp").write_text("int DK_VARIANT() { return 1; }\n")
    (sources / "dispatch.cpp").write_text(
        '#include "value.h"\nextern "C" __attribute__((visibility("default"))) int value() { return VALUE; }\n'
    )
    (tmp_path / "csrc" / "value.h").write_text("#define VALUE 7\n")
    return native_build.Layout(sources, tmp_path / "csrc", tmp_path / "lib" / native_build.LIBRARY_NAME)


def compiler(folder, monkeypatch, script):
    """Put a compiler in place that runs `script`; "$real" is a real one."""
    real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    path = folder / "compiler"
    path.write_bytes(b"#!/bin/sh\nreal=" + str(real).encode() + b"\n" + script + b"\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def content(layout):
    return hashlib.sha256(layout.library.read_bytes()).hexdigest()


@needs_compiler
@needs_fork
def test_a_build_killed_between_its_files_is_not_taken_for_the_one_recorded(layout):
    native_build.build_library(layout)
    first, header = content(layout), layout.include / "value.h"
    header.write_text("#define VALUE 8\n")
    child = os.fork()
    if child == 0:
        put = native_build.put_in_place

        def killed(path, target):
            if target == layout.record:
                os.kill(os.getpid(), signal.SIGKILL)
            put(path, target)

        native_build.put_in_place = killed
        native_build.build_library(layout)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert content(layout) != first
    header.write_text("#define VALUE 7\n")
    assert native_build.build_library(layout)["is_new"]
    assert content(layout) == first
    assert sorted(path.name for path in layout.library.parent.iterdir()) == ["build.json", native_build.LIBRARY_NAME]


def test_the_folder_of_a_build_that_runs_is_left_alone(tmp_path):
    (tmp_path / ".build-killed").mkdir()
    with native_build.build_folder(tmp_path) as first:
        with native_build.build_folder(tmp_path) as second:
            assert sorted(tmp_path.iterdir()) == sorted([first, second])
        assert list(tmp_path.iterdir()) == [first]
    assert list(tmp_path.iterdir()) == []


LINKS = b'case " $* " in *" -shared "*) %b;; esac\nexec $real "$@"'
KERNEL = b'case " $* " in *kernel.cpp*) exit 0;; esac\nexec $real "$@"'
TO_OUTPUT = b'while [ "$1" != -o ]; do shift; done; echo garbage > "$2"; exit 0'


@needs_compiler
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (LINKS % b"exit 0", "of the library it should write: it is missing"),
        (LINKS % TO_OUTPUT, "of the library it should write: it is no ELF library"),
        (KERNEL, "variant generic: the compiler reported no error and wrote nothing"),
    ],
    ids=["no library", "no ELF", "no object"],
)
def test_a_compiler_that_reports_no_error_is_not_believed(layout, tmp_path, monkeypatch, script, message):
    compiler(tmp_path, monkeypatch, script)
    with pytest.raises(native_build.BuildError, match=message):
        native_build.build_library(layout)
    assert not layout.library.exists()
    assert not build.build_or_warn(layout)


@needs_compiler
def test_what_a_compiler_says_need_not_be_text(layout, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, b'[ "$1" = --version ] && printf "\\377\\376 1.0" && exit\nexec $real "$@"')
    assert native_build.build_library(layout)["is_new"]
    compiler(tmp_path, monkeypatch, b'[ "$1" = --version ] && exit\nprintf "\\377\\376 refused" >&2; exit 1')
    with pytest.raises(native_build.BuildError, match="refused"):
        native_build.build_library(layout)


def test_a_compiler_that_is_no_command_is_named(layout, monkeypatch):
    monkeypatch.setenv("CXX", '"')
    with pytest.raises(native_build.BuildError, match="CXX is '\"', which is no command"):
        native_build.find_compiler()
    assert not build.build_or_warn(layout)


@pytest.fixture
def cuda_folders(tmp_path):
    (tmp_path / "sources").mkdir()
    for name in ("forward.cu", "backward.cu", "params.h"):
        (tmp_path / "sources" / name).write_text(name * 10_000)
    return tmp_path / "sources", tmp_path / "lib"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "nvcc --version says nothing; point NVCC"),
        ('[ "$1" = --version ] && echo "release 13.0"; exit 0', "nvcc reported no error and wrote nothing"),
    ],
)
def test_an_nvcc_that_reports_no_error_is_not_believed(cuda_folders, tmp_path, monkeypatch, script, message):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    with pytest.raises(native_build.BuildError, match=message):
        build.build_cubins(*cuda_folders)


def test_what_the_system_refuses_leaves_an_install_without_cuda_modules(monkeypatch, capsys):
    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "build_cubins", refuse)
    monkeypatch.setattr(build, "copy_cuda_sources", refuse)
    build.build_cubins_or_say()
    build.copy_cuda_sources_or_say()
    said = capsys.readouterr().err
    assert "no CUDA kernels built: [Errno 28]" in said
    assert "WARNING: the CUDA sources could not be copied: [Errno 28]" in said


def test_a_library_that_cannot_be_deleted_is_said(layout, monkeypatch, capsys):
    def refuse(layout):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build, "remove_library", refuse)
    monkeypatch.setenv(build.SKIP_VARIABLE, "1")
    assert not build.build_or_warn(layout)
    assert "WARNING: an earlier native library could not be deleted: [Errno 30]" in capsys.readouterr().err


def test_cuda_sources_that_are_there_are_not_written_again(cuda_folders, monkeypatch):
    """A checkout whose build is up to date may be read-only."""
    digests = build.copy_cuda_sources(*cuda_folders)
    before = {path: path.stat().st_mtime_ns for path in cuda_folders[1].iterdir()}

    def refuse(*arguments, **named):
        raise OSError(30, "Read-only file system")

    for name in ("build_folder", "put_in_place"):
        monkeypatch.setattr(build, name, refuse)
    monkeypatch.setattr(build.Path, "write_bytes", refuse)
    assert build.copy_cuda_sources(*cuda_folders) == digests
    assert {path: path.stat().st_mtime_ns for path in cuda_folders[1].iterdir()} == before


def test_a_reader_never_sees_half_a_copy(cuda_folders):
    sources, target = cuda_folders
    build.copy_cuda_sources(sources, target)
    texts = ["a" * 3_000_000, "b" * 3_000_000]
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add((target / "params.h").stat().st_size)

    (sources / "params.h").write_text(texts[0])
    build.copy_cuda_sources(sources, target)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(20):
            (sources / "params.h").write_text(texts[turn % 2])
            build.copy_cuda_sources(sources, target)
    finally:
        stop.set()
        reader.join()
    assert seen == {3_000_000}


@needs_compiler
def test_a_build_that_is_up_to_date_writes_nothing(monkeypatch):
    """The command itself, in this checkout."""
    monkeypatch.delenv("CXX", raising=False)
    whole, platform = native_build.Layout(), native_build.sysconfig.get_platform()
    if not native_build.is_built(whole, native_build.digest(whole, native_build.find_compiler(), platform), platform):
        pytest.skip("the native library of this checkout is not up to date")
    watched = [native_build.Layout().library.parent, native_build.Layout().library, *build.CUDA_TARGET.glob("*.cu")]
    before = [path.stat().st_mtime_ns for path in watched]
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_native"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in watched] == before
