"""The same job with Spark, in two local tasks at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.serving.conftest import EXAMPLES

pytestmark = pytest.mark.packages("pyspark")


@pytest.fixture
def spark_in_a_process(checkpoint: str, tmp_path: Path):
    needs.package("pyspark")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / "batch_spark.py"), "--model", checkpoint, "--master", "local[2]"]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
        )

    return run


def test_spark_gives_the_stock_models_answers(spark_in_a_process, texts, tmp_path, same):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "input").mkdir()
    for number in range(4):
        rows = [{"id": i, "review": texts[i]} for i in range(number, 40, 4)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"input/{number}.parquet")
    job = ["--input", str(tmp_path / "input"), "--output", str(tmp_path / "scores"), "--batch-size", "4"]
    done = spark_in_a_process(*job, "--column", "review")
    assert done.returncode == 0, done.stderr[-4000:]
    found = pq.read_table(tmp_path / "scores").to_pylist()
    assert sorted(row["id"] for row in found) == list(range(40))
    for row in found:
        assert row["review"] == texts[row["id"]]
        same(row["review"], row)
    assert (tmp_path / "scores" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "no/such/directory"], "--model must be a directory or a hub id"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--max-length", "2"], "--max-length must be 3 or more, got 2"),
    ],
)
def test_wrong_options_are_named_before_spark_starts(checkpoint, wrong, message, capsys):
    import batch_spark

    with pytest.raises(SystemExit):
        batch_spark.main(["--model", checkpoint, "--input", "a", "--output", "b", *wrong])
    assert message in capsys.readouterr().err
