"""Where the CUDA kernels come from, without a GPU: the package's modules, the private cache; and refusals."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import threading

import pytest
import torch

from deberta_kernels import env
from deberta_kernels.impl import cache, cuda
from deberta_kernels.impl.attempts import Attempts, is_passing
from deberta_kernels.impl.cuda import driver, image
from deberta_kernels.impl.cuda.arguments import ForwardInfo
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

BF16 = torch.bfloat16
SOURCES = {"forward.cu": '#include "params.h"\n', "backward.cu": "// backward\n", "params.h": "#pragma once\n"}
CUBIN = b"\x7fELF and so on"

COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The package's folder of CUDA files, with sources and one module, and an empty cache."""
    place = tmp_path / "lib" / "cuda"
    place.mkdir(parents=True)
    for name, text in SOURCES.items():
        (place / name).write_text(text)
    (place / "forward_bf16_d64.cubin").write_bytes(CUBIN)
    record = {
        "sources": {name: digest(text.encode()) for name, text in SOURCES.items()},
        "cubins": {"forward_bf16_d64.cubin": digest(CUBIN)},
        "nvcc": "13.0",
    }
    (place / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(image, "_FOLDER", place)
    monkeypatch.setattr(image, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(image, "_unwritten", {})
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    return place


class Compiler:
    """NVRTC, of which only the calls are counted."""

    version = (13, 0)
    calls = 0

    def cubin(self, sources, main, options):
        Compiler.calls += 1
        return f"{sorted(sources)} {main} {options}".encode()


@pytest.fixture
def compiler(monkeypatch):
    Compiler.calls = 0
    monkeypatch.setattr(image, "_compiler", Compiler)
    return Compiler


def test_the_module_built_with_the_package_comes_first_and_nothing_is_compiled(folder, compiler):
    assert next(image.images("forward", BF16, 64)) == CUBIN
    assert compiler.calls == 0
    assert image.status()["built"] == ["forward_bf16_d64.cubin"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "forward_bf16_d64.cubin").write_bytes(CUBIN[:-1]), "forward_bf16_d64.cubin is damaged"),
        (lambda f: (f / "forward_bf16_d64.cubin").unlink(), "forward_bf16_d64.cubin cannot be read (No such file"),
        (lambda f: (f / "params.h").write_text("changed"), "forward_bf16_d64.cubin was built from other sources"),
        (lambda f: (f / "build.json").write_text("{"), "no CUDA module was built with the package"),
        (lambda f: (f / "build.json").unlink(), "no CUDA module was built with the package"),
    ],
    ids=["damaged", "gone", "other sources", "record damaged", "no record"],
)
def test_a_module_that_cannot_be_trusted_gives_way_to_nvrtc(folder, compiler, change, reason):
    change(folder)
    first, second = image.images("forward", BF16, 64)
    assert str(first).startswith(reason)
    assert b"--gpu-architecture=sm_90a" in second
    assert compiler.calls == 1


def test_both_passes_have_modules_of_their_own(folder, compiler, tmp_path):
    made = {which: image.compiled(which, BF16, 64) for which in ("forward", "backward")}
    assert all(f"['backward.cu', 'forward.cu', 'params.h'] {which}.cu" in text.decode() for which, text in made.items())
    kept = sorted(path.name.rsplit("_", 1)[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["backward_bf16_d64", "forward_bf16_d64"]
    first, second = image.images("backward", BF16, 64)
    assert str(first) == "no CUDA module was built with the package"
    assert second == made["backward"]
    assert compiler.calls == 2


def test_what_nvrtc_made_is_kept_for_other_processes(folder, compiler, tmp_path):
    first = image.compiled("forward", BF16, 128)
    assert image.compiled("forward", BF16, 128) == first
    assert compiler.calls == 1
    image.compiled("forward", torch.float16, 128)
    (folder / "params.h").write_text("changed")
    image.compiled("forward", BF16, 128)
    assert compiler.calls == 3
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 3
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_damaged_module_in_the_cache_is_compiled_again(folder, compiler, tmp_path):
    first = image.compiled("forward", BF16, 64)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-3])
    assert image.compiled("forward", BF16, 64) == first
    assert compiler.calls == 2
    assert image.compiled("forward", BF16, 64) == first
    assert compiler.calls == 2


