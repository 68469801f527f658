"""Environment variables: what is read, where, and what an empty or wrong value does."""

import os
from pathlib import Path

import pytest

from deberta_kernels import env

PACKAGE = Path(env.__file__).parent


def test_nothing_is_set_by_default(monkeypatch):
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert env.forced_backend() is None
    assert env.cpu_isa() is None
    assert env.library_path() is None
    assert env.variables_set() == {}


def test_values_are_returned_and_listed(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "torch")
    monkeypatch.setenv(env.CPU_ISA, "avx2")
    monkeypatch.setenv(env.LIBRARY, "/somewhere/lib.so")
    monkeypatch.setenv(env.CACHE, "/somewhere/cache")
    assert env.self_tests()
    monkeypatch.setenv(env.SELF_TEST, "0")
    assert not env.self_tests()
    assert (env.forced_backend(), env.cpu_isa(), env.library_path()) == ("torch", "avx2", "/somewhere/lib.so")
    assert env.cache_folder() == "/somewhere/cache"
    assert set(env.variables_set()) == set(env.VARIABLES)


def test_a_backend_is_found_where_os_environ_was_replaced(monkeypatch):
    monkeypatch.delenv(env.BACKEND, raising=False)
    assert env.forced_backend() is None
    monkeypatch.setattr(os, "environ", {env.BACKEND: "torch"})
    assert env.forced_backend() == "torch"


def test_empty_value_means_unset(monkeypatch):
    for name in env.VARIABLES:
        monkeypatch.setenv(name, "")
    assert env.forced_backend() is None
    assert env.cpu_isa() is None
    assert env.variables_set() == {}


def test_the_cache_lies_in_the_users_own_folder(monkeypatch):
    monkeypatch.delenv(env.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/caches")
    assert env.cache_folder() == "/somewhere/caches/deberta_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert env.cache_folder() == "/home/someone/.cache/deberta_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_folder() is None


def test_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv(env.CPU_ISA, "sse9")
    with pytest.raises(ValueError, match=r"DEBERTA_KERNELS_CPU_ISA must be one of .*avx2.*, got 'sse9'; unset it"):
        env.cpu_isa()


def test_variables_are_named_in_env_only():
    for source in PACKAGE.rglob("*.py"):
        if source.name != "env.py":
            assert "os.environ" not in source.read_text() or source.parent.name == "demo", source


def test_every_variable_is_documented():
    page = PACKAGE.parent / "docs" / "environment.md"
    if not page.exists():
        pytest.skip("docs are not part of an installed package")
    text = page.read_text()
    assert [name for name in (*env.VARIABLES, *env.CPU_ISAS) if f"`{name}`" not in text] == []


def test_a_processor_may_have_the_variants_of_its_family():
    assert env.isas_of("x86_64") == env.isas_of("AMD64") == ("avx512_bf16", "avx512", "avx2", "generic")
    assert env.isas_of("aarch64") == env.isas_of("arm64") == ("neon_bf16", "neon", "generic")
    assert env.isas_of("riscv64") == ("generic",)
    assert {*env.isas_of("x86_64"), *env.isas_of("aarch64")} == {*env.CPU_ISAS}
    assert [isa for isa in env.CPU_ISAS if env.multiplies_bfloat16(isa)] == ["avx512_bf16", "neon_bf16"]
