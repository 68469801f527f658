"""Files of texts cut into parts that can be read on their own: CSV, JSON lines, Parquet, plain lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SUFFIXES", "Part", "cut", "find_files", "read"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Some rows of a file.

    Attributes:
        path: the file.
        row: number of the first row, from 0; the header of a CSV is none.
        count: rows.
        offset: byte at which the first row begins; unused for Parquet.
    """

    path: str
    row: int
    count: int
    offset: int


def find_files(names: Iterable[str]) -> list[str]:
    """Return the absolute paths of the files that are named, and of those in the directories that are, in order.

    Raises:
        ValueError: one is not there, or of no known kind.
    """
    found: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(str(file) for file in path.iterdir() if file.suffix in SUFFIXES)
            if not inside:
                raise ValueError(f"--input {name} has no file that ends in {', '.join(SUFFIXES)}.")
            found += inside
        elif not path.is_file():
            raise ValueError(f"--input {name}: there is no such file or directory.")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"--input {name} must end in {', '.join(SUFFIXES)}; rename or convert it.")
        else:
            found.append(name)
    return [str(Path(name).absolute()) for name in found]


class _Lines:
    """The lines of a file from a byte on, as text, and where each ends."""

    def __init__(self, path: str, offset: int = 0) -> None:
        self.path, self.offset, self.number = path, offset, 0

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for line in file:
                self.offset += len(line)
                self.number += 1
                try:
                    yield line.decode("utf-8-sig" if self.offset == len(line) else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{self.path}, line {self.number}: not UTF-8 ({error.reason}).") from error


def _csv_options(path: str) -> dict[str, Any]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131,072 characters that csv takes by default
    return {"delimiter": "\t" if path.endswith(".tsv") else ",", "skipinitialspace": True, "strict": True}


def _rows(path: str, lines: _Lines, header: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file that is read as text; after each, `lines.offset` is where the next begins."""
    try:
        if path.endswith((".csv", ".tsv")):
            reader = csv.DictReader(lines, header, **_csv_options(path))
            for row in reader:
                if None in row:
                    raise ValueError(f"{path}, line {lines.number}: more values than the header has.")
                yield row
        elif path.endswith(".jsonl"):
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}, line {lines.number}: a JSON object per line is expected.")
                    yield row
        else:
            yield from ({"text": line.rstrip("\r\n")} for line in lines)
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}, line {lines.number}: {error}.") from error


def _check_columns(path: str, there: Iterable[str], wanted: Iterable[str]) -> None:
    there = list(there)
    for column in wanted:
        if column not in there:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}.")


def cut(path: str, columns: list[str], rows: int) -> list[Part]:
    """Read a file once, and return its parts.

    Args:
        path: the file.
        columns: must be there; the first one holds the texts.
        rows: of a part; the last one may have fewer.

    Raises:
        ValueError: a column is not there, or a line cannot be read; with the file and the line.
    """
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
        except Exception as error:
            raise ValueError(f"{path}: no Parquet file ({error}).") from error
        _check_columns(path, file.schema_arrow.names, columns)
        kind = file.schema_arrow.field(columns[0]).type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise ValueError(f"{path}: {columns[0]!r} must be of type string, got {kind}.")
        total = file.metadata.num_rows
        return [Part(path, row, min(rows, total - row), 0) for row in range(0, total, rows)]
    lines, header = _Lines(path), None
    if path.endswith((".csv", ".tsv")):
        header = next(csv.reader(_Lines(path), **_csv_options(path)), [])
        _check_columns(path, header, columns)
        next(csv.reader(lines, **_csv_options(path)), None)
    parts: list[Part] = []
    begin, offset, number = 0, lines.offset, 0
    for row in _rows(path, lines, header):
        if number == 0 and header is None:
            _check_columns(path, row, columns)
        number += 1
        if not isinstance(row.get(columns[0]), str | None):
            kind = type(row[columns[0]]).__name__
            raise ValueError(f"{path}, line {lines.number}: {columns[0]!r} must be a string, got {kind}.")
        if number - begin == rows:
            parts.append(Part(path, begin, rows, offset))
            begin, offset = number, lines.offset
    return [*parts, Part(path, begin, number - begin, offset)] if number > begin else parts


def read(part: Part, columns: list[str]) -> dict[str, list[Any]]:
    """Return the columns of a part; None where a row has no such value."""
    if part.path.endswith(".parquet"):
        return _read_parquet(part, columns)
    header = None
    if part.path.endswith((".csv", ".tsv")):
        header = next(csv.reader(_Lines(part.path), **_csv_options(part.path)))
    rows = _rows(part.path, _Lines(part.path, part.offset), header)
    kept = [row for _, row in zip(range(part.count), rows)]
    return {column: [row.get(column) for row in kept] for column in columns}


def _read_parquet(part: Part, columns: list[str]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(part.path)
    groups, first, row = [], 0, 0
    for number in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(number).num_rows
        if row < part.row + part.count and row + size > part.row:
            first = first if groups else row
            groups.append(number)
        row += size
    table: pa.Table = file.read_row_groups(groups, columns=columns).slice(part.row - first, part.count)
    return {column: table[column].to_pylist() for column in columns}
