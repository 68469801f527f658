"""The build of the CUDA modules: once per source, recorded, and only where nvcc is."""

import hashlib
import json

import pytest

from tests.checkout import build, native_build


@pytest.fixture
def cuda_folders(tmp_path, monkeypatch):
    """Sources, the package's folder, and an nvcc that writes its arguments down as the module."""
    sources, target, nvcc = tmp_path / "cuda", tmp_path / "lib" / "cuda", tmp_path / "nvcc"
    sources.mkdir()
    (sources / "forward.cu").write_text("kernel")
    (sources / "backward.cu").write_text("another")
    (sources / "params.h").write_text("params")
    (sources / "README.md").write_text("not a source")
    nvcc.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "release 13.0"; exit; fi\n'
        'while [ "$1" != -o ]; do said="$said $1"; shift; done; echo "$said" > "$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    return sources, target


def test_cuda_sources_in_the_package_follow_those_of_the_checkout(cuda_folders):
    sources, target = cuda_folders
    build.copy_cuda_sources(sources, target)
    (sources / "params.h").unlink()
    (sources / "layout.h").write_text("layout")
    build.copy_cuda_sources(sources, target)
    assert sorted(path.name for path in target.iterdir()) == ["backward.cu", "forward.cu", "layout.h"]


def test_cuda_modules_are_built_once_per_source_and_recorded(cuda_folders):
    sources, target = cuda_folders
    record = build.build_cubins(sources, target)
    assert len(record["cubins"]) == len(build.CUDA.MODULES)
    for name, digest in record["cubins"].items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    said = (target / "forward_fp16_d128.cubin").read_text()
    assert "sm_90a" in said
    assert said.endswith("-DDK_DTYPE=fp16 -DDK_HEAD_DIM=128\n")
    assert "backward_bf16_d64.cubin" in record["cubins"]
    assert "backward_bf16_d128.cubin" not in record["cubins"]
    built = (target / "forward_fp16_d128.cubin").stat().st_mtime_ns
    assert build.build_cubins(sources, target) == record
    assert (target / "forward_fp16_d128.cubin").stat().st_mtime_ns == built
    (sources / "params.h").write_text("changed")
    assert build.build_cubins(sources, target)["sources"] != record["sources"]
    assert (target / "forward_fp16_d128.cubin").stat().st_mtime_ns != built


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sources": ', b"\xff\xfe", b"null"])
def test_a_damaged_record_of_cuda_modules_means_building_again(cuda_folders, content):
    sources, target = cuda_folders
    record = build.build_cubins(sources, target)
    (target / "build.json").write_bytes(content)
    assert build.build_cubins(sources, target) == record
    assert json.loads((target / "build.json").read_text()) == record


def test_a_damaged_cuda_module_is_built_again(cuda_folders):
    sources, target = cuda_folders
    record = build.build_cubins(sources, target)
    (target / "forward_fp16_d128.cubin").write_text("cut")
    build.build_cubins(sources, target)
    content = (target / "forward_fp16_d128.cubin").read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["cubins"]["forward_fp16_d128.cubin"]


def test_without_nvcc_no_cuda_module_is_built_and_the_reason_said(cuda_folders, monkeypatch, capsys):
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(native_build.BuildError, match="there is no nvcc on the PATH"):
        build.build_cubins(*cuda_folders)
    build.build_cubins_or_say()
    assert "no CUDA kernels built: there is no nvcc on the PATH; NVRTC compiles them" in capsys.readouterr().err


def test_a_wheel_that_was_asked_to_have_modules_is_not_made_without(monkeypatch):
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="DEBERTA_KERNELS_BUILD_CUDA is set, but no CUDA kernels are built: there"):
        build.build_cubins_or_leave()
