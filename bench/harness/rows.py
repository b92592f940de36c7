"""Rows of results: the CSVs that hold them, the rows that need not be measured again, and the comparison of two CSVs."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.harness.facts import ROOT, is_commit

RESULTS = ROOT / "bench" / "results"
TIMES = {"p50_ms": "ms", "composed_s": "s composed"}  # columns to compare, in order of preference, and their units

Row = dict[str, str]
Table = Mapping[str, Mapping[str, str]]  # rows by name


class RowFile:
    """The rows of one CSV by name, which is written again with every new one.

    Attributes:
        finished: Names of the rows that were measured with the same facts at one commit: another run need not measure them again.
    """

    def __init__(self, path: Path, fields: Sequence[str], measured_with: Mapping[str, str], *, order: Sequence[str] = ()) -> None:
        """With `order` the rows of these names come first, in this order. Raises as `read_rows`, and OSError for a folder."""
        self.path, self._fields, self._measured_with, self._order = path, fields, measured_with, order
        self.rows = read_rows(path, fields)
        self.finished = finished_rows(self.rows, measured_with)

    def add(self, row: Mapping[str, str]) -> Row:
        """Add a row, or replace the one of its name, and write the file; returns it with all columns."""
        row = row | self._measured_with  # type: ignore[operator]
        added = self.rows[row["row"]] = {field: row.get(field, "") for field in self._fields}
        names = [*(name for name in self._order if name in self.rows), *(name for name in self.rows if name not in self._order)]
        write_rows(self.path, self._fields, [self.rows[name] for name in names])
        return added


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_records(path: Path) -> list[Row]:
    """The rows of a CSV in order; none where there is no file."""
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []


def read_rows(path: Path, fields: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of a CSV by their column `row`; none where there is no file.

    With `fields`, columns that an earlier version of the benchmark did not have are empty. Raises ValueError where a row is there twice or
    has too many cells, or the columns are not of this benchmark.
    """
    text = path.read_text() if path.exists() else ""
    reader = csv.DictReader(io.StringIO(text))
    columns, records = set(reader.fieldnames or ()) if text else {"row", *fields}, list(reader)
    if "row" not in columns:
        raise ValueError(f"{path.name} must have a column 'row', got {list(reader.fieldnames or ())}")
    if longer := [record["row"] for record in records if None in record]:
        raise ValueError(f"{path.name} must have one cell for each column in every row, got more in {', '.join(longer)}")
    if fields and (other := (columns - set(fields)) | ({"status"} & set(fields) - columns)):
        raise ValueError(f"{path.name} is not of this benchmark: it differs in the columns {', '.join(sorted(other))}")
    rows = {record["row"]: dict.fromkeys(fields, "") | record for record in records}
    if len(rows) < len(records):
        raise ValueError(f"{path.name} must name every row once, got {len(records) - len(rows)} names again")
    return rows


def write_rows(path: Path, fields: Sequence[str], records: Iterable[Mapping[str, str]]) -> None:
    """Write a CSV, replaced in one step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def finished_rows(rows: Table, measured_with: Mapping[str, str]) -> set[str]:
    """Names of rows that have these facts and are of one commit."""
    if not is_commit(measured_with["commit"]):
        return set()
    return {name for name, row in rows.items() if all(row.get(key) == value for key, value in measured_with.items())}


def compared(rows: Table, others: Table, *, facts: Sequence[str]) -> list[str]:
    """Sentences about the facts that differ, then the ratio of every row with a time of one kind in both: more than 1 is faster here."""
    found = [(name, row, others[name], kind) for name, row in rows.items() if (kind := _kind(row, others.get(name, {})))]
    lines = [] if found else [f"no row has a time in both files: {len(rows)} rows here, {len(others)} there"]
    for fact in facts:
        here, there = (sorted({table[name].get(fact) or "unknown" for name, *_ in found}) for table in (rows, others))
        if here != there or len(here) > 1:
            values = f"here {' and '.join(here)}, there {' and '.join(there)}"
            lines.append(f"not the same {fact}: {values}; the ratios below include that difference")
    times = [(name, here[kind], there[kind], TIMES[kind]) for name, here, there, kind in found]
    return lines + [f"{name}: {a} {unit} here, {b} {unit} there, {float(b) / float(a):.3f}x" for name, a, b, unit in times]


def _kind(row: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """The first column of TIMES that both rows have."""
    return next((column for column in TIMES if row.get(column) and other.get(column)), None)
