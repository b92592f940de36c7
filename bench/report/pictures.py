"""Whole pictures in docs/evidence/benchmarks.md: what a run took, where its time went, and the small models apart, group by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bench.report.goals import METHODS
from bench.report.rows import Group, Results, Row, filled, heading, number, skipped, table, why

PARTS = ("attention", "cross", "rest of the denoiser", "guidance", "rest of the steps", "mixing", "encode", "decode", "rest")
_ROUNDING = 2e-4  # of the denoiser: the CSV has five digits
_FAR = 10  # percent between composed and measured that is told


class Run(NamedTuple):
    """What rows of one run have in common."""

    model: str
    size: str
    method: str
    compile: str


def pictures(results: Results) -> list[str]:
    """By device: whole runs, where their time goes, and the small models."""
    lines: list[str] = []
    for group in results.cascade:
        small = _runs(group, small=True)
        lines += [*heading(group, results.cascade), *_table(_runs(group, small=False)), *_shares(group), *(_small(small) if small else [])]
    return lines


def run_of(row: Row) -> Run:
    return Run(row["model"], row["size"], row["method"], row["compile"])


def is_small(model: str) -> bool:
    """Whether its pictures have but a few tokens."""
    return model.endswith("-small")


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Models as they come, small sizes first, methods always in one order."""
    runs = list(runs)
    models = list(dict.fromkeys(run.model for run in runs))
    return sorted(runs, key=lambda run: (models.index(run.model), int(run.size), rank(run)))


def rank(run: Run) -> tuple[int, bool]:
    """The place of its method, eager before compiled."""
    methods = [*METHODS]
    return methods.index(run.method) if run.method in methods else len(methods), run.compile != "eager"


def _runs(group: Group, *, small: bool) -> dict[Run, Row]:
    rows = {run_of(row): row for row in group.rows if row["part"] == "run" and is_small(row["model"]) is small}
    return {run: rows[run] for run in in_order(rows)}


def _head(run: Run) -> list[str]:
    return [run.model, run.size, METHODS.get(run.method, run.method), run.compile]


def _table(runs: Mapping[Run, Row]) -> list[str]:
    if not runs:
        return []
    headings = ["model", "px", "method", "blocks", "s, measured", "s, composed", "x ours", "useful TFLOP", "% of a matrix product"]
    headings += ["peak MB", "of it before the run", "note"]
    lines = []
    for run, row in runs.items():
        if row["status"] == "ok":
            ours = runs.get(run._replace(method="npa"))
            numbers = [_measured(row), row["composed_s"], _beside(row, ours), row["useful_tflop"], row["matrix_percent"]]
            memory = [row.get("peak_megabytes", ""), row.get("before_megabytes", "")]
            lines.append([*_head(run), *numbers, *memory, _note(row)])
        elif row["status"] != "skipped":
            lines.append([*_head(run), *[""] * 7, why(row)])
    return filled(headings, lines, words=4, last=1) + _skipped(runs)


def _small(runs: Mapping[Run, Row]) -> list[str]:
    sizes = [int(run.size) for run in runs]
    about = f"Pictures of {min(sizes)} to {max(sizes)} px, a few tokens, by small models with random weights: they are here to show that"
    about += " every method runs and passes its gate, and their time is mostly Python's."
    headings = ["model", "px", "method", "blocks", "s, measured", "s, composed", "note"]
    lines = []
    for run, row in runs.items():
        if row["status"] == "ok":
            lines.append([*_head(run), _measured(row), row["composed_s"], _note(row)])
        elif row["status"] != "skipped":
            lines.append([*_head(run), "", "", why(row)])
    return ["", about, "", *table(headings, lines, words=4, last=1), *_skipped(runs)]


def _skipped(runs: Mapping[Run, Row]) -> list[str]:
    return skipped((f"{run.model} by {METHODS.get(run.method, run.method)}", row) for run, row in runs.items())


def _measured(row: Row) -> str:
    """Seconds, with their spread where there is one."""
    spread = [number(row, column) for column in ("p50_ms", "p20_ms", "p80_ms")]
    if None in spread:
        return row.get("measured_s", "")
    return "{:.5g} ({:.5g} - {:.5g})".format(*(value / 1000 for value in spread if value is not None))


def _beside(row: Row, ours: Row | None) -> str:
    """The time over ours, both measured where both are."""
    if ours is None or ours["status"] != "ok":
        return ""
    for column, said in (("measured_s", ""), ("composed_s", " composed")):
        mine, other = number(ours, column), number(row, column)
        if mine and other:
            return f"{other / mine:.2f}{said}"
    return ""


def _note(row: Row) -> str:
    """What the row tells, and that its two times are far from each other."""
    composed, measured = number(row, "composed_s"), number(row, "measured_s")
    off = 100 * (composed / measured - 1) if composed and measured else 0.0
    far = f"composed {abs(off):.0f} % {'above' if off > 0 else 'below'} measured" if abs(off) > _FAR else ""
    return "; ".join(filter(None, (far, row.get("note", ""))))


def shares(group: Group) -> dict[Run, dict[str, float]]:
    """Seconds of a run by part, of every run that was composed.

    Attention inside compiled blocks is not told apart: it is in the rest of the denoiser.

    Raises:
        ValueError: attention takes longer than the denoiser that it is part of.
    """
    found: dict[Run, dict[str, list[Row]]] = {}
    for row in group.rows:
        if row["status"] == "ok" and row["part"] not in ("run", "gate") and row.get("in_run_s"):
            found.setdefault(run_of(row), {}).setdefault(row["stage"], []).append(row)
    told = {}
    for run in in_order(found):
        stages = [_parts(rows, group.file) for rows in found[run].values()]
        parts = {name: max(0.0, sum(stage[name] for stage in stages)) for name in PARTS}
        if sum(parts.values()) > 0:
            told[run] = parts
    return told


def _parts(rows: Sequence[Row], file: str) -> dict[str, float]:
    """Of one stage; medians of a step and of its parts need not add up, so the rest of the steps can be less than nothing."""
    raw = {row["part"]: float(row["in_run_s"]) for row in rows}
    denoiser, inside = raw.get("denoiser", 0.0), raw.get("attention", 0.0) + raw.get("cross", 0.0)
    if inside > (1 + _ROUNDING) * denoiser:
        names = " and ".join(row["row"] for row in rows if row["part"] in ("attention", "cross"))
        raise ValueError(f"{file}: {names} must take no longer than the denoiser of their stage, got {inside:.5g} s for {denoiser:.5g} s")
    parts = {name: raw.get(name, 0.0) for name in PARTS}
    parts["rest of the denoiser"] = max(0.0, denoiser - inside)
    parts["rest of the steps"] = raw.get("step", 0.0) - denoiser - raw.get("guidance", 0.0)
    return parts


def _shares(group: Group) -> list[str]:
    found = {run: parts for run, parts in shares(group).items() if not is_small(run.model)}
    if not found:
        return []
    lines = []
    for run, parts in found.items():
        whole = sum(parts.values())
        lines.append([*_head(run), *(f"{100 * parts[name] / whole:.1f}%" for name in PARTS)])
    return ["", "Share of the composed time:", "", *table(["model", "px", "method", "blocks", *PARTS], lines, words=4)]
