"""The rows that `bench.quality` draws, their statistics, and the tables of docs/evidence/quality.md and of the README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from bench.harness import facts
from bench.harness.pages import table
from scalediff.methods import METHODS, method_title


class Drawing(NamedTuple):
    """How the pictures of a row are made."""

    label: str  # for the tables
    changes: Mapping[str, Any] = MappingProxyType({})  # of the embedded model's preset; of these, other methods take steps and guidance
    method: str = "scalediff"  # as in `scalediff.generate`; empty for pictures that no model draws
    upsampler: str | None = None  # as there


class Table(NamedTuple):
    """Rows that share captions, seeds and size."""

    title: str  # on the page
    rows: tuple[str, ...]  # names of drawings; `BASELINE` is what the others are compared with, if it is among them
    first: int  # scene, counted from `HELD_OUT_SEED`; those from 1000 on were used for no choice of the preset
    n: int  # pictures a row
    size: int  # pixels per side

    @property
    def scenes(self) -> range:
        """The scenes, counted from `HELD_OUT_SEED`."""
        return range(self.first, self.first + self.n)


_PARTS = {
    "npa": Drawing("NPA + LFM + SG"),
    "no-lfm": Drawing("NPA without LFM", {"lfm": False}),
    "no-sg": Drawing("NPA without SG", {"sg": False}),
    "alone": Drawing("NPA without both", {"lfm": False, "sg": False}),
    "sg-0.5": Drawing("NPA + LFM + SG with cutoff 0.5", {"sg_cutoff": 0.5}),
}
_PARTS_AT_07 = {f"{name}-restart-0.7": Drawing(one.label, {**one.changes, "restart": 0.7}) for name, one in _PARTS.items()}
_SWITCHES = {  # each alone, beside the preset
    "lfm-0.25": Drawing("LFM cutoff 0.25", {"lfm_cutoff": 0.25}),
    "sg-annealed": Drawing("SG cutoff from 0.5 to 0.125", {"sg_cutoff_start": 0.5}),
    "gaussian": Drawing("Gaussian filter", {"filter": "gaussian"}),
    "butterworth": Drawing("Butterworth filter", {"filter": "butterworth"}),
    "trajectory": Drawing("SG to the base stage's trajectory", {"anchor": "trajectory"}),
    "alternate": Drawing("alternating patch grid", {"jitter": "alternate"}),
    "two-thirds": Drawing("guidance in the first two thirds", {"guidance_until": 2 / 3}),
    "falling": Drawing("restart 0.5 at 2x, 0.25 at 4x", {"restart": (0.5, 0.25)}),
    "combined": Drawing(
        "restart 0.5 at 2x, 0.25 at 4x; SG cutoff from 0.5 to 0.125; Butterworth; guidance in the first two thirds",
        {"restart": (0.5, 0.25), "sg_cutoff_start": 0.5, "filter": "butterworth", "guidance_until": 2 / 3},
    ),
    "upsampler": Drawing("trained upsampler", upsampler="demo"),
    "upsampler-sg-0.5": Drawing("trained upsampler, SG cutoff 0.5", {"sg_cutoff": 0.5}, upsampler="demo"),
    "super-resolution-trained": Drawing("base picture, trained upsampler", method="super-resolution", upsampler="demo"),
}
_COMBINED = {
    "upsampler-two-thirds": Drawing("trained upsampler, guidance in the first two thirds", {"guidance_until": 2 / 3}, upsampler="demo"),
}
_CONFIRMED = ("npa", "two-thirds", "upsampler", "upsampler-sg-0.5", *_COMBINED, "super-resolution-trained")  # those that seemed to help
_SWEEP = {
    f"restart-{restart}-cutoff-{cutoff}": Drawing(
        f"restart {restart}, cutoffs {cutoff}", {"restart": restart, "lfm_cutoff": cutoff, "sg_cutoff": cutoff}
    )
    for restart in (0.2, 0.3, 0.5)
    for cutoff in (0.125, 0.5)
}
_OTHERS = {name: Drawing(method_title(name), method=name) for name in METHODS if name != "hiflow"}  # which needs a flow model
_BICUBIC = {"super-resolution": Drawing("base picture, bicubic", method="super-resolution")}
_FULL = {
    "sdedit": Drawing("full attention alone", {"attention": "full", "lfm": False, "sg": False}),
    "full": Drawing("full attention + LFM + SG", {"attention": "full"}),
}
_UNDRAWN = {
    "autoencoded": Drawing("true renders of other scenes, autoencoded", method=""),
    "true": Drawing("true renders of other scenes", method=""),
}
DRAWINGS = _PARTS | _PARTS_AT_07 | _SWITCHES | _COMBINED | _SWEEP | _OTHERS | _BICUBIC | _FULL | _UNDRAWN

TABLES = {
    "methods": Table("All methods", (*_OTHERS, "super-resolution-trained", *_FULL, "npa", *_UNDRAWN), 1000, 16, 256),
    "parts": Table("The parts of the method, restart 0.7", (*_BICUBIC, *_PARTS_AT_07, *_UNDRAWN), 1000, 64, 256),
    "preset": Table("The parts of the method, restart of the preset", (*_BICUBIC, *_PARTS, *_UNDRAWN), 1000, 64, 256),
    "large": Table("The parts of the method, restart 0.7, at 8x", (*_BICUBIC, *_PARTS_AT_07, *_UNDRAWN), 1000, 64, 512),
    "switches": Table("A better default", ("npa", *_SWITCHES), 1000, 16, 256),
    "confirmed": Table("A better default, on other scenes", _CONFIRMED, 1016, 48, 256),
    "sweep": Table("Restart and cutoff", tuple(_SWEEP), 0, 8, 256),
}
BASELINE = ("npa", "npa-restart-0.7")
NATIVE = {"native": "native size", "native-true": "true renders, native size"}
WORDS = {"words": "prompts of an hour and a place"}
_TITLES = {name: one.title for name, one in TABLES.items()} | {"native": "At native size", "words": "Words"}
ROW_NAMES = [f"{name}/{row}" for name, one in TABLES.items() for row in one.rows] + [*NATIVE, *WORDS]

STATISTICS = {  # heading and format
    "one_disc": ("exactly one disc", "{:.1%}"),
    "hour": ("hour as prompted", "{:.1%}"),
    "place": ("place as prompted", "{:.1%}"),
    "discs": ("discs", "{:.2f}"),
    "faint": ("with faint discs", "{:.2f}"),
    "to_base": ("to the base, dB", "{:.1f}"),
    "swd": ("SWD", "{:.1f}"),
    "above": ("above native Nyquist, dB", "{:+.1f}"),
    "spectrum": ("spectrum distance", "{:.3f}"),
    "hf_ratio": ("HF ratio", "{:.4f}"),
    "seam": ("seam z", "{:+.2f}"),
    "seam_control": ("control z", "{:+.2f}"),
}
LEVELS = {f"swd_{side}": side for side in (512, 256, 128, 64, 32, 16)}
_FINER = {"to_base": "{:.2f}", "above": "{:.2f}"}  # of differences, whose errors are a tenth of those of the numbers
PAIRED = ("discs", "faint", "to_base", "swd", "above", "spectrum")  # those with a difference from the baseline, beside the levels of SWD
WORK = {"seconds": ("CPU s", "{:.1f}"), "gflops": ("attention GFLOPs", "{:.1f}"), "all_gflops": ("all GFLOPs", "{:.0f}")}
FACTS = ("command", "model", *facts.FACTS)
FIELDS = (
    "row", "n", "size", *(f"{name}{suffix}" for name in (*STATISTICS, *LEVELS) for suffix in ("", "_se")),
    *(f"{name}_gap{suffix}" for name in (*PAIRED, *LEVELS) for suffix in ("", "_se")), *WORK, *FACTS,
)  # fmt: skip

Rows = Mapping[str, Mapping[str, str]]
Row = Mapping[str, str]


def label_of(row: str) -> str:
    """The label of a row of the CSV, or of a drawing."""
    name = row.rpartition("/")[2]
    return DRAWINGS[name].label if name in DRAWINGS else (NATIVE | WORDS).get(name, name)


def sections(*results: Rows) -> list[str]:
    """A section for every group of rows, in it the tables of every machine's results, and what each row was measured with."""
    lines: list[str] = []
    for name, title in _TITLES.items():
        found = [rows for records in results if (rows := [row for key, row in records.items() if re.split("[/-]", key)[0] == name])]
        lines += [f"## {title}", ""] if found else []
        for rows in found:
            lines += [*_values(rows), "", *_gaps(rows), *_measured_with(rows)]
    return lines[:-1] or ["Not measured yet."]


