"""Plots of what was measured, by matplotlib where it is installed: latency over resolution, share of time by part, roofline.

A plot is one group's. Its file names the digest of the numbers in it, so that a plot of other numbers is found out without drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from bench import harness
from bench.report_goals import METHODS
from bench.report_rows import Group, Results, number
from bench.report_tables import PARTS, shares

Line = tuple[Sequence[float], Sequence[float]]
PREFIX = "benchmarks-"


@dataclass(frozen=True)
class Plot:
    """What is drawn.

    Attributes:
        kind: What sort.
        title, x, y: Words.
        lines: By label: curves; of shares, one value per name in `names`; of a roofline points, and `ceilings` beside them.
        names: Of stacked bars.
        ceilings: By dtype, GB/s of a copy and TFLOP/s of a matrix product, of the same run.
    """

    name: str
    kind: Literal["latency", "share", "roofline"]
    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    names: Sequence[str] = ()
    ceilings: Mapping[str, tuple[float, float]] | None = None

    @property
    def file(self) -> str:
        return f"{PREFIX}{self.kind}-{harness.slug(self.name)}.svg"

    @property
    def digest(self) -> str:
        told = [self.kind, self.title, self.x, self.y, self.lines, self.names, self.ceilings]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def plots(results: Results) -> list[Plot]:
    """All that can be drawn; none where nothing is measured."""
    pictures = [g._replace(rows=[row for row in g.rows if not row["model"].endswith("-small")]) for g in results.cascade]  # too few tokens
    found = [plot for group in pictures for plot in (*_latencies(group), *_shares(group))]
    found += [plot for group in results.attention for plot in _rooflines(group)]
    return list({plot.file: plot for plot in found}.values())


def _latencies(group: Group) -> Iterator[Plot]:
    """Of every model that was run at two sizes or more."""
    rows = [row for row in group.rows if row["part"] == "run" and row["status"] == "ok"]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines: dict[str, Line] = {}
        for method, how in dict.fromkeys((row["method"], row["compile"]) for row in rows if row["model"] == model):
            mine = [row for row in rows if (row["model"], row["method"], row["compile"]) == (model, method, how)]
            points = sorted((float(row["size"]), float(row["composed_s"])) for row in mine)
            if len(points) > 1:
                lines[f"{METHODS.get(method, method)}, {how}"] = [x for x, _ in points], [y for _, y in points]
        if lines:
            yield Plot(
                f"{_name(group)} {model}", "latency", f"{model}, {_title(group)}", "pixels per side", "s per picture, composed", lines
            )  # fmt: skip


def _shares(group: Group) -> Iterator[Plot]:
    found = shares(group)
    for model, size in dict.fromkeys((model, size) for model, size, _, _ in found):
        bars = {f"{METHODS.get(m, m)}, {how}": parts for (one, px, m, how), parts in found.items() if (one, px) == (model, size)}
        lines: dict[str, Line] = {part: ([], [parts[part] for parts in bars.values()]) for part in PARTS}
        title = f"{model}, {size} px, {_title(group)}"
        yield Plot(f"{_name(group)} {model} {size}", "share", title, "s of a composed run", "", lines, tuple(bars))


def _rooflines(group: Group) -> Iterator[Plot]:
    """Useful FLOPs over the bytes that must move, and the rate, implementation by implementation."""
    lines: dict[str, Line] = {}
    ceilings: dict[str, tuple[float, float]] = {}
    for row in group.rows:
        values = [number(row, column) for column in ("useful_gflop", "megabytes", "tflops", "copy_gbs", "matrix_tflops")]
        if row["status"] != "ok" or None in values:
            continue
        flops, moved, rate, copy, matrix = (float(value or 0) for value in values)
        xs, ys = lines.setdefault(f"{row['provider']}, {row['dtype']}", ([], []))
        xs.append(1000 * flops / moved)  # type: ignore[attr-defined]
        ys.append(rate)  # type: ignore[attr-defined]
        ceilings[row["dtype"]] = copy, matrix
    if lines:
        yield Plot(
            _name(group), "roofline", f"attention, {_title(group)}", "useful FLOP per byte that must move", "useful TFLOP/s", lines,
            ceilings=ceilings,
        )  # fmt: skip


def _name(group: Group) -> str:
    """Of no other group: a plot is a file."""
    facts = [f"{name}-{value}" for name, value in group.facts.items() if name not in ("machine", "commit") and value not in ("", "absent")]
    digest = hashlib.sha256(" ".join(facts).encode()).hexdigest()[:4]
    return f"{group.machine} {group.facts['commit']} torch {group.facts['torch']} {digest}"


def _title(group: Group) -> str:
    return f"{group.machine}, torch {group.facts['torch']}, {group.facts['commit']}"


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(plot: Plot, folder: Path) -> None:
    """Write the SVG; the same bytes every time with one matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    with matplotlib.rc_context({"svg.hashsalt": plot.digest, "svg.fonttype": "none", "font.size": 9}):
        figure: Any = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = figure.subplots()
        _DRAWN[plot.kind](axes, plot)
        axes.set_title(plot.title, fontsize=9)
        axes.set(xlabel=plot.x, ylabel=plot.y)
        for axis in (axes.xaxis, axes.yaxis) if plot.kind != "share" else ():
            axis.set_major_formatter("{x:g}")
        if plot.kind == "latency":
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter("{x:g}")
        figure.legend(fontsize=7, loc="outside lower center", ncols=3)
        part = folder / f"{plot.file}.part"
        figure.savefig(part, format="svg", metadata={"Date": None, "Description": f"numbers {plot.digest}"})
    part.replace(folder / plot.file)


def _curves(axes: Any, plot: Plot) -> None:
    for label, (xs, ys) in plot.lines.items():
        axes.plot(xs, ys, marker="o", label=label)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sorted({x for xs, _ in plot.lines.values() for x in xs}))


def _bars(axes: Any, plot: Plot) -> None:
    left = [0.0] * len(plot.names)
    for label, (_, widths) in plot.lines.items():
        if any(widths):
            axes.barh(plot.names, widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()


def _points(axes: Any, plot: Plot) -> None:
    for label, (xs, ys) in plot.lines.items():
        axes.plot(xs, ys, linestyle="", marker="o", markersize=4, label=label)
    every = [x for xs, _ in plot.lines.values() for x in xs]
    for dtype, (copy, matrix) in (plot.ceilings or {}).items():
        ridge = 1000 * matrix / copy
        ends = [min(*every, ridge) / 2, ridge, max(*every, ridge) * 2]
        roof = [min(matrix, x * copy / 1000) for x in ends]
        axes.plot(ends, roof, color="gray", label=f"{dtype}: copy {copy:.4g} GB/s, matrix product {matrix:.4g} TFLOP/s")
    axes.set(xscale="log", yscale="log")


_DRAWN = {"latency": _curves, "share": _bars, "roofline": _points}


def state(plot: Plot, folder: Path) -> Literal["drawn", "missing", "stale"]:
    """Whether the file is there, and of these numbers."""
    path = folder / plot.file
    if not path.exists():
        return "missing"
    return "drawn" if f"numbers {plot.digest}" in path.read_text() else "stale"
