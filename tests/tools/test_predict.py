"""The time model and the predictions: tiles are counted right, units bound a tile, the document is current."""

import predict
import pytest
from counted import model

from deberta_kernels.types import PositionSpec

SPEC = PositionSpec()
NOTHING = dict.fromkeys(("instructions", "matrix", "special", "wavefronts", "operands", "engine", "sectors"), 0)


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("length", [128, 512, 1024, 8192])
def test_every_tile_is_near_or_far(length, rows):
    near, far = model.tiles(length, rows, SPEC)
    assert near + far == (length // 64) ** 2
    # A tile is near where one of its pairs is closer than what saturates.
    ends = model.ends_of(model.position_index(1 << 14, SPEC))
    distances = [
        (i - j - 63, i - j + rows - 1) for i in range(0, length, rows) for j in range(0, length, 64)
    ]  # fmt: skip
    expected = sum(low < ends.high_start and high > ends.low_end for low, high in distances)
    assert near == expected * rows // 64


def test_units():
    figures = {**NOTHING, "instructions": 700, "matrix": 20, "special": 32, "wavefronts": 800, "operands": 100}
    found = model.units({**figures, "engine": 1280, "sectors": 75})
    assert found == {"issue": 700, "matrix": 640, "exponentials": 256, "shared": 910, "l2": 100}
    compiled = model.units(figures, 950, 30)
    assert (compiled["issue"], compiled["shared"]) == (950, 1020)


def test_the_longest_unit_bounds_a_tile():
    assert model.cycles({"a": 100, "b": 1000, "c": 400, "d": 40}) == 1000 + 200 + 25


def test_a_time_is_the_sum_of_tiles_and_programs():
    work = model.Work(near=1000, far=100, program=10, rows=64)
    near, far = model.tiles(2048, 64, SPEC)
    cycles = 12 * 8 * (1000 * near + 100 * far + 10 * 32)
    found = model.milliseconds(work, 2048, heads=12, tokens=16384, spec=SPEC)
    assert found == pytest.approx(1e3 * cycles / (132 * 1.755e9))


def test_the_document_states_what_is_predicted_now():
    document = predict.DOCUMENT.read_text(encoding="utf-8")
    assert predict.written(document, predict.text()) == document, "run python tools/predict.py --write"


def test_it_is_said_that_predictions_are_no_measurements():
    text = predict.text()
    assert text.count("predicted:") == len(predict.newest("triton")) + 1 >= 3


def test_what_is_missing_is_named():
    with pytest.raises(
        SystemExit, match=r"no committed figures of fwd_kernel, near for triton 1\.0; run make count-ptx"
    ):
        predict.Figures("triton 1.0").zone("fwd_kernel", "near")
    with pytest.raises(SystemExit, match=r"has no <!-- tools/predict\.py begins -->"):
        predict.written("text", "tables")


def test_the_program_writes_its_tables(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.md"
    path.write_text(f"before\n{predict.BEGIN}old{predict.END}\nafter\n")
    monkeypatch.setattr(predict, "DOCUMENT", path)
    assert predict.main(["--write"]) == 0
    assert path.read_text() == f"before\n{predict.BEGIN}\n\n{predict.text()}\n\n{predict.END}\nafter\n"
    assert predict.main([]) == 0
    assert capsys.readouterr().out == predict.text() + "\n"
