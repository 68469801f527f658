"""The self-test: what a GPU backend must show before it first answers on a device, and what comes of it."""

import json
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import deberta_kernels as dk
from deberta_kernels import api, backends, dispatch, env, notices
from deberta_kernels.impl import torch_tiled
from deberta_kernels.proof import record, self_test, variants
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from tests.checkout import ROOT

IDENTITY = {
    "backend": "triton", "device": "NVIDIA Made Up", "capability": "9.0", "deberta_kernels": "1", "torch": "2",
    "triton": "3", "cuda": "13", "driver": "580.1", "kernels": "abc",
}  # fmt: skip
PLAIN = Case(batch=1, heads=2, nq=20, head_dim=16)
FAILED = r"its self-test on this device failed"


class Kernels:
    """A GPU backend on the CPU: the tiled path, whose results a test may spoil."""

    def __init__(self):
        self.forwards = self.backwards = 0
        self.out = self.dk = lambda x: x

    def refusal(self, problem):
        return None

    def forward(self, problem):
        self.forwards += 1
        out, lse = torch_tiled.forward(problem)
        return self.out(out), lse

    def backward(self, problem, *rest):
        self.backwards += 1
        found = torch_tiled.backward(problem, *rest)
        return found._replace(dk=self.dk(found.dk))


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The backend "triton" of a machine whose only device is new to everybody."""
    found = Kernels()
    monkeypatch.setattr(self_test, "_TESTED_DEVICES", "cpu")
    monkeypatch.setattr(self_test, "_found", {})
    monkeypatch.setattr(record, "identity", lambda backend, device: dict(IDENTITY))
    monkeypatch.setattr(dispatch, "_loaded", {"triton": found})
    monkeypatch.setattr(dispatch, "order", lambda device_type: backends.order("cuda"))
    monkeypatch.setattr(notices, "_warned", set())
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    for name in (env.BACKEND, env.SELF_TEST):
        monkeypatch.delenv(name, raising=False)
    return found


def call(case=PLAIN, *, grad=False, **options):
    problem = inputs.problem(case)
    tensors = [problem.q, problem.k, problem.v, problem.pos_key, problem.pos_query]
    if grad:
        tensors = [x.detach().requires_grad_() for x in tensors]
    return api.run_attention(
        *tensors, masks=problem.masks, position=problem.position, scale=problem.scale, dropout_p=problem.dropout_p,
        cu_seqlens=problem.cu_seqlens, max_seqlen=problem.max_seqlen, return_lse=True,
        **{"backend": "auto", **options},
    )  # fmt: skip


def chosen(case=PLAIN, **options):
    return dispatch.choose(inputs.problem(case), **options)


def new_process(monkeypatch):
    monkeypatch.setattr(self_test, "_found", {})


def spoiled(x):
    return x + 0.1


# ---- Right


def test_a_variant_is_tested_once_before_its_first_call(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen() for _ in range(3)] == ["triton"] * 3
        assert (kernels.forwards, kernels.backwards) == (1, 0)
        call()
        assert kernels.forwards == 2  # the call alone
        call(grad=True)
        assert (kernels.forwards, kernels.backwards) == (4, 1)


@pytest.mark.parametrize(
    "other",
    [
        Case(batch=1, heads=2, nq=20, head_dim=16, dtype=torch.bfloat16),
        Case(batch=1, heads=2, nq=20, head_dim=24),
        Case(batch=1, heads=2, nq=20, head_dim=16, mask="holes"),
        Case(batch=1, heads=2, nq=20, head_dim=16, mask="blocks"),
        Case(batch=2, heads=2, nq=20, head_dim=16, packed=True),
        Case(batch=1, heads=2, nq=20, head_dim=16, dropout_p=0.3),
        Case(batch=1, heads=2, nq=20, head_dim=16, terms="none"),
    ],
    ids=lambda case: case.id,
)
def test_every_variant_has_a_test_of_its_own(kernels, other):
    chosen()
    before = kernels.forwards
    assert [chosen(other), chosen(other)] == ["triton", "triton"]
    assert kernels.forwards == before + 1


def test_lengths_and_layouts_are_no_variants(kernels):
    chosen()
    chosen(Case(batch=3, heads=5, nq=77, head_dim=16, layout="fused"))
    assert kernels.forwards == 1


@pytest.mark.parametrize("masks", ["none", "tokens", "pairs", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tiled_path_passes_with_every_mask_and_dtype(masks, dtype):
    variant = variants.Variant("torch", dtype, 32, masks, True, True, True, False, False)
    assert self_test._test(torch_tiled, variant, torch.device("cpu"), None) == ""


def test_rounding_to_tf32_is_right_where_it_is_asked_for_alone():
    def rounded(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def forward(problem):
        return torch_tiled.forward(problem.changed(v=rounded(problem.v * 1.0001)))

    variant = variants.Variant("torch", torch.float32, 32, "none", True, False, False, True, False)
    backend = SimpleNamespace(forward=forward)
    assert self_test._test(backend, variant, torch.device("cpu"), None) == ""
    assert "out is off by" in self_test._test(backend, variant._replace(tf32=False), torch.device("cpu"), None)


def test_the_settings_of_torch_make_another_variant():
    problem, matmul = inputs.problem(PLAIN), torch.backends.cuda.matmul
    assert not variants.variant_of("triton", problem, True).tf32
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert variants.variant_of("triton", problem, True).tf32
        assert not variants.variant_of("triton", inputs.problem(Case(nq=3, dtype=torch.float16)), True).tf32
    finally:
        matmul.fp32_precision = before
    torch.use_deterministic_algorithms(True)
    try:
        assert variants.variant_of("triton", problem, True).deterministic
        assert not variants.variant_of("triton", problem, False).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Wrong


def test_a_wrong_answer_is_one_warning_and_the_next_backend_answers(kernels):
    kernels.out = spoiled
    expected = call(backend="torch")[0]
    with pytest.warns(dk.DebertaKernelsWarning) as told:
        found = call()[0]
    assert torch.equal(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call()[0], expected)
    assert kernels.forwards == 1
    (message,) = (str(x.message) for x in told)
    for part in (
        "runs backend 'torch', a slower one, because backend 'triton': its self-test on this device failed: out is "
        "off by 1.0e-01 where ", " is allowed (float32 with head_dim 16; NVIDIA Made Up of capability 9.0, ",
        "deberta_kernels 1, torch 2, triton 3, cuda 13, driver 580.1); please report", "DEBERTA_KERNELS_SELF_TEST=0",
    ):  # fmt: skip
        assert part in message


def test_a_backend_named_or_strict_raises_with_the_reason(kernels):
    kernels.out = spoiled
    with pytest.raises(NotImplementedError, match=rf"backend='triton' cannot run this call: {FAILED}: out is off"):
        call(backend="triton")
    with pytest.raises(NotImplementedError, match=rf"runs backend 'torch'.*backend 'triton': {FAILED}"):
        chosen(strict=True)


def test_explain_says_it_without_warning(kernels):
    kernels.out = spoiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dispatch.explain(inputs.problem(PLAIN))
    assert found.chosen == "torch"
    assert found.reasons["triton"].startswith("its self-test on this device failed: out is off by")


def test_a_value_that_is_not_finite_is_wrong(kernels):
    kernels.out = lambda x: x.index_fill(2, torch.tensor([7]), float("nan"))
    with pytest.raises(NotImplementedError, match=r"failed: out \d+ values not finite"):
        chosen(backend="triton")


def test_a_crash_is_a_wrong_answer(kernels):
    def crash(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    kernels.out = crash
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=rf"{FAILED}: it raised RuntimeError: CUDA error: an illegal"):
            chosen(backend="triton")
    assert kernels.forwards == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), OSError(28, "No space left on device"),
              RuntimeError("Triton Error [CUDA]: out of memory")], ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_failure_that_passes_is_not_remembered(kernels, error):
    def fail(x):
        raise error

    kernels.out = fail
    with pytest.raises(NotImplementedError, match=r"could not run now \(.*\); DEBERTA_KERNELS_SELF_TEST=0 turns"):
        chosen(backend="triton")
    kernels.out = lambda x: x
    assert chosen(backend="triton") == "triton"


def test_wrong_gradients_refuse_calls_that_need_them(kernels):
    kernels.dk = spoiled
    assert chosen(backend="triton") == "triton"
    with pytest.raises(NotImplementedError, match=rf"{FAILED}: dk is off by .* gradients; NVIDIA"):
        call(backend="triton", grad=True)
    assert chosen(backend="triton") == "triton"


def test_a_compiled_graph_takes_the_gradients_of_the_next_backend(kernels):
    """Its forward chooses among tensors of which none says that it needs a gradient."""
    kernels.dk = spoiled
    arguments = inputs.problem(PLAIN).arguments()
    out, lse = torch.ops.deberta_kernels.attention(*arguments, "auto")
    assert kernels.forwards == 2
    with pytest.warns(dk.DebertaKernelsWarning, match="dk is off by"):
        found = torch.ops.deberta_kernels.attention_backward(
            torch.ones_like(out), None, out, lse, *arguments, "auto", [True] * 5
        )
    right = torch.ops.deberta_kernels.attention_backward(
        torch.ones_like(out), None, out, lse, *arguments, "torch", [True] * 5
    )
    assert torch.equal(found[1], right[1])


# ---- What is kept


def test_a_proof_is_kept_for_later_processes(kernels, monkeypatch):
    chosen()
    new_process(monkeypatch)
    chosen()
    assert kernels.forwards == 1
    assert self_test.status()["kept"] == 1


@pytest.mark.parametrize("changed", [*(name for name in IDENTITY if name != "backend")])
def test_a_proof_is_worth_nothing_elsewhere(kernels, monkeypatch, changed):
    chosen()
    new_process(monkeypatch)
    monkeypatch.setitem(IDENTITY, changed, "another")
    chosen()
    assert kernels.forwards == 2


def test_a_damaged_file_is_no_proof(kernels, monkeypatch, tmp_path):
    chosen()
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    new_process(monkeypatch)
    chosen()
    assert kernels.forwards == 2


def test_a_wrong_answer_is_not_kept(kernels, monkeypatch):
    kernels.out = spoiled
    with pytest.warns(dk.DebertaKernelsWarning, match=FAILED):
        assert chosen() == "torch"
    new_process(monkeypatch)
    kernels.out = lambda x: x
    assert chosen() == "triton"


def test_without_a_folder_every_process_tests(kernels, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen() == "triton"
        new_process(monkeypatch)
    assert kernels.forwards == 2
    assert self_test.status()["kept"] == 0


def test_without_a_home_nothing_is_kept(kernels, monkeypatch):
    monkeypatch.setattr(env, "cache_folder", lambda: None)
    assert chosen() == "triton"


# ---- Committed results


def test_a_committed_result_makes_the_test_unnecessary(kernels, monkeypatch):
    row = {name: IDENTITY[name] for name in ("backend", "device", "capability", "triton", "kernels")}
    monkeypatch.setattr(record, "covered", lambda: [{**row, "result": "some.json"}])
    assert chosen() == "triton"
    assert kernels.forwards == 0
    monkeypatch.setitem(IDENTITY, "triton", "4")
    assert chosen(Case(nq=3)) == "triton"
    assert kernels.forwards == 1


def unfounded(rows):
    """Return the rows that no committed result bears out."""
    return [row for row in rows if not _borne_out(row)]


def _borne_out(row):
    if not {"backend", "device", "capability", "kernels", "result"} <= set(row):
        return False
    path = ROOT / "benchmarks" / "results" / row["result"]
    if not path.is_file():
        return False
    proven = json.loads(path.read_text()).get("proven", [])
    return {name: value for name, value in row.items() if name != "result"} in proven


def test_every_row_is_borne_out_by_its_result(monkeypatch):
    assert unfounded(record.covered()) == []
    row = {"backend": "triton", "device": "x", "capability": "9.0", "kernels": "abc", "result": "x/gpu.json"}
    assert unfounded([row, {"device": "x"}]) == [row, {"device": "x"}]


def test_the_digest_is_of_the_source_of_a_backend():
    digests = {name: record._digest(name) for name, x in backends.REGISTRY.items() if x.self_tested}
    assert len(set(digests.values())) == len(digests) == 2


# ---- Turned off


def test_a_variable_turns_it_off(kernels, monkeypatch):
    monkeypatch.setenv(env.SELF_TEST, "0")
    assert chosen() == "triton"
    assert kernels.forwards == 0


def test_turned_off_even_a_wrong_backend_answers(kernels, monkeypatch):
    kernels.out = spoiled
    with pytest.warns(dk.DebertaKernelsWarning, match=FAILED):
        assert chosen() == "torch"
    monkeypatch.setenv(env.SELF_TEST, "0")
    assert chosen() == "triton"


def test_another_value_is_an_error(kernels, monkeypatch):
    monkeypatch.setenv(env.SELF_TEST, "off")
    with pytest.raises(ValueError, match=r"DEBERTA_KERNELS_SELF_TEST must be 0 or 1, got 'off'; unset it"):
        chosen()
    assert self_test.status()["on"].startswith("DEBERTA_KERNELS_SELF_TEST must be")


# ---- Who calls, and when


def test_threads_wait_for_one_test(kernels):
    inside, most = [], []

    def slow(x):
        inside.append(None)
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()
        return x

    kernels.out = slow
    found = []
    cases = [PLAIN, PLAIN, Case(nq=5), Case(nq=5)]
    threads = [threading.Thread(target=lambda case=case: found.append(chosen(case))) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 4
    assert most == [1, 1]


def test_a_forked_child_has_a_lock_of_its_own(monkeypatch):
    monkeypatch.setattr(self_test, "_lock", threading.RLock())
    held = threading.Thread(target=self_test._lock.acquire)
    held.start()
    held.join()
    self_test._renew_lock()
    assert self_test._lock.acquire(blocking=False)


def test_a_capture_is_not_disturbed(kernels, monkeypatch):
    monkeypatch.setattr(self_test, "_capturing", lambda device: True)
    with pytest.raises(NotImplementedError, match=r"while a CUDA graph is captured; make one such call before"):
        chosen(backend="triton")
    assert kernels.forwards == 0
    monkeypatch.setattr(self_test, "_capturing", lambda device: False)
    assert chosen() == "triton"
    monkeypatch.setattr(self_test, "_capturing", lambda device: True)
    assert chosen() == "triton"


def test_tensors_without_values_are_not_tested(kernels):
    with FakeTensorMode() as mode:
        q = mode.from_tensor(inputs.problem(PLAIN).q)
        assert dispatch.choose(inputs.problem(PLAIN).changed(q=q, k=q, v=q)) == "triton"
    assert kernels.forwards == 0


class _Seen(TorchDispatchMode):
    """A mode that sees operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_nothing_of_the_caller_reaches_the_test(kernels):
    states = []

    def noted(x):
        states.append(
            (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_inference(x),
             torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack())
        )  # fmt: skip
        return x

    def packed(x):
        raise AssertionError("a tensor of the test was saved for the caller")

    kernels.out = noted
    problem = inputs.problem(PLAIN).changed(q=inputs.problem(PLAIN).q.requires_grad_())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    mode = _Seen()
    hooks = torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), hooks, torch.device("meta"), mode:
        assert dispatch.choose(problem) == "triton"
    assert states == [(False, False, False, 0, 0)]
    assert mode.seen == []
    assert torch.equal(torch.get_rng_state(), state)
    assert kernels.backwards == 1
    assert problem.q.grad is None


def test_transforms_and_another_default_dtype_do_not_reach_the_test(kernels):
    problem = inputs.problem(PLAIN)

    def inside(x):
        assert dispatch.choose(problem) == "triton"
        return x.sum()

    torch.set_default_dtype(torch.float16)
    try:
        torch.vmap(torch.func.grad(inside))(torch.ones(2, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert kernels.forwards == 1


def test_a_thread_that_cannot_start_passes(kernels, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NotImplementedError, match=r"could not run now \(RuntimeError: can't start new thread\)"):
            chosen(backend="triton")
    assert chosen() == "triton"


def test_the_cpu_is_no_concern_of_it(monkeypatch):
    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(self_test, "refusal", never)
    assert dispatch.choose(inputs.problem(PLAIN), "torch") == "torch"
