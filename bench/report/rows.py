"""The CSVs of bench/results, in groups of one file whose rows were measured with the same device, versions, commit and settings.

A ratio is taken within a group or not at all. Needs neither pandas nor matplotlib: `bench.gpu` reads its own results with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.harness.facts import is_commit
from bench.harness.rows import read_rows

Row = Mapping[str, str]
VERSIONS = ("torch", "triton", "cuda", "cudnn", "card", "diffusers", "natten", "python")
HOW = {"timed_steps": "timed steps {}", "view_batch": "view batch {}"}
FACTS = ("machine", "threads", "commit", *VERSIONS, *HOW)
NOT_YET = "not measured yet"


class Group(NamedTuple):
    """Rows of one CSV that may be compared."""

    file: str  # name of the CSV
    facts: Mapping[str, str]  # what the rows were measured with; empty where the CSV has no such column
    rows: Sequence[Row]  # in the order of the file

    @property
    def machine(self) -> str:
        return self.facts["machine"]

    @property
    def on_cpu(self) -> bool:
        return not self.facts["cuda"]

    @property
    def settings(self) -> str:
        """Settings of the measurement; empty where the benchmark has none."""
        return ", ".join(text.format(self.facts[name]) for name, text in HOW.items() if self.facts[name])

    def source(self, rows: Iterable[Row] | None = None) -> str:
        """One line: the file, the commands that measured the rows (default: all), device, versions and commit."""
        commands = dict.fromkeys(row["command"] for row in (self.rows if rows is None else rows) if row.get("command"))
        facts = [f"{name} {self.facts[name]}" for name in VERSIONS if self.facts[name] not in ("", "absent")]
        facts += [f"{self.facts['threads']} threads"] if self.on_cpu and self.facts["threads"] else []
        facts += [self.settings] if self.settings else []
        measured_with = ", ".join([self.machine, *facts, f"commit {self.facts['commit'] or 'unknown'}"])
        return f"{self.file}, {', '.join(f'`{command}`' for command in commands)}: {measured_with}."


class Results(NamedTuple):
    """Groups of every benchmark that is reported, and the rows of picture quality by file."""

    attention: Sequence[Group]
    cascade: Sequence[Group]
    gpu: Sequence[Group]
    quality: Mapping[str, Mapping[str, Row]]


def read(folder: Path) -> Results:
    """All results in a folder; ValueError where a CSV has no column `row`, or a row twice."""
    files = {kind: {path.name: read_rows(path) for path in sorted(folder.glob(f"{kind}-*.csv"))} for kind in Results._fields}
    quality = files.pop("quality")
    groups = {kind: [group for name, rows in named.items() for group in _grouped(name, rows.values())] for kind, named in files.items()}
    return Results(**groups, quality=quality)


def _grouped(file: str, rows: Iterable[Row]) -> list[Group]:
    """In the order of their first rows; without a clean commit only rows of one command are comparable."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        command = "" if is_commit(row.get("commit") or "unknown") else row.get("command", "")
        found.setdefault((*(row.get(fact) or "" for fact in FACTS), command), []).append(row)
    return [Group(file, dict(zip(FACTS, facts, strict=False)), members) for facts, members in found.items()]
