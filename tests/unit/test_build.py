"""The build of the native library: what it compiles and leaves out, and how an install fares without a compiler."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest

import deberta_kernels
from tests.checkout import ROOT, build, native_build

KERNEL = """
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#include "value.h"
extern "C" __attribute__((visibility("default"))) int JOIN(value_, DK_VARIANT)() { return VALUE; }
"""
# What every variant is compiled with, and the library must ask the processor for before it runs one.
VECTOR = {"-mavx2", "-mfma", "-mf16c"}
WIDE = VECTOR | {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"}
FLAGS = {"generic": set(), "avx2": VECTOR, "avx512": WIDE, "avx512_bf16": WIDE | {"-mavx512bf16"}}
NEON = {"-march=armv8-a+simd", "-DDK_NEON"}
ARM_FLAGS = {"generic": set(), "neon": NEON, "neon_bf16": {"-march=armv8.2-a+simd+lse+bf16", "-DDK_NEON"}}
BITS = {name: 1 << i for i, name in enumerate({**FLAGS, **ARM_FLAGS})}
DISPATCH = "\n".join([
    *(f"#define BIT_{name} {bit}" for name, bit in BITS.items()),
    "#define BIT(name, runs) | BIT_##name",
    'extern "C" __attribute__((visibility("default"))) int variants() { return 0 DK_VARIANTS(BIT); }',
    "",
])  # fmt: skip


HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on the PATH")
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is missing")


def write_sources(folder: Path) -> None:
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "kernel.cpp").write_text(KERNEL)
    (folder / "cpu" / "dispatch.cpp").write_text(DISPATCH)
    (folder / "value.h").write_text("#define VALUE 7\n")


@pytest.fixture
def layout(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    write_sources(tmp_path / "csrc")
    return native_build.Layout(
        tmp_path / "csrc" / "cpu", tmp_path / "csrc", tmp_path / "lib" / native_build.LIBRARY_NAME
    )


def fake_compiler(folder: Path, refuse: str) -> str:
    """Write a compiler that fails when one of its arguments matches `refuse` and is the real one otherwise."""
    script = folder / "fake-c++"
    real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *{refuse}*) echo "refused on purpose" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_library_holds_the_variants_it_reports_and_nothing_is_left_behind(layout):
    record = native_build.build_library(layout)
    library = ctypes.CDLL(str(layout.library))
    assert library.variants() == sum(BITS[name] for name in record["variants"])
    assert record["variants"][0] == "generic"
    assert sorted(path.name for path in layout.library.parent.iterdir()) == ["build.json", native_build.LIBRARY_NAME]


@needs_compiler
def test_library_is_rebuilt_only_when_a_source_changed(layout):
    assert native_build.build_library(layout)["is_new"]
    built = layout.library.stat().st_mtime_ns
    assert not native_build.build_library(layout)["is_new"]
    assert layout.library.stat().st_mtime_ns == built
    (layout.include / "value.h").write_text("#define VALUE 8\n")
    assert native_build.build_library(layout)["is_new"]
    assert layout.library.stat().st_mtime_ns != built


DAMAGED_RECORDS = [
    b"", b"[]", b"null", b"7", b'{"digest": "ab', b"\x00\xff\xfe" * 100, b"[" * 100_000, b"{}", b'{"digest": 7}',
    b'{"digest": "WANTED"}', b'{"digest": "WANTED", "variants": 5, "left_out": 5}', b'{"digest": ["WANTED"]}',
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("content", DAMAGED_RECORDS, ids=lambda content: str(content[:40]))
def test_a_damaged_record_means_building_again(layout, content):
    wanted = native_build.build_library(layout)["digest"]
    layout.record.write_bytes(content.replace(b"WANTED", wanted.encode()))
    assert build.build_or_warn(layout)
    assert json.loads(layout.record.read_text())["digest"] == wanted
    assert not native_build.build_library(layout)["is_new"]


@needs_compiler
@pytest.mark.parametrize("which", ["record", "library"])
@pytest.mark.parametrize("kind", ["missing", "folder", "dangling link"])
def test_whatever_is_in_the_place_of_a_file_is_built_over(layout, which, kind):
    native_build.build_library(layout)
    path = getattr(layout, which)
    path.unlink()
    if kind == "folder":
        (path / "inside").mkdir(parents=True)
    elif kind == "dangling link":
        path.symlink_to("gone")
    assert native_build.build_library(layout)["is_new"]
    assert not native_build.build_library(layout)["is_new"]


@needs_compiler
@pytest.mark.parametrize("edit", [lambda whole: whole[:3000], lambda whole: whole[:-300] + bytes(300)])
def test_a_damaged_library_is_built_again(layout, edit):
    native_build.build_library(layout)
    whole = layout.library.read_bytes()
    layout.library.write_bytes(edit(whole))
    assert native_build.build_library(layout)["is_new"]
    assert layout.library.read_bytes() == whole


@needs_compiler
def test_what_the_system_refuses_is_a_warning_as_well(layout, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native_build, "put_in_place", refuse)
    assert not build.build_or_warn(layout)
    assert "WARNING: no native library: [Errno 28] No space left on device" in capsys.readouterr().err


@needs_compiler
def test_sanitizers_are_those_of_gcc(layout, tmp_path, monkeypatch):
    real, clang = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"), tmp_path / "clang++"
    clang.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "clang version 14.0.6" && exit\nexec {real} "$@"\n')
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    native_build.build_library(layout)
    with pytest.raises(native_build.BuildError, match=r"the sanitized build is made with g\+\+"):
        native_build.build_library(
            native_build.Layout(layout.sources, layout.include, layout.library, native_build.SANITIZE_FLAGS)
        )


@needs_compiler
def test_a_cross_compiler_decides_on_the_platform(tmp_path, monkeypatch):
    cross = tmp_path / "aarch64-c++"
    cross.write_text("#!/bin/sh\necho aarch64-linux-gnu\n")
    cross.chmod(0o755)
    assert native_build.platform_of([str(cross)]) == "linux-aarch64"
    assert native_build.platform_of(native_build.find_compiler()) == native_build.sysconfig.get_platform()


CLANGS = [name for name in ("clang++", *(f"clang++-{n}" for n in range(14, 30))) if shutil.which(name)]


@pytest.mark.skipif(not CLANGS, reason="there is no clang++ on the PATH")
@pytest.mark.parametrize("name", ["dispatch", "kernel"])
def test_clang_compiles_every_variant(name):
    for compiler in CLANGS:
        for variant, flags in native_build.variants_for(native_build.sysconfig.get_platform()).items():
            defined = (f"-DDK_VARIANT={variant}", native_build.compiled_variants({variant, "generic"}))
            command = [compiler, *native_build.COMMON_FLAGS, *flags, *defined, "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
            native_build.run_compiler([*command, str(ROOT / "csrc" / "cpu" / f"{name}.cpp")], f"{compiler} {variant}")


def test_the_processor_is_asked_only_by_names_that_old_compilers_know():
    asked = re.findall(r'__builtin_cpu_supports\("(\w+)"\)', (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text())
    known = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16"}  # to gcc 10 and clang 14
    assert asked
    assert set(asked) <= known


def test_the_sanitized_library_has_a_place_and_a_digest_of_its_own():
    assert native_build.SANITIZED.library.parent == ROOT / "build" / "sanitized"
    assert native_build.SANITIZED.record != native_build.Layout().record
    assert any("address,undefined" in flag for flag in native_build.SANITIZED.flags)


@needs_compiler
def test_the_digest_covers_the_flags_of_a_layout(layout):
    other = native_build.Layout(layout.sources, layout.include, layout.library, ("-g",))
    platform, compiler = native_build.sysconfig.get_platform(), native_build.find_compiler()
    assert native_build.digest(other, compiler, platform) != native_build.digest(layout, compiler, platform)


@needs_compiler
def test_variant_whose_flags_are_unknown_is_left_out(layout, tmp_path, monkeypatch):
    if len(native_build.variants_for(native_build.sysconfig.get_platform())) == 1:
        pytest.skip("this platform has the generic variant only")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "-mavx512bf16"))
    record = native_build.build_library(layout)
    assert "avx512_bf16" not in record["variants"]
    assert "avx2" in record["variants"]
    assert "-mavx512bf16" in record["left_out"]["avx512_bf16"]
    assert ctypes.CDLL(str(layout.library)).variants() & BITS["avx512_bf16"] == 0


@needs_compiler
def test_failing_compiler_is_quoted(layout, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "DK_VARIANT=generic"))
    with pytest.raises(native_build.BuildError, match=r"variant generic failed .*\n*refused on purpose"):
        native_build.build_library(layout)
    assert not layout.library.exists()


@needs_compiler
def test_linker_that_refuses_the_static_runtime_is_asked_again_without(layout, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "-static-libstdc++"))
    native_build.build_library(layout)
    assert ctypes.CDLL(str(layout.library)).variants()


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(native_build.BuildError, match="CXX is '/nowhere/c\\+\\+', which is not on the PATH"):
        native_build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native_build.BuildError, match=r"no C\+\+ compiler on the PATH .*apt install g\+\+"):
        native_build.find_compiler()


def test_cxx_may_carry_arguments(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -E")
    assert native_build.find_compiler() == [sys.executable, "-E"]


def test_missing_sources_are_named(tmp_path):
    layout = native_build.Layout(tmp_path, tmp_path, tmp_path / "lib" / "x.so")
    with pytest.raises(native_build.BuildError, match=r"dispatch\.cpp is missing"):
        native_build.build_library(layout)


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux-x86_64", FLAGS),
        ("linux-aarch64", ARM_FLAGS),
        ("macosx-14.0-arm64", ARM_FLAGS),
        ("linux-riscv64", {"generic": set()}),
    ],
)
def test_every_variant_of_a_platform_gets_the_flags_of_what_it_uses(platform, expected):
    found = native_build.variants_for(platform)
    assert [(name, set(flags)) for name, flags in found.items()] == list(expected.items())


@needs_compiler
def test_a_feature_that_the_library_cannot_ask_the_processor_for_does_not_compile(monkeypatch):
    class Env:
        ISA_FEATURES: ClassVar = {"avx10": ("avx10",), "generic": ()}

    monkeypatch.setattr(native_build, "package_file", lambda name: Env)
    assert native_build.compiled_variants(["generic", "avx10"]).endswith("=V(avx10, DK_HAS(avx10)) V(generic, true)")
    command = [*native_build.find_compiler(), *native_build.COMMON_FLAGS, f"-I{ROOT / 'csrc'}", "-fsyntax-only"]
    source = str(ROOT / "csrc" / "cpu" / "dispatch.cpp")
    native_build.run_compiler([*command, native_build.compiled_variants(["generic"]), source], "dispatch")
    with pytest.raises(native_build.BuildError, match="DK_HAS_avx10"):
        native_build.run_compiler([*command, native_build.compiled_variants(["generic", "avx10"]), source], "dispatch")


def test_no_flag_ties_the_library_to_the_building_machine():
    for flags in (
        native_build.COMMON_FLAGS,
        native_build.LINK_FLAGS,
        *native_build.variants_for("linux-x86_64").values(),
    ):
        assert not [flag for flag in flags if flag.startswith(("-march", "-mtune", "-mcpu")) or "fast-math" in flag]


def small_checkout(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(
        ROOT / "deberta_kernels", folder / "deberta_kernels", ignore=shutil.ignore_patterns("lib", "__pycache__")
    )
    write_sources(folder / "csrc")
    (folder / "tools").mkdir()
    for name in ("csrc/native_build.py", "tools/index_page.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc" / "cuda").mkdir()
    (folder / "csrc" / "cuda" / "forward.cu").write_text("kernel")
    return folder


def wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel in `folder` and return it with what the build said."""
    state = {name: value for name, value in os.environ.items() if name not in ("CXX", build.SKIP_VARIABLE)}
    state["NVCC"] = "/nowhere/nvcc"
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "bdist_wheel"]
    done = subprocess.run(
        command, cwd=folder, env={**state, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path, done.stderr


@needs_setuptools
@needs_compiler
def test_wheel_with_the_library_fits_every_python(tmp_path):
    path, said = wheel(small_checkout(tmp_path))
    assert re.fullmatch(r"deberta_kernels-[\d.]+-py3-none-(?!any)\w+\.whl", path.name)
    names = zipfile.ZipFile(path).namelist()
    assert f"deberta_kernels/lib/{native_build.LIBRARY_NAME}" in names
    assert {"deberta_kernels/py.typed", "deberta_kernels/demo/text.txt", "deberta_kernels/lib/build.json"} <= set(names)
    assert "deberta_kernels/lib/cuda/forward.cu" in names
    assert "WARNING" not in said


@needs_setuptools
@pytest.mark.parametrize(
    ("environment", "message", "left"),
    [
        ({"CXX": "/nowhere/c++"}, "WARNING: no native library: ", "CXX is '/nowhere/c++'"),
        ({"CXX": "false"}, "WARNING: no native library: ", "asking the compiler what it compiles for failed"),
        (
            {build.SKIP_VARIABLE: "1"},
            f"{build.SKIP_VARIABLE} is set: no native library",
            f"{build.SKIP_VARIABLE} was set",
        ),
    ],
    ids=["no compiler", "broken compiler", "not wanted"],
)
def test_wheel_without_the_library_fits_everywhere_and_says_why(tmp_path, environment, message, left):
    folder = small_checkout(tmp_path)
    stale = folder / "deberta_kernels" / "lib" / native_build.LIBRARY_NAME
    stale.parent.mkdir()
    stale.write_text("left from an earlier build")
    path, said = wheel(folder, **environment)
    assert path.name.endswith("-py3-none-any.whl")
    files = zipfile.ZipFile(path)
    assert not [name for name in files.namelist() if name.endswith(".so")]
    assert (message + left if message.endswith(" ") else message) in said
    assert json.loads(files.read("deberta_kernels/lib/build.json"))["not_built"].startswith(left)


@needs_setuptools
def test_strict_build_fails_with_the_reason(tmp_path):
    folder = small_checkout(tmp_path)
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_native", "--strict"]
    environment = {**os.environ, "CXX": "/nowhere/c++"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "CXX is '/nowhere/c++'" in done.stderr


def test_every_extra_serves_something_of_this_release():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    names = ["transformers", "adapters", "demo", "test", "bench", "triton", "dev"]
    assert re.findall(r"^(\w+) = ", section, re.MULTILINE) == names


@pytest.mark.parametrize("extra", ["transformers", "adapters", "demo", "test"])
def test_an_extra_with_transformers_reads_the_vocabularies_of_v2_and_v3(extra):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    content = text.partition(f"\n{extra} = [")[2].partition("]\n")[0]
    assert {"sentencepiece", "protobuf"} <= set(re.findall(r'"([\w-]+)', content))


def test_every_environment_variable_is_documented():
    from deberta_kernels import env

    documented = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    missing = [name for name in (*env.VARIABLES, build.SKIP_VARIABLE, "CXX") if f"`{name}`" not in documented]
    assert missing == []


@pytest.mark.parametrize("version", ["65.5.0", "76.1"])
def test_a_setuptools_that_is_too_old_is_named(version):
    with pytest.raises(SystemExit, match=rf"needs setuptools 77 or later, this is {version}; run `pip install"):
        build.check_setuptools(version)


def test_a_setuptools_that_suffices_is_let_pass():
    build.check_setuptools("77.0.0")
    build.check_setuptools("80.9.0.post20250501")


def test_the_citation_has_the_version():
    assert f"\nversion: {deberta_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()
