"""A GPU backend that is none, on a machine whose only device is new to everybody."""

from deberta_kernels import api, backends, dispatch, env, notices
from deberta_kernels.impl import torch_tiled
from deberta_kernels.impl.attempts import Attempts
from deberta_kernels.proof import record, self_test
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case

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


def installed(monkeypatch, cache):
    """Put that machine in the place of this one; return its backend "triton"."""
    found = Kernels()
    monkeypatch.setattr(self_test, "_TESTED_DEVICES", "cpu")
    new_process(monkeypatch)
    monkeypatch.setattr(record, "identity", lambda backend, device: dict(IDENTITY))
    monkeypatch.setattr(dispatch, "_loaded", {"triton": found})
    monkeypatch.setattr(dispatch, "order", lambda device_type: backends.order("cuda"))
    monkeypatch.setattr(notices, "_warned", set())
    monkeypatch.setenv(env.CACHE, str(cache))
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
    monkeypatch.setattr(self_test, "_attempts", Attempts())


def spoiled(x):
    return x + 0.1
