"""The time model of the CUDA forward: passes are counted right, and units bound a pass as they should."""

import predict_cuda
import pytest
from offline.counting import Counts


@pytest.mark.parametrize("length", [512, 1024, 8192])
def test_every_pass_is_near_or_far(length):
    near, far = predict_cuda.passes(length)
    assert near + far == (length // 64) ** 2
    # A tile of 128 queries is near where one of its two passes of 64 is, so a few more are than must be.
    assert near >= sum(abs(i - j) <= 8 for i in range(length // 64) for j in range(length // 64))
    assert far == 0 or length > 512


def test_the_longest_unit_bounds_a_pass():
    idle = predict_cuda.cycles(Counts(shared_loads=1), 0, 0)
    assert idle == 256  # 64 x 64 exponentials, 16 a cycle
    assert predict_cuda.cycles(Counts(instructions=1000, shared_loads=1), 0, 0) == 1000 + 0.5 * 256
    # 100 stores by 4 warps, one wavefront each.
    assert predict_cuda.cycles(Counts(shared_loads=1, shared_stores=100), 0, 0) == 400 + 0.5 * 256


def test_the_program_prints_its_estimates(monkeypatch, capsys):
    loop = Counts(instructions=520, matrix=20, shared_loads=33, shared_stores=64)
    report = predict_cuda.cuda.CudaReport(168, 0, 0, 0, loop, Counts(instructions=260, matrix=8, shared_loads=1))
    monkeypatch.setattr(predict_cuda.cuda, "compile_module", lambda *_: {predict_cuda.KERNEL: report})
    assert predict_cuda.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(predict_cuda.LENGTHS)
