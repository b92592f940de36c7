"""The tables of docs/evidence/quality.md and of the README, from rows of `bench.quality`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bench.harness.tables import table
from bench.quality.rows import ABLATION, COLUMNS, FACTS, LABELS, METHODS, SPREAD, TABLES

Rows = Mapping[str, Mapping[str, str]]


def sections(*results: Rows) -> list[str]:
    """A section for every group of rows, in it a table for every machine's results, and what each row was measured with."""
    lines: list[str] = []
    for title, names in TABLES.items():
        tables = [rows for records in results if (rows := [records[name] for name in names if name in records])]
        lines += [f"## {title}", ""] if tables else []
        for rows in tables:
            lines += [*_table(rows, spread=True), "", *_measured_with(rows)]
    return lines[:-1]


def summary(records: Rows) -> list[str]:
    """The README's table: the main columns of the ablation."""
    rows = [records[name] for name in ("direct", *METHODS, *ABLATION) if name in records]
    return _table(rows, columns=("one_disc", "discs", "swd", "seconds", "gflops", "all_gflops"))


def _table(rows: Sequence[Mapping[str, str]], *, columns: Collection[str] = COLUMNS.keys(), spread: bool = False) -> list[str]:
    from pandas import DataFrame

    cells = DataFrame({"row": [LABELS.get(row["row"], row["row"]) for row in rows]})
    for name in columns:
        heading, form = COLUMNS[name]
        if any(row.get(name) for row in rows):
            cells[heading] = [form.format(float(row[name])) if row.get(name) else "-" for row in rows]
        if name == "seconds" and spread and heading in cells:
            low, high = SPREAD
            cells[heading] += [f" ({float(row[low]):.2f} - {float(row[high]):.2f})" if row.get(low) else "" for row in rows]
    return table(cells, text=["row"])


def _measured_with(rows: Sequence[Mapping[str, str]]) -> list[str]:
    from pandas import DataFrame

    lines: list[str] = []
    groups = DataFrame(rows).groupby(list(FACTS), sort=False)["row"]
    for (command, model, torch_version, diffusers_version, machine, threads, commit), names in groups:
        which = f" ({', '.join(names)})" if groups.ngroups > 1 else ""
        lines.append(f"`{command}`{which}: model {model}, torch {torch_version}, diffusers {diffusers_version},")
        lines += [f"{machine}, {threads} threads, commit {commit}.", ""]
    return lines