def summary(records: Rows) -> list[str]:
    """The README's table: the main columns of all methods, and of the true renders as they are."""
    rows = [row for key, row in records.items() if key.startswith("methods/") and key != "methods/autoencoded"]
    return _values(rows, names=("one_disc", "faint", "to_base", "swd", "above", "seconds", "all_gflops")) if rows else []


def _values(rows: Sequence[Row], *, names: Sequence[str] = (*STATISTICS, *WORK)) -> list[str]:
    from pandas import DataFrame

    cells = {"row": [label_of(row["row"]) for row in rows], "pictures": [row["n"] for row in rows]}
    for name in names:
        heading, form = (STATISTICS | WORK)[name]
        if any(row.get(name) for row in rows):
            cells[heading] = _column(rows, name, form, errors=name in ("one_disc", *PAIRED))
        if name == "swd" and "spectrum" in names:  # in the table of all columns
            cells |= _levels(rows, "{}", "{:.0f}")
    return table(DataFrame(cells), text=["row"])


def _levels(rows: Sequence[Row], name: str, form: str, *, errors: bool = False) -> dict[str, list[str]]:
    """A column of SWD, or its differences, on the levels that were measured, if any was; `name` makes a column of the CSV of a level."""
    sides = {name.format(level): str(side) for level, side in LEVELS.items() if any(row.get(name.format(level)) for row in rows)}
    by_level = zip(*(_column(rows, level, form, errors=errors) for level in sides), strict=True)
    return {f"SWD at {', '.join(sides.values())} px": [", ".join(values) for values in by_level]} if sides else {}