def test_a_cache_that_cannot_be_used_costs_a_compilation_and_a_log_line(folder, compiler, tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert image.compiled("forward", BF16, 64)
    assert "compiled anew in every process: the cache" in caplog.text


def test_a_module_that_the_cache_cannot_take_is_compiled_once(folder, compiler, monkeypatch):
    def write(name, content):
        raise cache.CacheError("the cache cannot be written (No space left on device)")

    monkeypatch.setattr(cache, "write", write)
    first = image.compiled("forward", BF16, 64)
    assert image.compiled("forward", BF16, 64) == first
    assert compiler.calls == 1


def test_a_checkout_has_its_sources_itself(folder, compiler, tmp_path):
    own = tmp_path / "csrc" / "cuda"
    own.mkdir(parents=True)
    for name, text in SOURCES.items():
        (own / name).write_text(text)
    assert image.packaged("forward", BF16, 64) == CUBIN  # not in a checkout yet
    (tmp_path / "pyproject.toml").touch()
    (own / "own.h").write_text("// edited since the package's copies were made")
    with pytest.raises(image.ImageError, match="was built from other sources"):
        image.packaged("forward", BF16, 64)
    for path in folder.iterdir():
        path.unlink()
    assert b"own.h" in image.compiled("forward", BF16, 64)
    assert image.status()["sources"] is True


def test_this_checkout_has_sources_without_a_build(monkeypatch, tmp_path):
    monkeypatch.setattr(image, "_FOLDER", tmp_path / "nothing")
    assert image.status()["sources"] is True


@pytest.mark.parametrize(("error", "passing"), [(OSError(24, "Too many open files"), True), (OSError("no"), False)])
def test_sources_that_cannot_be_read_are_a_reason(folder, compiler, monkeypatch, error, passing):
    def sources():
        raise error

    monkeypatch.setattr(image, "_sources", sources)
    for found in image.images("forward", BF16, 64):
        assert is_passing(found) is passing


def test_missing_sources_are_a_reason(folder, compiler):
    for path in folder.iterdir():
        path.unlink()
    for which in ("forward", "backward"):
        with pytest.raises(image.ImageError, match="the CUDA sources are not in the package"):
            image.compiled(which, BF16, 64)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", CUBIN * 9, b"\x7fELF".ljust(64, b"\0")], ids=len)
def test_a_file_that_is_no_module_is_damaged(content):
    with pytest.raises(image.ImageError, match="the CUDA module is damaged"):
        image.info_of(content, ForwardInfo)


# ---- The cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_open_to_others_is_refused(place):
    cache.write("x", b"1")
    place.chmod(0o770)
    for use in (lambda: cache.read("x"), lambda: cache.write("x", b"2")):
        with pytest.raises(cache.CacheError, match=r"is open to others \(mode 770\); chmod 700 it"):
            use()


def test_a_folder_of_another_user_is_refused(place, monkeypatch):
    cache.write("x", b"1")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(cache.CacheError, match=f"belongs to user {owner}"):
        cache.read("x")


def test_a_full_disk_keeps_no_half_written_file(place, monkeypatch):
    def replace(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(cache.CacheError, match=r"cannot be written \(No space left on device\)"):
        cache.write("x", b"1")
    assert list(place.iterdir()) == []


def test_links_are_refused(place, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cache.CacheError, match="cannot be used"):
        cache.write("x", b"1")
    place.unlink()
    cache.write("x", b"1")
    (place / "y").symlink_to(place / "x")
    assert cache.read("x") == b"1"
    assert cache.read("y") is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_nothing_that_was_kept(place, make):
    cache.write("x", b"1")
    make(place / "y")
    opened = len(os.listdir("/proc/self/fd"))
    found = []
    reader = threading.Thread(target=lambda: found.append(cache.read("y")), daemon=True)
    reader.start()
    reader.join(10)
    assert found == [None]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_file_that_others_may_write_is_not_read(place):
    cache.write("x", b"1")
    (place / "x").chmod(0o622)
    assert cache.read("x") is None


def test_an_unfinished_file_of_an_earlier_process_is_no_obstacle(place):
    cache.write("x", b"1")
    (place / f".x.{os.getpid()}").write_text("half")
    cache.write("x", b"2")
    assert cache.read("x") == b"2"
    assert [path.name for path in place.iterdir()] == ["x"]


def test_no_home_is_a_reason(monkeypatch):
    monkeypatch.setattr(env, "cache_folder", lambda: None)
    with pytest.raises(cache.CacheError, match="no home directory is known for a cache; set DEBERTA_KERNELS_CACHE"):
        cache.read("x")


# ---- The driver and refusals


def test_a_missing_driver_is_a_reason():
    with pytest.raises(driver.DriverError, match=r"^the NVIDIA driver is not there \(libnowhere\.so\.1: "):
        driver.Driver("libnowhere.so.1")


@needs_compiler
def test_a_driver_without_tensor_maps_is_too_old(tmp_path):
    path = tmp_path / "libold.so"
    names = [name for name in driver._SIGNATURES if name != "cuTensorMapEncodeTiled"]
    text = "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in names)
    (tmp_path / "old.cpp").write_text(text)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(path), str(tmp_path / "old.cpp")], check=True)
    with pytest.raises(driver.DriverError, match=r"the NVIDIA driver is too old: .* has no cuTensorMapEncodeTiled"):
        driver.Driver(str(path))


