"""Keep the tables of docs/ecosystem.md: the tests fill them in, and hold what they see against them.

Each table stands between two comments that name it. A cell is a string that a test reports; `pytest --write-tables`
writes what was reported, and without that option a report that differs from the committed cell is an error. The line of
versions above a table belongs to the run that wrote it, and is not compared.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

__all__ = ["EcosystemTables"]

_NONE = "–"


class EcosystemTables:
    """Every table of one document.

    Args:
        path: the document.
        write: take reports over instead of comparing them.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self.write = write
        self._text = path.read_text(encoding="utf-8")
        self._packages: dict[str, dict[str, None]] = {}
        self._cells: dict[str, dict[str, dict[str, str]]] = {}

    def rows(self, table: str) -> list[str]:
        """Return the names of a table's rows."""
        return list(self._cells.setdefault(table, self._parse(table)))

    def report(self, table: str, packages: tuple[str, ...], row: str, column: str, value: str) -> None:
        """Report one cell.

        Args:
            table: name of the table.
            packages: whose versions stand above it.
            row: name of the row.
            column: name of the column.
            value: what a test saw.

        Raises:
            AssertionError: the committed cell says something else.
        """
        cells = self._cells.setdefault(table, self._parse(table))
        if self.write:
            cells.setdefault(row, {})[column] = value
            self._packages.setdefault(table, {}).update(dict.fromkeys(packages))
            return
        committed = cells.get(row, {}).get(column)
        assert value == committed, (
            f"{self.path.name}, table {table}, {row} / {column}: committed {committed!r}, seen {value!r}; "
            "run `pytest --write-tables` and look at the difference."
        )

    def save(self) -> None:
        """Write the tables that got reports, if they are to be written."""
        for table, packages in self._packages.items():
            start, stop = self._bounds(table)
            versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
            lines = ["", f"Seen with {versions}.", "", *self._lines(self._cells[table]), ""]
            self._text = self._text[:start] + "\n".join(lines) + self._text[stop:]
        if self._packages:
            self.path.write_text(self._text, encoding="utf-8")

    def _bounds(self, table: str) -> tuple[int, int]:
        begin = f"<!-- table {table} -->\n"
        start = self._text.index(begin) + len(begin)
        return start, self._text.index("<!-- end -->", start)

    def _parse(self, table: str) -> dict[str, dict[str, str]]:
        start, stop = self._bounds(table)
        lines = [line for line in self._text[start:stop].splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if not rows:
            return {}
        columns = rows[0][1:]
        return {
            row[0]: {column: value for column, value in zip(columns, row[1:]) if value != _NONE} for row in rows[2:]
        }

    @staticmethod
    def _lines(cells: dict[str, dict[str, str]]) -> list[str]:
        columns = list(dict.fromkeys(column for row in cells.values() for column in row))
        head = ["", *columns]
        body = [[name, *(row.get(column, _NONE) for column in columns)] for name, row in cells.items()]
        return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
