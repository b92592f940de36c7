"""What `bench.report` reads: the CSVs of bench/results, in groups of one file whose rows were measured with the same facts.

A ratio is taken within a group or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import harness

Row = Mapping[str, str]
VERSIONS = ("torch", "triton", "cuda", "cudnn", "diffusers", "natten", "python")
FACTS = ("machine", "threads", "commit", *VERSIONS)
NOT_YET = "not measured yet"


class Group(NamedTuple):
    """Rows of one CSV of one device, commit and set of versions.

    Attributes:
        file: Its name.
        facts: By name; empty where the CSV has no such column.
        rows: In the order of the file.
    """

    file: str
    facts: Mapping[str, str]
    rows: Sequence[Row]

    @property
    def machine(self) -> str:
        return self.facts["machine"]

    @property
    def versions(self) -> str:
        """Device, versions and commit, in words."""
        said = [f"{name} {self.facts[name]}" for name in VERSIONS if self.facts[name] not in ("", "absent")]
        said += [f"{self.facts['threads']} threads"] if self.on_cpu and self.facts["threads"] else []
        return ", ".join([self.machine, *said, f"commit {self.facts['commit'] or 'unknown'}"])

    @property
    def on_cpu(self) -> bool:
        return not self.facts["cuda"]

    def commands(self) -> str:
        """All that its rows were made by, as code."""
        return ", ".join(f"`{command}`" for command in dict.fromkeys(row.get("command", "") for row in self.rows) if command)


class Results(NamedTuple):
    """Groups of every benchmark that is reported, and the rows of flops.csv."""

    attention: Sequence[Group]
    cascade: Sequence[Group]
    gpu: Sequence[Group]
    flops: Sequence[Row]


def read(folder: Path) -> Results:
    """All that is there.

    Raises:
        ValueError: a CSV has no column `row`, or a row twice.
    """

    def groups(kind: str) -> list[Group]:
        return [group for path in sorted(folder.glob(f"{kind}-*.csv")) for group in grouped(path.name, harness.read_rows(path).values())]

    return Results(groups("attention"), groups("cascade"), groups("gpu"), harness.read_records(folder / "flops.csv"))


def grouped(file: str, rows: Iterable[Row]) -> list[Group]:
    """In the order of their first rows; where the commit is none, for a tree had changes, a group is at most one command's."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        commit = row.get("commit") or "unknown"
        command = row.get("command", "") if commit == "unknown" or commit.endswith("with changes") else ""
        found.setdefault((*(row.get(fact) or "" for fact in FACTS), command), []).append(row)
    return [Group(file, dict(zip(FACTS, facts, strict=False)), members) for facts, members in found.items()]


def number(row: Row, column: str) -> float | None:
    """A column that holds a number; None where it is empty."""
    return float(row[column]) if row.get(column) else None


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], *, words: int) -> list[str]:
    """A markdown table, its first `words` columns words and the others numbers."""
    head = [f"| {' | '.join(headings)} |", "|---" * words + "|--:" * (len(headings) - words) + "|"]
    return head + [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
