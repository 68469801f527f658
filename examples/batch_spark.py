r"""Classify a column of texts with Spark: python examples/batch_spark.py --model DIRECTORY_OR_HUB_ID [--help].

    spark-submit --py-files examples/classifier.py examples/batch_spark.py --model /models/reviews \
        --input s3a://bucket/reviews --column review --output s3a://bucket/scores

The model must be where every machine finds it. Spark shows the output as finished (_SUCCESS) only once all of it is
written, and repeats the tasks of a machine that is lost. It needs: pip install pyspark pandas pyarrow
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from os.path import expanduser
from pathlib import Path
from typing import Any

from classifier import DTYPES, check_model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description="Classify a column of texts with Spark.", allow_abbrev=False)
    parser.add_argument("--model", required=True, type=expanduser, help="directory or hub id of a sequence classifier")
    parser.add_argument("--input", required=True, type=expanduser, help="Parquet: a file, a folder or an address")
    parser.add_argument("--column", default="text", help="that holds the texts")
    parser.add_argument("--output", required=True, type=expanduser, help="directory or address that does not exist yet")
    parser.add_argument("--master", help="of Spark, such as local[8]; default: spark-submit's, else this machine")
    parser.add_argument("--batch-size", type=int, default=32, help="texts of one forward")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text; the rest is cut off")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, got {options.batch_size}")
    if options.max_length < 3:
        parser.error(f"--max-length must be 3 or more, got {options.max_length}")
    try:
        check_model(options.model)
    except ValueError as error:
        parser.error(str(error))
    return options


def classify_with(options: argparse.Namespace, threads: int) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """Return what mapInPandas calls for each partition; the model is loaded and patched once a Python process."""

    def classify(frames: Iterator[Any]) -> Iterator[Any]:
        from classifier import shared

        classifier = shared(options.model, threads, options.max_length, options.dtype)
        for frame in frames:
            texts = frame[options.column].fillna("").tolist()
            answers = []
            for start in range(0, len(texts), options.batch_size):
                answers += classifier(texts[start : start + options.batch_size])
            yield frame.assign(label=[x["label"] for x in answers], score=[x["score"] for x in answers])

    return classify


def main(arguments: list[str] | None = None) -> int:
    """Do the job."""
    options = parse(arguments)
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DoubleType, StringType, StructType

    builder = SparkSession.builder.appName("deberta").config("spark.sql.execution.arrow.maxRecordsPerBatch", 1024)
    spark = (builder.master(options.master) if options.master else builder).getOrCreate()
    spark.sparkContext.addPyFile(str(Path(__file__).with_name("classifier.py")))
    # Spark runs one task for each spark.task.cpus cores: as many threads, or the tasks are in each other's way.
    threads = int(spark.conf.get("spark.task.cpus", "1"))
    rows = spark.read.parquet(options.input)
    if options.column not in rows.columns or {"label", "score"} & set(rows.columns):
        print(
            f"batch_spark.py: error: --input must have a column {options.column!r}, and none named label or score; "
            f"it has {', '.join(rows.columns)}",
            file=sys.stderr,
        )
        return 2
    schema = StructType(list(rows.schema.fields)).add("label", StringType()).add("score", DoubleType())
    rows.mapInPandas(classify_with(options, threads), schema).write.parquet(options.output)
    spark.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
