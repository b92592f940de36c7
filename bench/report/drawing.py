"""Plots by matplotlib, where it is installed. A method has one colour in all plots, and so has a part of a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.report.goals import METHODS
from bench.report.pictures import PARTS
from bench.report.plots import COMPILED, EAGER, OTHER, Plot, Point

_COLORS = ("#1f77b4", "#17becf", "#ff7f0e", "#8c564b", "#2ca02c", "#9467bd", "#d62728", "#555555", "#bcbd22", "#e377c2")
_METHOD_COLORS = dict(zip(METHODS.values(), _COLORS, strict=False))
_PART_COLORS = dict(
    zip(
        (*PARTS, OTHER),
        ("#1f77b4", "#6baed6", "#c6dbef", "#ff7f0e", "#fdd0a2", "#2ca02c", "#9467bd", "#c5b0d5", "#8c564b", "#c7c7c7"),
        strict=True,
    )
)
_MARKS = "os^Dv<>PXph*d+x1234|_8H"


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

    with matplotlib.rc_context({"svg.hashsalt": plot.digest, "svg.fonttype": "none", "font.size": 9}):
        figure: Any = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = figure.subplots()
        figure.suptitle(plot.title, fontsize=9)
        axes.set(xlabel=plot.x, ylabel=plot.y)
        _DRAWN[plot.kind](axes, plot)
        labels = axes.get_legend_handles_labels()[1]
        columns = 4 if max(map(len, labels)) < 40 else 2
        figure.legend(fontsize=7, loc="outside lower center", ncols=columns)
        figure.set_figheight((1.1 + 0.4 * len(plot.bars) if plot.bars else 4.4) + 0.16 * math.ceil(len(labels) / columns))
        part = folder / f"{plot.file}.part"
        figure.savefig(part, format="svg", metadata={"Date": None, "Description": f"numbers {plot.digest}"})
    part.replace(folder / plot.file)


def _curves(axes: Any, plot: Plot) -> None:
    """Colours are methods, dashed where blocks are compiled; a point that is composed is hollow."""
    methods: dict[str, str] = {}
    for label, points in plot.lines.items():
        method, style = label.removesuffix(COMPILED).removesuffix(EAGER), "--" if label.endswith(COMPILED) else "-"
        color = methods.setdefault(method, _METHOD_COLORS.get(method, "black"))
        axes.plot(*_columns(points), style, color=color)
        for x, y, mark in points:
            axes.plot(x, y, "o", color=color, markerfacecolor="white" if mark == "composed" else color)
    every = [point for points in plot.lines.values() for point in points]
    for method, color in methods.items():
        axes.plot([], [], color=color, label=method)
    for style, said in (("-", EAGER), ("--", COMPILED)):
        if any(label.endswith(said) for label in plot.lines):
            axes.plot([], [], style, color="gray", label=f"blocks {said.removeprefix(', ')}")
    for mark in dict.fromkeys(point.mark for point in every if point.mark):
        axes.plot([], [], "o", color="gray", markerfacecolor="white" if mark == "composed" else "gray", label=mark)
    axes.set(xscale="log", yscale="log" if all(point.y > 0 for point in every) else "linear")
    if axes.get_yscale() == "log":
        _round_ticks(axes.yaxis)
    _ticks_at(axes.xaxis, sorted({point.x for point in every}))
    axes.grid(alpha=0.25)


def _bars(axes: Any, plot: Plot) -> None:
    """Each bar is a whole run; its seconds stand at its end."""
    names, wholes = [textwrap.fill(name, 32) for name in plot.bars], [sum(parts.values()) for parts in plot.bars.values()]
    left = [0.0] * len(names)
    for part in next(iter(plot.bars.values())):
        widths = [100 * parts[part] / whole for parts, whole in zip(plot.bars.values(), wholes, strict=True)]
        if any(widths):
            axes.barh(names, widths, left=left, color=_PART_COLORS[part], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, whole in zip(names, wholes, strict=True):
        axes.text(101, name, f"{whole:.{2 if whole < 10 else 1 if whole < 100 else 0}f} s", va="center")
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()


def _points(axes: Any, plot: Plot) -> None:
    """Colours are implementations, marks are shapes."""
    import matplotlib

    every = [point for points in plot.lines.values() for point in points]
    shapes = dict(zip(dict.fromkeys(point.mark for point in every), cycle(_MARKS), strict=False))
    palette: Any = matplotlib.colormaps["tab10" if len(plot.lines) <= 10 else "tab20"]
    for index, (label, points) in enumerate(plot.lines.items()):
        for point in points:
            axes.plot(point.x, point.y, shapes[point.mark], color=palette(index), markerfacecolor="none", markeredgewidth=1.5)
        axes.plot([], [], "s", color=palette(index), label=label)
    for name, shape in shapes.items():
        axes.plot([], [], shape, color="gray", markerfacecolor="white", label=name)
    for dtype, (copy, matrix) in plot.ceilings.items():
        ridge = 1000 * matrix / copy
        ends = [min(*_columns(every)[0], ridge) / 2, ridge, max(*_columns(every)[0], ridge) * 2]
        roof = [min(matrix, x * copy / 1000) for x in ends]
        axes.plot(ends, roof, color="gray", label=f"{dtype}: {copy:.4g} GB/s, {matrix:.4g} TFLOP/s")
    axes.set(xscale="log", yscale="log")
    _round_ticks(axes.xaxis)
    _round_ticks(axes.yaxis)
    axes.grid(alpha=0.25)


def _columns(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [point.x for point in pairs], [point.y for point in pairs]


def _round_ticks(axis: Any) -> None:
    """At 1, 2 and 5 of every decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=99))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_locator(NullLocator())


def _ticks_at(axis: Any, places: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter("{x:.0f}")
    axis.set_minor_locator(NullLocator())


_DRAWN = {"latency": _curves, "memory": _curves, "share": _bars, "roofline": _points}
