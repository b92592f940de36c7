"""What is plotted of what was measured: time and memory over resolution, share of time by part, roofline; `report_drawing` draws it.

A plot is one group's. Its file names the digest of the numbers in it, so that a plot of other numbers is found out without drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from bench.cascade.models import SUBJECTS
from bench.harness import rows as harness
from bench.report.goals import METHODS
from bench.report.pictures import PARTS, Run, in_order, is_small, rank, run_of, shares
from bench.report.rows import Group, Results, Row, number

PREFIX = "benchmarks-"
OTHER = "other"
LEAST = 0.01  # of a bar; parts that are nowhere more are drawn as one
EAGER, COMPILED = ", eager", ", compiled"  # end the label of a method where not all blocks are run eagerly


class Point(NamedTuple):
    """A value, and the word that its mark stands for; empty where marks tell nothing."""

    x: float
    y: float
    mark: str = ""


@dataclass(frozen=True)
class Plot:
    """What is drawn.

    Attributes:
        name: Of no other plot of its kind.
        kind: What sort.
        title, x, y: Words.
        lines: By label, a method or an implementation: curves, or the points of a roofline.
        bars: Of shares, by label: seconds of every part.
        ceilings: By dtype, GB/s of a copy and TFLOP/s of a matrix product, of the same run.
    """

    name: str
    kind: Literal["latency", "memory", "share", "roofline"]
    title: str
    x: str
    y: str = ""
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ceilings: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{PREFIX}{self.kind}-{harness.slug(self.name)}.svg"

    @property
    def digest(self) -> str:
        told = [self.kind, self.title, self.x, self.y, self.lines, self.bars, self.ceilings]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def plots(results: Results) -> list[Plot]:
    """All that can be drawn; none where nothing is measured."""
    pictures = [g._replace(rows=[row for row in g.rows if not is_small(row["model"])]) for g in results.cascade]
    found = [plot for group in pictures for plot in (*_growth(group), *_shares(group))]
    found += [plot for group in results.attention for plot in _rooflines(group)]
    return list({plot.file: plot for plot in found}.values())


def _growth(group: Group) -> Iterator[Plot]:
    """Of every model that was run at two sizes or more."""
    rows = {run_of(row): row for row in group.rows if row["part"] == "run" and row["status"] == "ok"}
    for model in dict.fromkeys(run.model for run in rows):
        mine = {run: rows[run] for run in in_order(rows) if run.model == model}
        latency = {run: _time(row) for run, row in mine.items()}
        memory = {run: point for run, row in mine.items() if (point := _memory(row))}
        name, x = f"{_name(group)} {model}", "pixels per side"
        if lines := _curves(latency):
            yield Plot(name, "latency", _title(f"Time of a picture by {_named(model)}", group), x, "s per picture", lines)
        if lines := _curves(memory):
            what = "resident set of the process" if group.on_cpu else "allocated by torch"
            title = _title(f"Memory of a picture by {_named(model)}, {what}", group)
            yield Plot(name, "memory", title, x, "MB, peak less what was there before", lines)


def _curves(points: Mapping[Run, Point]) -> dict[str, list[Point]]:
    """By label, smallest size first; one size is no curve."""
    labels, lines = _labels(list(points)), dict[str, list[Point]]()
    for run in sorted(points, key=rank):
        lines.setdefault(labels[run], []).append(points[run])
    return {label: line for label, line in lines.items() if len(line) > 1}


def _time(row: Row) -> Point:
    measured = number(row, "measured_s")
    seconds, mark = (float(row["composed_s"]), "composed") if measured is None else (measured, "measured")
    return Point(float(row["size"]), seconds, mark)


def _memory(row: Row) -> Point | None:
    peak, before = number(row, "peak_megabytes"), number(row, "before_megabytes")
    return None if peak is None or before is None else Point(float(row["size"]), peak - before)


def _labels(runs: Sequence[Run]) -> dict[Run, str]:
    """Methods, and how blocks are run where not all are run eagerly."""
    eager = {run.compile for run in runs} == {"eager"}
    return {run: METHODS.get(run.method, run.method) + ("" if eager else EAGER if run.compile == "eager" else COMPILED) for run in runs}


def _shares(group: Group) -> Iterator[Plot]:
    found = shares(group)
    for model, size in dict.fromkeys((run.model, run.size) for run in found):
        mine = {run: parts for run, parts in found.items() if (run.model, run.size) == (model, size)}
        labels = _labels(list(mine))
        bars = _merged({labels[run]: parts for run, parts in mine.items()})
        title = _title(f"Where the time goes, {size} px by {_named(model)}", group)
        yield Plot(f"{_name(group)} {model} {size}", "share", title, "% of a composed run", bars=bars)


def _merged(bars: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Parts that are small in every bar as one."""
    kept = [part for part in PARTS if any(parts[part] >= LEAST * sum(parts.values()) for parts in bars.values())]
    small = [part for part in PARTS if part not in kept]
    return {label: {part: parts[part] for part in kept} | {OTHER: sum(parts[p] for p in small)} for label, parts in bars.items()}


def _rooflines(group: Group) -> Iterator[Plot]:
    """Useful FLOPs over the bytes that must move, and the rate, implementation by implementation and shape by shape."""
    lines: dict[str, list[Point]] = {}
    ceilings: dict[str, tuple[float, float]] = {}
    for row in group.rows:
        values = [number(row, column) for column in ("useful_gflop", "megabytes", "tflops", "copy_gbs", "matrix_tflops")]
        if row["status"] != "ok" or None in values:
            continue
        flops, moved, rate, copy, matrix = (float(value or 0) for value in values)
        lines.setdefault(row["provider"], []).append(Point(1000 * flops / moved, rate, row["shape"]))
        ceilings[row["dtype"]] = copy, matrix
    if lines:
        x = "FLOPs of its own definition per byte it must move"
        yield Plot(
            _name(group),
            "roofline",
            _title("Attention, below the rates of a copy and of a matrix product", group),
            x,
            "TFLOP/s of its own definition",
            lines,
            ceilings=ceilings,
        )


def _name(group: Group) -> str:
    """Of no other group: a plot is a file."""
    facts = [f"{name}-{value}" for name, value in group.facts.items() if name not in ("machine", "commit") and value not in ("", "absent")]
    digest = hashlib.sha256(" ".join(facts).encode()).hexdigest()[:4]
    return f"{group.machine} {group.facts['commit']} torch {group.facts['torch']} {digest}"


def _named(model: str) -> str:
    return SUBJECTS[model].title if model in SUBJECTS else model


def _title(what: str, group: Group) -> str:
    """Two lines: of what, and how measured."""
    said = [group.machine, f"torch {group.facts['torch']}", group.how, f"commit {group.facts['commit']}"]
    return f"{what}\n{', '.join(filter(None, said))}"


def state(plot: Plot, folder: Path) -> Literal["drawn", "missing", "stale"]:
    """Whether the file is there, and of these numbers."""
    path = folder / plot.file
    if not path.exists():
        return "missing"
    return "drawn" if f"numbers {plot.digest}" in path.read_text() else "stale"
