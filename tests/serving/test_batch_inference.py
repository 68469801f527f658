"""Batch inference: options, every kind of file, two actors, a kill and the run after it; nothing half-written."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.serving.conftest import EXAMPLES

pytestmark = pytest.mark.packages("ray")
PROGRAM = str(EXAMPLES / "batch_inference.py")
ROWS = 240


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> list[dict[str, Any]]:
    """Rows with quotes, commas, line breaks and umlauts, some without a text."""
    draw = (texts[number % len(texts)] for number in range(ROWS))
    return [
        {"id": f'é"{n}",', "review": "" if n % 50 == 7 else text.replace(" ", "\n", 2)} for n, text in enumerate(draw)
    ]


@pytest.fixture
def files(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The rows as CSV, and three each of the other kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "input"
    folder.mkdir()
    with (folder / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "review"])
        writer.writeheader()
        writer.writerows(rows)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows[:23]]
    (folder / "b.jsonl").write_text("\n".join([*lines[:11], "", *lines[11:]]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows[:37]), folder / "c.parquet", row_group_size=6)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def check(output: Path, expected: dict[str, list[dict[str, Any]]], same: Any) -> None:
    """Hold every row of the output to the stock model's answer, and the order to the input's."""
    import pyarrow.parquet as pq

    found = pq.read_table(output).to_pylist()
    assert [(row["file"], row["row"]) for row in found] == [
        (file, number) for file, rows in expected.items() for number in range(len(rows))
    ]
    for row, given in zip(found, (row for rows in expected.values() for row in rows)):
        assert row["id"] == given["id"]
        if given["review"]:
            same(given["review"], row)
        else:
            assert (row["label"], row["score"], row["truncated"]) == (None, None, None)
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


def test_a_killed_run_is_gone_on_with(checkpoint, files, rows, tmp_path, same):
    needs.package("ray")
    output = tmp_path / "scores"
    job = ["--model", checkpoint, "--input", str(files), "--column", "review", "--keep", "id", "--output", str(output)]
    job += ["--actors", "2", "--threads", "1", "--rows-per-part", "3"]
    process = subprocess.Popen(
        [sys.executable, PROGRAM, *job], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 200
    while not (early := list(output.glob("part-*"))) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert early, printed
    assert "done by an earlier run" in printed
    done: dict[Path, int] = {}
    while done != (now := {path: path.stat().st_mtime_ns for path in output.glob("part-*")}):
        done = now
        time.sleep(1.0)  # Ray's processes notice, and end
    assert 0 < len(done) < 101
    (output / ".part-00000-000000000000.parquet.1").write_bytes(b"half")

    again = run(*job)
    assert again.returncode == 0, again.stderr
    assert f"101 parts, {len(done)} of them done by an earlier run" in again.stdout
    assert "2 actors with 1 threads each" in again.stdout
    assert re.search(r"[\d,]+ of [\d,]+ rows, [\d,]+ a second, all done", again.stdout)
    assert "rows have no text; their label is null" in again.stdout
    assert "usage stat" not in (again.stdout + again.stderr).lower()
    assert {path: path.stat().st_mtime_ns for path in done} == done
    check(
        output,
        {str(files / "a.csv"): rows, str(files / "b.jsonl"): rows[:23], str(files / "c.parquet"): rows[:37]},
        same,
    )

    third = run(*job)
    assert (third.returncode, "101 of them done" in third.stdout, "actors" in third.stdout) == (0, True, False)
    other = run(*job, "--max-length", "64")
    assert other.returncode == 2
    assert "holds results of another job: max_length changed since" in other.stderr


def test_parts_are_read_where_they_begin(files, rows, write):
    from file_parts import cut, read

    for path, count in (("a.csv", ROWS), ("b.jsonl", 23), ("c.parquet", 37)):
        parts = cut(str(files / path), ["review", "id"], 5)
        assert [part.row for part in parts] == list(range(0, count, 5))
        for part in reversed(parts):
            found = read(part, ["review", "id"])
            assert found["review"] == [row["review"] for row in rows[part.row : part.row + part.count]]
            assert found["id"] == [row["id"] for row in rows[part.row : part.row + part.count]]
    plain = write("plain.txt", "one\n\ntwo words\r\nthree")
    assert [read(part, ["text"])["text"] for part in cut(plain, ["text"], 2)] == [["one", ""], ["two words", "three"]]
    assert cut(write("empty.csv", "text\n"), ["text"], 2) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "title,body\na,b\n", "has no column 'review'; it has 'title', 'body'"),
        ("a.csv", "review\n1,2\n", "a.csv, line 2: more values than the header has"),
        ("a.csv", 'review\n"open', "a.csv, line 2: unexpected end of data"),
        ("a.jsonl", '{"text": "a"}\n', "has no column 'review'; it has 'text'"),
        ("a.jsonl", '{"review": "a"}\n{"review"\n', "a.jsonl, line 2: Expecting ':' delimiter"),
        ("a.jsonl", '{"review": "a"}\n\n{"review": 3}\n', "a.jsonl, line 3: 'review' must be a string, got int"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: a JSON object per line is expected"),
        ("a.txt", "a line\n", "has no column 'review'; it has 'text'"),
        ("a.parquet", "no", "a.parquet: no Parquet file"),
        ("a.doc", "no", "must end in .csv, .tsv, .jsonl, .parquet, .txt; rename or convert it"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(checkpoint, write, tmp_path, name, content, message, capsys):
    import batch_inference

    output = tmp_path / "scores"
    job = ["--model", checkpoint, "--input", write(name, content), "--column", "review", "--output", str(output)]
    with pytest.raises(SystemExit) as left:
        sys.exit(batch_inference.main(job))
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_wrong_bytes_are_named(tmp_path):
    from file_parts import cut

    (tmp_path / "a.csv").write_bytes(b"review\ngood\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: not UTF-8 \(invalid start byte\)"):
        cut(str(tmp_path / "a.csv"), ["review"], 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "no/such/directory"], "--model must be a directory or a hub id such as owner/name"),
        (["--input", "none.csv"], "--input none.csv: there is no such file or directory"),
        (["--input", str(EXAMPLES)], "has no file that ends in .csv"),
        (["--actors", "0"], "--actors must be 1 or more, got 0"),
        (["--max-length", "1"], "--max-length must be 3 or more"),
        (["--keep", "label"], "--keep label: the output has a column of that name"),
        (["--output", PROGRAM], "--output must be a directory"),
    ],
)
def test_wrong_options_are_named(checkpoint, write, tmp_path, wrong, message, capsys):
    import batch_inference

    right = ["--model", checkpoint, "--input", write("a.txt", "a\n"), "--output", str(tmp_path / "scores")]
    with pytest.raises(SystemExit) as left:
        batch_inference.main([*right, *wrong])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_packages_that_are_missing_are_named_before_the_input_is_read(checkpoint, write, tmp_path, capsys, monkeypatch):
    import batch_inference

    monkeypatch.setattr(batch_inference, "find_spec", lambda name: None if name == "ray" else name)
    monkeypatch.setattr(batch_inference, "parts_of", pytest.fail)
    job = ["--model", checkpoint, "--input", write("a.txt", "one\n"), "--output", str(tmp_path / "output")]
    assert batch_inference.main(job) == 2
    assert "error: no ray: pip install 'ray[data]' pandas" in capsys.readouterr().err


def test_a_directory_of_others_is_not_written_into(checkpoint, write, tmp_path, capsys):
    import batch_inference

    write("precious.parquet", "mine")
    job = ["--model", checkpoint, "--input", write("a.txt", "a\n"), "--output", str(tmp_path)]
    assert batch_inference.main(job) == 2
    assert "is not empty, and no earlier run of this program made it" in capsys.readouterr().err


def test_more_actors_than_cores_are_refused(checkpoint, write, tmp_path, capsys):
    import batch_inference

    job = ["--model", checkpoint, "--input", write("a.txt", "a\n"), "--output", str(tmp_path / "scores")]
    assert batch_inference.main([*job, "--actors", "900"]) == 2
    assert "--actors 900 x --threads 1 need 900 cores, there are" in capsys.readouterr().err
