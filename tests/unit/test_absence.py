"""An install without the native library, or without its best variant: the reason and the remedy, wherever one looks."""

import json
from pathlib import Path

import pytest
import torch

from deberta_kernels import dispatch, env, native
from deberta_kernels.native import absence

REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir deberta-kernels"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An install from a package index, with nothing in lib."""
    package = tmp_path / "site-packages" / "deberta_kernels"
    (package / "lib").mkdir(parents=True)
    monkeypatch.setattr(absence, "_PACKAGE", package)
    monkeypatch.setattr(absence, "INSTALLED", package / "lib" / absence.INSTALLED.name)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_problem", None)
    monkeypatch.delenv(env.LIBRARY, raising=False)
    return package


REASONS = {
    "no C++ compiler on the PATH (looked for c++, g++, clang++); on Debian: apt install g++": "Debian: apt install g++",
    "DEBERTA_KERNELS_SKIP_NATIVE was set; unset it": "DEBERTA_KERNELS_SKIP_NATIVE was set; unset it",
    "the native library is not built on Windows": "not built on Windows",
    "variant generic failed (g++ ...):\n" + "error: no room\n" * 100: "error: no room\n ...",
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_that_of_the_build(reason, installed):
    (installed / "lib" / "build.json").write_text(json.dumps({"not_built": reason}))
    said = native.unavailable()
    assert said.startswith("the native library is not built: ")
    assert REASONS[reason].splitlines()[0] in said
    assert said.endswith(f"; then `{REINSTALL}`")
    assert len(said) < 500


@pytest.mark.parametrize("content", ["", "[]", "{", '{"not_built": 7}', '{"not_built": ""}', None])
def test_without_a_record_a_compiler_is_what_is_asked_for(content, installed):
    if content is not None:
        (installed / "lib" / "build.json").write_text(content)
    said = native.unavailable()
    assert "is missing; install a C++ compiler (Debian, Ubuntu: `apt install g++`); then " in said
    assert said.endswith(f"`{REINSTALL}`")


def test_a_checkout_is_told_to_build(installed):
    (installed.parent / "csrc").mkdir()
    (installed.parent / "csrc" / "native_build.py").touch()
    assert native.unavailable().endswith("; then `python setup.py build_native`")


def test_a_library_of_the_users_own_is_told_how_to_leave_it(installed, monkeypatch, tmp_path):
    monkeypatch.setenv(env.LIBRARY, "/nowhere/mine.so")
    remedy = f"unset {env.LIBRARY} for the installed library"
    assert native.unavailable() == f"the native library /nowhere/mine.so is missing; {remedy}"
    monkeypatch.setattr(native, "_problem", None)
    monkeypatch.setenv(env.LIBRARY, str(tmp_path))
    assert native.unavailable() == (
        f"the native library {tmp_path} cannot be used: it is a folder; build it again with `{REINSTALL}`, or {remedy}"
    )


def test_what_the_loader_refuses_has_a_remedy(installed, monkeypatch):
    """A wheel of a newer system, say: the file is whole, and asks for another glibc."""

    def refuse(path):
        raise OSError("/lib/libc.so.6: version `GLIBC_2.99' not found")

    absence.INSTALLED.touch()
    monkeypatch.setattr(native.library_file, "damage", lambda path: None)
    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    assert native.unavailable().endswith(f"version `GLIBC_2.99' not found; build it again with `{REINSTALL}`")


def test_the_outlook_and_the_first_call_say_the_same(installed, monkeypatch):
    (installed / "lib" / "build.json").write_text('{"not_built": "CXX is \'x\', which is not on the PATH"}')
    problem = dispatch.ordinary_call(torch.device("cpu"), torch.float32)
    said = dispatch.outlook(problem)
    costs = "tiled PyTorch is as exact, and several times slower than a kernel"
    assert said.splitlines() == [
        f"float32 on cpu: backend 'torch'; {costs}",
        f"  not 'cpu': {native.unavailable()}",
    ]
    with pytest.raises(NotImplementedError) as refused:
        dispatch.choose(problem, strict=True)
    assert native.unavailable() in str(refused.value)
    assert costs in str(refused.value)


def test_the_outlook_names_what_was_asked_for(monkeypatch):
    problem = dispatch.ordinary_call(torch.device("cpu"), torch.float32)
    assert dispatch.outlook(problem, "torch") == "float32 on cpu: backend 'torch', which was asked for"
    expected = "float32 on cpu: no backend: 'cuda' was asked for: it runs on cuda tensors, not cpu"
    assert dispatch.outlook(problem, "cuda") == expected
    monkeypatch.setenv(env.BACKEND, "tpu")
    assert dispatch.outlook(problem).startswith(f"float32 on cpu: no backend: {env.BACKEND} must be one of ")


X86 = {"vendor_id": "GenuineIntel"}
VARIANTS = {
    "the best one": ("avx512_bf16", env.CPU_ISAS, env.ISA_FEATURES["avx512_bf16"], X86, ""),
    "an old processor": ("avx2", env.CPU_ISAS, env.ISA_FEATURES["avx2"], X86, ""),
    "a very old processor": ("generic", env.CPU_ISAS, (), X86, "this processor has no AVX2, the library is slow on it"),
    "ARM": ("neon", ("neon_bf16", "neon", "generic"), ("asimd", "atomics"), {}, ""),
    "ARM, an old compiler": (
        "neon", ("neon", "generic"), env.ISA_FEATURES["neon_bf16"], {},
        "the library was compiled without neon_bf16; update the C++ compiler, then `",
    ),
    "a processor without a variant of its own": ("generic", ("generic",), (), {}, ""),
    "an old compiler": (
        "avx2", ("avx2", "generic"), env.ISA_FEATURES["avx512"], X86,
        "the library was compiled without avx512; update the C++ compiler, then `",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_that_is_not_the_fastest_has_a_reason(case, monkeypatch):
    isa, compiled, features, described, expected = VARIANTS[case]
    monkeypatch.delenv(env.CPU_ISA, raising=False)
    monkeypatch.setattr(absence.processor, "features", lambda: frozenset(features))
    monkeypatch.setattr(absence.processor, "described", lambda: described)
    found = absence.slower_variant(isa, compiled)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)
    monkeypatch.setenv(env.CPU_ISA, isa)
    asked_for = f"{env.CPU_ISA} asks for it"
    assert absence.slower_variant(isa, compiled).startswith(asked_for if case.endswith("an old compiler") else expected)


def test_a_slower_variant_that_was_asked_for_says_by_what(monkeypatch):
    monkeypatch.setattr(absence.processor, "features", lambda: frozenset(env.ISA_FEATURES["avx512"]))
    for isa in env.isas_of("x86_64"):
        monkeypatch.setenv(env.CPU_ISA, isa)
        is_slower = isa in ("avx2", "generic")
        assert absence.slower_variant(isa, env.CPU_ISAS) == (f"{env.CPU_ISA} asks for it" if is_slower else "")


def test_a_copy_of_another_name_uses_the_library_of_the_package_that_is_installed(monkeypatch, tmp_path):
    own = Path(absence.__file__).resolve().parents[1]
    (tmp_path / "made_up_distribution").mkdir()
    (tmp_path / "made_up_distribution" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(absence, "_DISTRIBUTED", "made_up_distribution")
    assert absence._package() == (tmp_path / "made_up_distribution").resolve()
    monkeypatch.setattr(absence, "_DISTRIBUTED", "nowhere_installed")
    assert absence._package() == own
    monkeypatch.setattr(absence, "_DISTRIBUTED", absence.PACKAGE)
    assert absence._package() == own
