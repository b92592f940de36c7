"""Plots of time and memory over picture size, by pandas and matplotlib. A plot is of one model in one group of rows.

Its file name holds a digest of its numbers, so a file of other numbers is found without drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from bench.cascade.models import SUBJECTS
from bench.harness.rows import slug
from bench.report.goals import METHODS
from bench.report.rows import Group, Results
from bench.report.tables import numbers, of_full_size, runs

PREFIX = "benchmarks-"
COMPILED = ", compiled blocks"
UNITS = {"seconds": "s per picture (hollow: composed)", "memory": "MB, peak less what was there before"}


class Plot(NamedTuple):
    """One plot: `numbers` has a column of `kind` and one of `composed` for every curve, by size."""

    kind: str
    model: str
    title: str
    group: Group
    numbers: DataFrame

    @property
    def source(self) -> str:
        facts = [self.group.machine, f"torch {self.group.facts['torch']}", self.group.settings, f"commit {self.group.facts['commit']}"]
        return ", ".join(filter(None, facts))

    @property
    def file(self) -> str:
        drawn = f"{self.title} {self.group.source([])}\n{self.numbers.to_csv()}"
        where = slug(f"{self.kind} {self.group.machine} {self.group.facts['commit']} {self.model}")
        return f"{PREFIX}{where}-{hashlib.sha256(drawn.encode()).hexdigest()[:8]}.svg"


def plots(results: Results) -> Iterator[Plot]:
    """Time and memory of every model, of the methods that were run at two sizes or more."""
    for group in of_full_size(results.cascade):
        frame = runs(group)
        frame = frame[frame["status"] == "ok"].assign(label=lambda f: f["title"] + f["compile"].map({"eager": ""}).fillna(COMPILED))
        memory = numbers(frame, "peak_megabytes", "before_megabytes")
        frame = frame.assign(memory=memory.peak_megabytes - memory.before_megabytes, size=frame["size"].astype(int))
        frame["composed"] = numbers(frame, "measured_s").measured_s.isna()
        of = "resident set of the process" if group.on_cpu else "allocated by torch"
        for model, mine in frame.groupby("model", sort=False):
            name = SUBJECTS[model].title if model in SUBJECTS else model
            for kind, title in (("seconds", f"Time of a picture by {name}"), ("memory", f"Memory of a picture by {name}, {of}")):
                values = mine.pivot(index="size", columns="label", values=[kind, "composed"])
                curves = [label for label in mine["label"].unique() if values[kind][label].notna().sum() > 1]
                if curves:
                    yield Plot(kind, model, title, group, values[[(column, label) for column in (kind, "composed") for label in curves]])


def save(plot: Plot, folder: Path) -> None:
    """Write the SVG, the same bytes every time with one matplotlib: a colour for every method, dashed with compiled blocks."""
    import matplotlib
    from matplotlib.figure import Figure

    methods, values = list(METHODS.values()), plot.numbers[plot.kind].astype(float)
    with matplotlib.rc_context({"svg.hashsalt": plot.file, "svg.fonttype": "none", "font.size": 9}):
        figure: Any = Figure(figsize=(7.5, 5.5), layout="constrained")
        axes = figure.subplots()
        figure.suptitle(f"{plot.title}\n{plot.source}", fontsize=9)
        for label, line in values.items():
            method = label.removesuffix(COMPILED)
            color = f"C{methods.index(method)}" if method in methods else "black"
            axes.plot(line.index, line, "--o" if label.endswith(COMPILED) else "-o", color=color, label=label)
            if plot.kind == "seconds":
                hollow = line.where(plot.numbers["composed"][label].eq(True))
                axes.plot(line.index, hollow, "o", color=color, markerfacecolor="white")
        axes.set(xscale="log", yscale="log" if (values.min() > 0).all() else "linear", xlabel="pixels per side", ylabel=UNITS[plot.kind])
        axes.set_xticks(values.index, values.index.astype(str))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.25)
        figure.legend(fontsize=7, loc="outside lower center", ncols=4)
        figure.savefig(folder / plot.file, format="svg", metadata={"Date": None})
