"""Classify files of texts with Ray Data, on all cores of this machine or of a cluster, and go on where a run was ended.

    python examples/batch_inference.py --model DIRECTORY_OR_HUB_ID --input reviews.csv --column review --output scores
    python examples/batch_inference.py ... --address 10.0.0.1:6379      # a Ray cluster; all files on shared disks

The output is a directory of Parquet files, one for each part of the input; `pandas.read_parquet(directory)` reads it.
The same command again classifies only what is missing. It needs: pip install 'ray[data]' pandas
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Any

# Before Ray is imported: it reports how it is used otherwise.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from classifier import DTYPES, Classifier, check_model, cores, digest
from file_parts import SUFFIXES, Part, cut, find_files, read

__all__ = ["main"]

JOB = "_job.json"  # readers of a directory of Parquet leave out what begins with _ or .


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; leave with a message that names what is wrong."""
    parser = argparse.ArgumentParser(description="Classify files of texts with Ray Data.", allow_abbrev=False)
    parser.add_argument("--model", required=True, type=expanduser, help="directory or hub id of a sequence classifier")
    files = f"files or directories: {', '.join(SUFFIXES)}"
    parser.add_argument("--input", required=True, type=expanduser, nargs="+", help=files)
    parser.add_argument("--column", default="text", help="that holds the texts; plain lines (.txt) have `text` alone")
    parser.add_argument("--keep", nargs="*", default=[], metavar="COLUMN", help="columns to copy into the output")
    parser.add_argument("--output", required=True, type=Path, help="directory for Parquet files")
    parser.add_argument("--address", help="of a Ray cluster, host:port or auto; default: this machine alone")
    parser.add_argument("--actors", type=int, help="processes with a model each; default: one for each 4 cores")
    parser.add_argument("--threads", type=int, help="of PyTorch in each actor; default: cores / actors")
    parser.add_argument("--batch-size", type=int, default=32, help="texts of one forward")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text; the rest is cut off")
    parser.add_argument("--rows-per-part", type=int, default=2000, help="rows of a Parquet file; what a kill costs")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--no-patch", action="store_true", help="run the stock model")
    options = parser.parse_args(arguments)
    for name in ("actors", "threads", "batch_size", "rows_per_part"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if options.max_length < 3:
        parser.error(f"--max-length must be 3 or more (two tokens are [CLS] and [SEP]), got {options.max_length}")
    names = ["file", "row", "label", "score", "truncated"]
    for column in options.keep:
        if column in names:
            parser.error(f"--keep {column}: the output has a column of that name; rename it in the input")
    try:
        check_model(options.model)
        options.files = find_files(options.input)
        if Path(options.model).is_dir():
            options.model = str(Path(options.model).absolute())  # an actor may run in another directory
        options.output = options.output.expanduser().absolute()
        if options.output.exists() and not options.output.is_dir():
            raise ValueError(f"--output must be a directory, {options.output} is a file.")
    except ValueError as error:
        parser.error(str(error))
    return options


def parts_of(options: argparse.Namespace) -> list[tuple[Part, str]]:
    """Read the input once; return its parts, each with the name of its file in the output."""
    found = []
    for number, path in enumerate(options.files):
        for part in cut(path, [options.column, *options.keep], options.rows_per_part):
            found.append((part, f"part-{number:05}-{part.row:012}.parquet"))
    return found


def check_job(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the output is made of, once that is compared with what an earlier run noted there.

    Raises:
        ValueError: the output is of another model, input or setting.
    """
    files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in options.files]
    settings = ("column", "keep", "max_length", "rows_per_part", "dtype", "no_patch")
    job = {"model": digest(options.model), "input": files, **{name: getattr(options, name) for name in settings}}
    note = options.output / JOB
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if changed := [name for name in job if json.loads(json.dumps(job[name])) != before.get(name)]:
            raise ValueError(
                f"--output {options.output} holds results of another job: {', '.join(changed)} changed since. "
                "Name another directory, or delete this one."
            )
    elif any(not path.name.startswith(".") for path in options.output.glob("*")):
        raise ValueError(f"--output {options.output} is not empty, and no earlier run of this program made it.")
    return job


def prepare(options: argparse.Namespace, job: dict[str, Any]) -> None:
    """Make the output, note the job in it, and delete what a run that was killed had not finished."""
    options.output.mkdir(parents=True, exist_ok=True)
    for leftover in options.output.glob(".*.parquet.*"):
        leftover.unlink()
    write_beside(options.output / JOB, lambda path: path.write_text(json.dumps(job, indent=1), encoding="utf-8"))


def write_beside(path: Path, write: Any) -> None:
    """Write a file under another name, and rename it once it is whole."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write(beside)
    os.replace(beside, path)


class ClassifyParts:
    """What each actor is: a patched model, which reads parts of the input and writes their answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.classifier = Classifier(
            options.model, options.threads, options.max_length, options.dtype, patch=not options.no_patch
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the parts of a batch; return how many rows each had, for the progress."""
        rows = [self.do(Part(**json.loads(part)), name) for part, name in zip(batch["part"], batch["name"])]
        return {"rows": [found[0] for found in rows], "empty": [found[1] for found in rows]}

    def do(self, part: Part, name: str) -> tuple[int, int]:
        """Classify one part, and write its file; return the number of rows, and of those without a text."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = read(part, [self.options.column, *self.options.keep])
        texts = columns.pop(self.options.column)
        there = [number for number, text in enumerate(texts) if text and text.strip()]
        answers: list[Any] = [None] * len(texts)
        for start in range(0, len(there), self.options.batch_size):
            chosen = there[start : start + self.options.batch_size]
            for number, answer in zip(chosen, self.classifier([texts[number] for number in chosen])):
                answers[number] = answer
        kinds = {"label": pa.string(), "score": pa.float32(), "truncated": pa.bool_()}
        table = {"file": pa.array([part.path] * len(texts)), "row": pa.array(range(part.row, part.row + len(texts)))}
        table |= {key: pa.array([answer and answer[key] for answer in answers], kind) for key, kind in kinds.items()}
        table |= {column: _kept(part, values) for column, values in columns.items()}
        write_beside(self.options.output / name, lambda path: pq.write_table(pa.table(table), path))
        return len(texts), len(texts) - len(there)


def _kept(part: Part, values: list[Any]) -> Any:
    """Return a kept column; what a text file holds as text, since types guessed part by part would differ."""
    import pyarrow as pa

    if part.path.endswith(".parquet"):
        return pa.array(values)
    plain = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(plain, pa.string())


def settle(options: argparse.Namespace, count: int) -> None:
    """Set the numbers of actors and threads that were not given, for so many cores.

    Raises:
        ValueError: there are fewer cores than the actors would take; Ray would wait for them for ever.
    """
    if options.actors is None:
        options.actors = max(1, count // (options.threads or 4))
    if options.threads is None:
        options.threads = max(1, count // options.actors)
    if options.actors * options.threads > count:
        raise ValueError(
            f"--actors {options.actors} x --threads {options.threads} need {options.actors * options.threads} cores, "
            f"there are {count}."
        )


def start_ray(options: argparse.Namespace) -> Any:
    """Start Ray on this machine, or join a cluster."""
    if not options.address:
        settle(options, cores())
    import logging

    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress and plans; what goes wrong is raised
    if options.address:
        code = {"working_dir": str(Path(__file__).parent)}  # this program, for the machines of the cluster
        ray.init(options.address, runtime_env=code, logging_level="warning")
        settle(options, int(ray.cluster_resources().get("CPU", 1)))
    else:
        small = 100_000_000  # names of files and counts are all that goes through Ray's memory
        ray.init(
            "local", num_cpus=cores(), include_dashboard=False, logging_level="warning", object_store_memory=small
        )  # not a cluster that happens to run here
    return ray


def run(options: argparse.Namespace, ray: Any, parts: list[tuple[Part, str]]) -> int:
    """Classify parts; show the progress; return the number of rows without a text."""
    items = [{"part": json.dumps(vars(part)), "name": name} for part, name in parts]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a line of our own says what is left, in logs too
    results = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
        ClassifyParts, batch_size=1, num_cpus=options.threads, fn_constructor_args=(options,),
        compute=ray.data.ActorPoolStrategy(size=options.actors),
    )  # fmt: skip
    total, rows, empty = sum(part.count for part, _ in parts), 0, 0
    first, start, said = 0, 0.0, 0.0
    for result in results.iter_rows():
        rows, empty, now = rows + result["rows"], empty + result["empty"], time.monotonic()
        if not start:  # the time before is that of processes which start and models which load
            first, start = rows, now
        elif now - said > 2 or rows == total:
            rate = max(rows - first, 1) / (now - start)
            left = f"{(total - rows) / rate / 60:.1f} minutes left" if rows < total else "all done"
            print(f"{rows:,} of {total:,} rows, {rate:,.0f} a second, {left}", flush=True)
            said = now
    return empty


def main(arguments: list[str] | None = None) -> int:
    """Do the job, or the rest of it."""
    options = parse(arguments)
    if absent := [name for name in ("ray", "pandas", "pyarrow") if find_spec(name) is None]:
        print(f"batch_inference.py: error: no {', '.join(absent)}: pip install 'ray[data]' pandas", file=sys.stderr)
        return 2
    try:
        parts = parts_of(options)
        job = check_job(options)
    except ValueError as error:
        print(f"batch_inference.py: error: {error}", file=sys.stderr)
        return 2
    done = {path.name for path in options.output.glob("part-*.parquet")}
    missing = [(part, name) for part, name in parts if name not in done]
    plural = "" if len(parts) == 1 else "s"
    print(f"{len(parts)} part{plural}, {len(parts) - len(missing)} of them done by an earlier run", flush=True)
    if missing:
        try:
            ray = start_ray(options)
            prepare(options, job)
            print(f"{options.actors} actors with {options.threads} threads each", flush=True)
            empty = run(options, ray, missing)
        except (ImportError, ValueError, ConnectionError) as error:
            print(f"batch_inference.py: error: {error}", file=sys.stderr)
            return 2
        if empty:
            print(f"{empty:,} rows have no text; their label is null")
    print(f"done: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