def _gaps(rows: Sequence[Row]) -> list[str]:
    """The differences from the baseline; nothing without one."""
    from pandas import DataFrame

    baseline = next((row for row in rows if row["row"].rpartition("/")[2] in BASELINE), None)
    others = [row for row in rows if any(row.get(f"{name}_gap") for name in PAIRED)]
    if baseline is None or not others:
        return []
    cells = {"row": [label_of(row["row"]) for row in others]}
    for heading, form, name in ((*STATISTICS[name], name) for name in PAIRED):
        form = _FINER.get(name, form).replace("{:+", "{:").replace("{:", "{:+")
        cells[heading] = _column(others, f"{name}_gap", form)
        if name == "swd":
            cells |= _levels(others, "{}_gap", "{:+.0f}", errors=True)
    return [f"Differences from {label_of(baseline['row'])}, picture by picture:", "", *table(DataFrame(cells), text=["row"]), ""]


def _column(rows: Sequence[Row], name: str, form: str, *, errors: bool = True) -> list[str]:
    """The values of a column of the CSV, with their standard errors where they have one."""

    def cell(value: str, error: str) -> str:
        return form.format(float(value)) + (f" ± {form.replace('+', '').format(float(error))}" if error and errors else "")

    return [cell(row[name], row.get(f"{name}_se", "")) if row.get(name) else "-" for row in rows]


def _measured_with(rows: Sequence[Row]) -> list[str]:
    from pandas import DataFrame

    lines: list[str] = []
    groups = DataFrame(rows).groupby(list(FACTS), sort=False)["row"]
    for (command, model, torch_version, diffusers_version, machine, threads, commit), names in groups:
        which = f" ({'; '.join(label_of(name) for name in names)})" if groups.ngroups > 1 else ""
        lines.append(f"`{command}`{which}: model {model}, torch {torch_version}, diffusers {diffusers_version},")
        lines += [f"{machine}, {threads} threads, commit {commit}.", ""]
    return lines
