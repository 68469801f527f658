"""The static time model: tiles are counted right, and units bound a tile as they should."""

import json

import predict
import pytest


@pytest.mark.parametrize("length", [64, 100, 512, 1024, 8192])
def test_every_tile_is_near_or_far(length):
    near, far = predict.tiles(length)
    count = -(-length // 64)
    assert near + far == count**2
    assert near == sum(abs(i - j) <= 8 for i in range(count) for j in range(count))


def counts(**values):
    return {**dict.fromkeys(("instructions", "matrix", "shared_loads", "shared_stores", "local_loads"), 0), **values}


def test_the_longest_unit_bounds_a_tile():
    one = predict.cycles({**counts(instructions=1000), "local_stores": 0}, 0)
    assert one == pytest.approx(1000 + 0.5 * 256)  # 64 * 64 exponentials, 16 a cycle
    more = predict.cycles({**counts(instructions=1000, matrix=8), "local_stores": 0}, 0)
    assert more > one


def test_the_program_prints_both_directions(tmp_path, capsys):
    loop = {**counts(instructions=900, matrix=20, shared_loads=60), "local_stores": 1}
    report = {"near": loop, "far": {**loop, "instructions": 300, "matrix": 8}}
    names = [f"{kernel} bf16 D64 bias" for kernel in ("fwd_kernel", "bwd_dq_kernel", "bwd_dkv_kernel")]
    names += ["fwd_kernel bf16 D64 none", "bwd_position_kernel bf16 D64 none"]
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"records": [{"chip": "sm_90", "name": name, "report": report} for name in names]}))
    assert predict.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["near", "far"]
    assert lines[-1].split()[0] == "8192"
    path.write_text(json.dumps({"records": []}))
    with pytest.raises(SystemExit, match="run kernels_offline"):
        predict.main([str(path)])
