"""What `bench.report` reads: the CSVs of bench/results, in groups of one file whose rows were measured with the same facts.

A ratio is taken within a group or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.harness import rows as harness

Row = Mapping[str, str]
VERSIONS = ("torch", "triton", "cuda", "cudnn", "card", "diffusers", "natten", "python")
HOW = {"timed_steps": "timed steps {}", "view_batch": "view batch {}"}
FACTS = ("machine", "threads", "commit", *VERSIONS, *HOW)
NOT_YET = "not measured yet"


class Group(NamedTuple):
    """Rows of one CSV of one device, commit and set of versions, measured in one way.

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
    def how(self) -> str:
        """In what way, in words; empty where the benchmark has but one."""
        return ", ".join(words.format(self.facts[name]) for name, words in HOW.items() if self.facts[name])

    @property
    def versions(self) -> str:
        """Device, versions, way and commit, in words."""
        said = [f"{name} {self.facts[name]}" for name in VERSIONS if self.facts[name] not in ("", "absent")]
        said += [f"{self.facts['threads']} threads"] if self.on_cpu and self.facts["threads"] else []
        said += [self.how] if self.how else []
        return ", ".join([self.machine, *said, f"commit {self.facts['commit'] or 'unknown'}"])

    @property
    def on_cpu(self) -> bool:
        return not self.facts["cuda"]

    @property
    def commands(self) -> tuple[str, ...]:
        """All that its rows were made by."""
        return tuple(dict.fromkeys(row["command"] for row in self.rows if row.get("command")))

    def made_by(self, commands: Sequence[str]) -> str:
        """Where numbers of it come from, in a line."""
        return f"{self.file}, {', '.join(f'`{command}`' for command in commands)}: {self.versions}."


class Results(NamedTuple):
    """Groups of every benchmark that is reported, the rows of flops.csv, and those of picture quality by file."""

    attention: Sequence[Group]
    cascade: Sequence[Group]
    gpu: Sequence[Group]
    flops: Sequence[Row]
    quality: Mapping[str, Mapping[str, Row]]


def read(folder: Path) -> Results:
    """All that is there.

    Raises:
        ValueError: a CSV has no column `row`, or a row twice.
    """

    def groups(kind: str) -> list[Group]:
        return [group for path in sorted(folder.glob(f"{kind}-*.csv")) for group in grouped(path.name, harness.read_rows(path).values())]

    quality = {path.name: harness.read_rows(path) for path in sorted(folder.glob("quality-*.csv"))}
    return Results(groups("attention"), groups("cascade"), groups("gpu"), harness.read_records(folder / "flops.csv"), quality)


def grouped(file: str, rows: Iterable[Row]) -> list[Group]:
    """In the order of their first rows; where the commit is none, for a tree had changes, a group is at most one command's."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        commit = row.get("commit") or "unknown"
        command = row.get("command", "") if commit == "unknown" or commit.endswith("with changes") else ""
        found.setdefault((*(row.get(fact) or "" for fact in FACTS), command), []).append(row)
    return [Group(file, dict(zip(FACTS, facts, strict=False)), members) for facts, members in found.items()]


def heading(group: Group, groups: Sequence[Group]) -> list[str]:
    """Of its section: the way is told where another group differs in no more than that."""
    twins = [other for other in groups if (other.machine, other.facts["commit"]) == (group.machine, group.facts["commit"])]
    how = f", {group.how}" if len(twins) > 1 and group.how else ""
    return ["", f"### {group.machine}, {group.facts['commit']}{how}", "", group.made_by(group.commands), ""]


def number(row: Row, column: str) -> float | None:
    """A column that holds a number; None where it is empty."""
    return float(row[column]) if row.get(column) else None


def why(row: Row) -> str:
    """That a row has no time, and the reason."""
    return f"{row['status']}: {row['note']}" if row.get("note") else row["status"]


def skipped(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """What was skipped, by name, a sentence for every reason."""
    reasons: dict[tuple[str, str], int] = {}
    for name, row in rows:
        if row["status"] == "skipped":
            reasons[name, row["note"]] = reasons.get((name, row["note"]), 0) + 1
    told = [f"- {name}: {note} ({count} row{'s' * (count > 1)})." for (name, note), count in reasons.items()]
    return ["", "Skipped:", "", *told] if told else []


def table(headings: Sequence[str], lines: Sequence[Sequence[str]], *, words: int, last: int = 0) -> list[str]:
    """A markdown table, its first `words` columns and its `last` ones words, and the others numbers."""
    numbers = len(headings) - words - last
    head = [f"| {' | '.join(headings)} |", "|---" * words + "|--:" * numbers + "|---" * last + "|"]
    return head + [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def filled(headings: Sequence[str], lines: Sequence[Sequence[str]], *, words: int, last: int = 0) -> list[str]:
    """The table without those columns of numbers that hold nothing."""
    numbers = range(words, len(headings) - last)
    kept = [i for i in range(len(headings)) if i not in numbers or any(line[i] for line in lines)]
    return table([headings[i] for i in kept], [[line[i] for i in kept] for line in lines], words=words, last=last)
