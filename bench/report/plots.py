"""Plots of the committed rows by pandas and matplotlib: time and memory over picture size, and rooflines of attention.

A plot is of one group. Its file name holds a digest of its numbers, so a file of other numbers is found without drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from bench.cascade.models import SUBJECTS
from bench.harness.rows import slug
from bench.report.frames import numbers, of_full_size, runs
from bench.report.goals import METHODS
from bench.report.rows import Group, Results

PREFIX = "benchmarks-"
COMPILED = ", compiled blocks"


class Plot(NamedTuple):
    """One plot: `draw` draws the numbers into axes; `kind` and `about` are part of the file's name."""

    kind: str
    about: str
    title: str
    group: Group
    numbers: DataFrame
    draw: Callable[[Any, DataFrame], None]

    @property
    def source(self) -> str:
        facts = [self.group.machine, f"torch {self.group.facts['torch']}", self.group.settings, f"commit {self.group.facts['commit']}"]
        return ", ".join(filter(None, facts))

    @property
    def file(self) -> str:
        drawn = f"{self.title} {self.group.source([])}\n{self.numbers.to_csv()}"
        where = slug(f"{self.kind} {self.group.machine} {self.group.facts['commit']} {self.about}")
        return f"{PREFIX}{where}-{hashlib.sha256(drawn.encode()).hexdigest()[:8]}.svg"


def plots(results: Results) -> list[Plot]:
    """All that can be drawn; none where nothing is measured."""
    growth = [plot for group in of_full_size(results.cascade) for plot in _growth(group)]
    return growth + [plot for group in results.attention for plot in _rooflines(group)]


def save(plot: Plot, folder: Path) -> None:
    """Write the SVG; the same bytes every time with one matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": plot.file, "svg.fonttype": "none", "font.size": 9}):
        figure: Any = Figure(figsize=(7.5, 5.5), layout="constrained")
        axes = figure.subplots()
        figure.suptitle(f"{plot.title}\n{plot.source}", fontsize=9)
        plot.draw(axes, plot.numbers)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4 if max(map(len, labels)) < 40 else 2)
        figure.savefig(folder / plot.file, format="svg", metadata={"Date": None})


def _growth(group: Group) -> Iterator[Plot]:
    """Time and memory of every model, of the methods that were run at two sizes or more."""
    frame = runs(group)
    frame = frame[frame["status"] == "ok"].assign(label=lambda f: f["title"] + f["compile"].map({"eager": ""}).fillna(COMPILED))
    memory = numbers(frame, "peak_megabytes", "before_megabytes")
    frame = frame.assign(memory=memory.peak_megabytes - memory.before_megabytes, size=frame["size"].astype(int))
    frame["composed"] = numbers(frame, "measured_s").measured_s.isna()
    of = "resident set of the process" if group.on_cpu else "allocated by torch"
    for model, mine in frame.groupby("model", sort=False):
        for kind, column, title in (("latency", "seconds", "Time of a picture"), ("memory", "memory", f"Memory of a picture, {of},")):
            values = mine.pivot(index="size", columns="label", values=[column, "composed"])
            curves = [label for label in mine["label"].unique() if values[column][label].notna().sum() > 1]
            if curves:
                values = values.loc[:, [(name, label) for name in (column, "composed") for label in curves]]
                yield Plot(kind, model, f"{title} by {SUBJECTS[model].title if model in SUBJECTS else model}", group, values, _curves)


def _curves(axes: Any, values: DataFrame) -> None:
    """A method has one colour, and dashes with compiled blocks; points that were composed are hollow."""
    column = values.columns[0][0]
    methods = list(METHODS.values())
    for label, line in values[column].astype(float).items():
        method = label.removesuffix(COMPILED)
        color = f"C{methods.index(method)}" if method in methods else "black"
        axes.plot(line.index, line, "--o" if label.endswith(COMPILED) else "-o", color=color, label=label)
        if column == "seconds":
            hollow = line.where(values["composed"][label].eq(True))
            axes.plot(line.index, hollow, "o", color=color, markerfacecolor="white")
    positive = bool((values[column].astype(float).min() > 0).all())
    axes.set(xscale="log", yscale="log" if positive else "linear", xlabel="pixels per side")
    axes.set_ylabel("s per picture (hollow: composed)" if column == "seconds" else "MB, peak less what was there before")
    axes.set_xticks(values.index, values.index.astype(str))
    axes.minorticks_off()
    if positive:
        _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.25)


def _rooflines(group: Group) -> Iterator[Plot]:
    """Useful FLOPs over the bytes that must move, and the rate, of every implementation and shape."""
    frame = DataFrame(group.rows)
    columns = ["useful_gflop", "megabytes", "tflops", "copy_gbs", "matrix_tflops"]
    values = numbers(frame, *columns)[frame["status"] == "ok"].dropna()
    values = frame[["provider", "shape", "dtype"]].join(values, how="inner")
    values["intensity"] = 1000 * values["useful_gflop"] / values["megabytes"]
    if not values.empty:
        yield Plot("roofline", "", "Attention, below the rates of a copy and of a matrix product", group, values, _roofline)


def _roofline(axes: Any, values: DataFrame) -> None:
    """Colours are implementations, marks are shapes; a gray roof for every dtype."""
    from matplotlib import colormaps

    marks = dict(zip(values["shape"].unique(), cycle("os^Dv<>PXph*d+x1234|_8H"), strict=False))
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))])
    for provider, mine in values.groupby("provider", sort=False):
        (line,) = axes.plot([], [], "s", label=provider)
        for shape, points in mine.groupby("shape", sort=False):
            axes.plot(points["intensity"], points["tflops"], marks[shape], color=line.get_color(), markerfacecolor="none")
    for shape, mark in marks.items():
        axes.plot([], [], mark, color="gray", markerfacecolor="white", label=shape)
    for dtype, mine in values.groupby("dtype", sort=False):
        copy, matrix = mine["copy_gbs"].iloc[-1], mine["matrix_tflops"].iloc[-1]
        ridge = 1000 * matrix / copy
        ends = [min(values["intensity"].min(), ridge) / 2, ridge, 2 * max(values["intensity"].max(), ridge)]
        roof = [min(matrix, x * copy / 1000) for x in ends]
        axes.plot(ends, roof, color="gray", label=f"{dtype}: {copy:.4g} GB/s, {matrix:.4g} TFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of its own definition per byte it must move", ylabel="TFLOP/s of its own definition")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.25)


def _plain_ticks(axis: Any) -> None:
    """At 1, 2 and 5 of every decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=99))
    axis.set_major_formatter("{x:.10g}")
    axis.set_minor_locator(NullLocator())