@pytest.mark.parametrize("passing", [True, False])
def test_a_driver_is_looked_for_again_after_a_failure_that_passes(monkeypatch, passing):
    made = iter([driver.DriverError("cuInit: out of memory (2)", 2 if passing else 100), "the driver"])

    def opened():
        found = next(made)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(driver, "Driver", opened)
    monkeypatch.setattr(driver, "_found", Attempts())
    assert driver.unavailable() == "cuInit: out of memory (2)"
    assert driver.unavailable() == (None if passing else "cuInit: out of memory (2)")


class OnCuda(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda:0")


def problem(dtype=BF16, head_dim=64, scale=1.0):
    q = torch.zeros(1, 2, 4, head_dim, dtype=dtype).as_subclass(OnCuda)
    return AttentionProblem(q, q, q, None, None, Masks(), PositionSpec(), scale, max_seqlen=4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float32}, "it computes bfloat16 and float16, not float32"),
        ({"head_dim": 32}, "head_dim 32 is not one of 64, 128"),
        ({"scale": 0.0}, "the scale is not positive"),
        ({}, None),
    ],
)
def test_refusals_name_the_limit(arguments, reason):
    assert cuda.refusal(problem(**arguments)) == reason


def test_cpu_tensors_are_refused_before_the_driver_is_looked_for(monkeypatch):
    monkeypatch.setattr(driver, "_opened", lambda: pytest.fail("the driver was opened"))
    q = torch.zeros(1, 2, 4, 64, dtype=BF16)
    call = AttentionProblem(q, q, q, None, None, Masks(), PositionSpec(), 1.0, max_seqlen=4)
    assert cuda.refusal(call) == "it runs on cuda tensors, not cpu"


def test_status_without_a_driver_says_why(folder, compiler, monkeypatch):
    monkeypatch.setattr(driver, "_opened", lambda: (None, "the NVIDIA driver is not there"))
    found = cuda.status()
    assert (found["driver"], found["devices"]) == ("the NVIDIA driver is not there", [])
    assert (found["nvrtc"], found["sources"], found["nvcc"]) == ("13.0", True, "13.0")
