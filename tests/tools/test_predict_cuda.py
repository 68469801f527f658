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
    nothing = predict_cuda.Pass(0, 0)
    assert predict_cuda.cycles(Counts(), nothing) == 256  # 64 x 64 exponentials, 16 a cycle
    assert predict_cuda.cycles(Counts(instructions=1000), nothing) == 1000 + 0.5 * 256
    # 100 wavefronts of each of 4 warps.
    assert predict_cuda.cycles(Counts(wavefronts=100), nothing) == 400 + 0.5 * 256
    # 24,000 bytes at 24 a cycle from L2, and at 128 a cycle from shared memory.
    added = predict_cuda.Pass(0, 0, 24_000)
    assert predict_cuda.cycles(Counts(), added) == 1000 + 0.5 * 256 + 0.25 * 24_000 / 128


def test_the_program_prints_its_estimates(monkeypatch, capsys):
    loop = Counts(instructions=520, matrix=20, wavefronts=128)
    report = predict_cuda.cuda.CudaReport(168, 0, 0, 0, loop, Counts(instructions=260, matrix=8))
    monkeypatch.setattr(
        predict_cuda.cuda, "compile_module", lambda spec: {f"disentangled_{spec.which}_bf16_d64": report}
    )
    assert predict_cuda.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + len(predict_cuda.LENGTHS)
    # 12 heads of 32 sequences, each of 64 near passes.
    near = predict_cuda.cycles(loop, predict_cuda.FORWARD[0])
    assert f"{1e3 * 384 * 64 * near / (132 * 1.755e9):.3f}" in lines[4]
