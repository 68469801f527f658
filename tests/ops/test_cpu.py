"""What only the native library can get wrong: opening it, its instruction-set variants, processes, prepared tables."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import api, dispatch, native, notices
from deberta_kernels.impl import cpu
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import Masks, PositionSpec
from tests import needs


@pytest.fixture
def library():
    needs.native_library()


needs_library = pytest.mark.usefixtures("library")


def problem(**changes):
    return inputs.problem(Case(**{"batch": 2, "heads": 2, "nq": 40, "head_dim": 16, **changes}))


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


STATUS = "from deberta_kernels import native; print(native.library_status())"


@needs_library
def test_variable_chooses_the_instruction_set():
    variants = native.library_status()["variants"]
    assert "generic" in variants
    for isa in variants:
        assert f"'isa': '{isa}'" in run_python(STATUS, DEBERTA_KERNELS_CPU_ISA=isa).stdout


@needs_library
def test_unknown_instruction_set_is_named_as_the_reason():
    done = run_python(STATUS, DEBERTA_KERNELS_CPU_ISA="mmx")
    assert "'loaded': False" in done.stdout
    assert "mmx" in done.stdout


def test_missing_library_is_named_as_the_reason_and_other_backends_run():
    code = (
        "import torch, warnings, deberta_kernels as dk\n"
        "warnings.simplefilter('error')\n"
        "x = [torch.randn(1, 1, 4, 8) for _ in range(3)]\n"
        "try: dk.disentangled_attention(*x)\n"
        "except UserWarning as warning: print('warned:', warning)\n"
        "print(dk.disentangled_attention(*x, backend='torch').shape)\n"
        "try: dk.disentangled_attention(*x, backend='cpu')\n"
        "except NotImplementedError as error: print('raised:', error)\n"
    )
    done = run_python(code, DEBERTA_KERNELS_LIBRARY="/nowhere/library.so")
    assert "warned:" in done.stdout
    assert "raised:" in done.stdout
    assert done.stdout.count("/nowhere/library.so") == 2
    assert "torch.Size([1, 1, 4, 8])" in done.stdout


def test_file_that_is_no_library_is_named_as_the_reason(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(b"not a library")
    done = run_python(STATUS, DEBERTA_KERNELS_LIBRARY=str(path))
    assert "'loaded': False" in done.stdout
    assert str(path) in done.stdout


@needs_library
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 264}, "head_dim 264 is more than 256"),
        ({"dtype": torch.float64}, "not float64"),
    ],
)
def test_refuses_by_name(changes, reason):
    assert reason in cpu.refusal(problem(**changes))
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.choose(problem(**changes), "cpu")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", ["c2p+p2c", "c2p", "p2c"])
def test_prepared_tables_give_the_same_bits(dtype, terms):
    given = problem(dtype=dtype, terms=terms, nq=70)
    packed = cpu.prepare(given.pos_key, given.pos_query, given.position)
    assert packed.dtype == torch.uint8
    for bare, prepared in zip(cpu.forward(given), cpu.forward(replace(given, prepared=packed)), strict=True):
        assert torch.equal(bare, prepared)


@needs_library
@pytest.mark.parametrize("name", ["q", "v", "pos_key", "pos_query", "key_mask", "prepared"])
def test_a_freed_tensor_is_named_before_its_memory_is_read(name):
    given = problem(nq=40)
    key = torch.ones(given.q.shape[0], 40, dtype=torch.bool)
    prepared = cpu.prepare(given.pos_key, given.pos_query, given.position)
    given = given.changed(masks=Masks(key=key, query=key.clone()), prepared=prepared)
    cpu.forward(given)
    freed = key if name == "key_mask" else getattr(given, name)
    freed.untyped_storage().resize_(freed.nbytes - 1)
    with pytest.raises(ValueError, match=f"^{'masks.key' if name == 'key_mask' else name} must have a storage of at"):
        cpu.forward(given)


@needs_library
def test_prepared_tables_of_another_size_are_refused():
    given = problem()
    packed = cpu.prepare(given.pos_key, given.pos_query, given.position)
    with pytest.raises(ValueError, match="prepared must"):
        cpu.forward(replace(given, prepared=packed[:-64]))


@needs_library
def test_gemm_rate_is_a_rate():
    assert 0.1 < native.gemm_rate(torch.float32) < 10_000


@needs_library
def test_use_isa_restores_and_names_what_there_is():
    before = native.library_status()["isa"]
    with native.use_isa("generic"):
        assert native.library_status()["isa"] == "generic"
    assert native.library_status()["isa"] == before
    with pytest.raises(ValueError, match="isa must be one of"), native.use_isa("mmx"):
        pass


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_computes_what_its_parent_does():
    x = [torch.randn(2, 4, 200, 16) for _ in range(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = dk.disentangled_attention(*x, backend="cpu")
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hang ends the child, and the test
            os._exit(0 if torch.equal(dk.disentangled_attention(*x, backend="cpu"), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_torchs_default_dtype(default):
    given = problem(nq=30)
    out, lse = cpu.forward(given)
    dout = torch.ones_like(out)
    expected = [out, lse, *cpu.backward(given, dout, None, out, lse, (True,) * 5)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        out, lse = cpu.forward(given)
        found = [out, lse, *cpu.backward(given, dout, None, out, lse, (True,) * 5)]
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@needs_library
def test_default_device_of_a_model_loader_does_not_matter():
    code = (
        "import torch\n"
        "x = [torch.randn(1, 2, 9, 8) for _ in range(3)]\n"
        "with torch.device('meta'):\n"
        "    from deberta_kernels.impl import cpu, reference\n"
        "    import deberta_kernels as dk\n"
        "    out = dk.disentangled_attention(*x, backend='cpu')\n"
        "print((out - dk.disentangled_attention(*x, backend='reference')).abs().max() < 1e-5)\n"
    )
    done = run_python(code)
    assert "True" in done.stdout, done.stderr


@needs_library
def test_pending_negation_is_seen():
    given = problem(nq=9)
    values = torch._neg_view(given.v)
    expected = cpu.forward(replace(given, v=-given.v))[0]
    assert torch.equal(cpu.forward(replace(given, v=values))[0], expected)
    given = problem(nq=9, nk=1200)  # with few keys the backward sums again what lse holds
    out, lse = cpu.forward(given)
    results = {"dout": torch.randn(out.shape), "dlse": torch.randn(lse.shape), "out": out, "lse": lse}
    expected = cpu.backward(given, **results, needs=(True,) * 5)
    for name, x in results.items():
        found = cpu.backward(given, **results | {name: torch._neg_view(-x)}, needs=(True,) * 5)
        assert all(map(torch.equal, expected, found))


@needs_library
@pytest.mark.parametrize("part", ["key", "query", "pair"])
def test_masks_of_any_strides_are_read_as_their_values(part):
    given = problem(nq=9)
    shape = (2, 1, 9, 9) if part == "pair" else (2, 9)
    keep = torch.rand(shape) < 0.6
    spread = torch.stack([keep, ~keep], -1)[..., 0]
    across = keep.transpose(0, -1).contiguous().transpose(0, -1)
    assert spread.stride(-1) != 1 != across.stride(-1)
    want = cpu.forward(replace(given, masks=Masks(**{part: keep})))
    dout = torch.randn(want[0].shape)
    gradients = cpu.backward(replace(given, masks=Masks(**{part: keep})), dout, None, *want, (True,) * 5)
    for other in (spread, across):
        masked = replace(given, masks=Masks(**{part: other}))
        assert all(map(torch.equal, want, cpu.forward(masked)))
        assert all(map(torch.equal, gradients, cpu.backward(masked, dout, None, *want, (True,) * 5)))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("module", [native, notices], ids=["native", "notices"])
def test_a_lock_held_while_another_thread_forks_does_not_stop_the_child(module, monkeypatch):
    x = torch.randn(1, 2, 9, 16)
    expected = dk.disentangled_attention(x, x, x, backend="cpu")
    monkeypatch.setattr(native, "_library", None)  # the child opens it anew
    with module._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a hang ends the child, and the test
            os._exit(0 if torch.equal(dk.disentangled_attention(x, x, x, backend="cpu"), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_packed_sequences_with_a_prefix_are_refused():
    given = problem(batch=1, nq=12, terms="none")
    with pytest.raises(ValueError, match="prefix_length must be 0 with cu_seqlens"):
        api.run_attention(
            given.q, given.k, given.v, None, None, masks=Masks(), position=PositionSpec(prefix_length=2),
            cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32), max_seqlen=7,
        )  # fmt: skip


@needs_library
@pytest.mark.parametrize(("first_row", "rows"), [(0, 0), (0, 2), (13, 3)])
@pytest.mark.parametrize("nq", [1, 20])
def test_sliced_tables_that_no_key_reaches_are_not_read(nq, first_row, rows):
    """A kernel that expects the rows around distance 0 in them reads and writes elsewhere."""
    given = problem(nq=nq, nk=30, terms="none")
    table = torch.randn(2, rows, 16)
    position = PositionSpec(8, 32, first_row, prefix_length=30)
    bare, sliced = replace(given, position=position), replace(given, position=position, pos_key=table, pos_query=table)
    want = cpu.forward(bare)
    assert all(map(torch.equal, want, cpu.forward(sliced)))
    dout = torch.randn_like(want[0])
    gradients = cpu.backward(sliced, dout, None, *want, (True,) * 5)
    for expected, got in zip(cpu.backward(bare, dout, None, *want, (True,) * 5)[:3], gradients):
        assert torch.equal(expected, got)
    for x in gradients[3:]:
        assert torch.equal(x, torch.zeros_like(table))
