"""The library for aarch64 beside the one of this machine, on the same inputs."""

import os
import subprocess
import sys

import pytest
import torch

from deberta_kernels import native
from deberta_kernels.linear import products
from deberta_kernels.linear.hidden_dropout import drop_and_add
from deberta_kernels.native import absence
from deberta_kernels.testing import backends, budget, inputs
from deberta_kernels.testing.inputs import Case
from tests import emulation

ISAS = native.library_status()["variants"]
TARGET = next(target for target in backends.TARGETS if target.name == "cpu")
CASES = [
    Case(batch=2, heads=2, nq=150, head_dim=64, mask="right", dtype=dtype, dropout_p=dropout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for dropout in (0.0, 0.1)
]


@pytest.fixture
def beside(monkeypatch):
    """Compute with the library of this machine, then with each variant of the other; return all results by name."""
    own = native.Library(str(absence.INSTALLED))

    def run(compute):
        with monkeypatch.context() as patch:
            patch.setattr(native, "_library", own)
            results = {"x86": compute()}
        for isa in ISAS:
            with native.use_isa(isa):
                results[isa] = compute()
        return results

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention_and_its_gradients_differ_by_less_than_both_may_err(case, beside):
    problem = inputs.problem(case)
    against = budget.truth(problem, inputs.dout(case, problem), None)

    def compute():
        torch.manual_seed(case.seed)
        return budget.evaluate(TARGET.run, problem, against.dout, None)

    for name, results in beside(compute).items():
        report = budget.measure(results, against, f"{name} {case.id}")
        assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_differ_by_no_more_than_rounding(dtype, beside):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((45, 256), (64, 256), (64,)))

    def compute():
        isa = native.library_status()["isa"]
        suits = dtype == torch.float32 or isa.endswith("_bf16")
        return products.natively(x, weight, bias) if suits else None

    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    eager = (torch.nn.functional.linear(x, weight, bias).double() - exact).abs().max()
    results = {name: found for name, found in beside(compute).items() if found is not None}
    assert "neon_bf16" in results
    for name, found in results.items():
        error = (found.double() - exact).abs().max()
        assert error <= 2 * eager + torch.finfo(dtype).eps * exact.abs().max(), name


def test_dropout_keeps_the_same_elements_bit_for_bit(beside):
    x = torch.randn(20011, generator=torch.Generator().manual_seed(1))

    def compute():
        torch.manual_seed(2)
        return drop_and_add(torch.nn.Dropout(0.3), x, None)

    results = beside(compute)
    assert 0 < int((results["x86"] == 0).sum()) < x.numel()
    for name, found in results.items():
        assert torch.equal(found, results["x86"]), name


PRINT = "from deberta_kernels import native; print(*native.library_status()['variants'])"


@pytest.mark.parametrize(
    ("processor", "expected"),
    [("max", "neon_bf16 neon generic"), ("cortex-a72", "neon generic"), ("neoverse-n1", "neon generic")],
)
def test_the_variants_follow_the_processor(processor, expected):
    worker = os.environ[emulation.WORKER].replace("-cpu max", f"-cpu {processor}")
    done = subprocess.run(
        [sys.executable, "-c", PRINT], env={**os.environ, emulation.WORKER: worker}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == (expected, 0), done.stderr
