"""The rows that `bench.quality` measures, their columns, and the tables of docs/evidence/quality.md and of the README."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bench.harness import facts
from bench.harness.pages import table

# By row: its label, and the settings of the embedded model's preset that it changes.
ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full attention + LFM + SG", {"attention": "full"}),
    "npa": ("NPA + LFM + SG", {"attention": "npa"}),
    "npa-no-lfm": ("NPA without LFM", {"attention": "npa", "lfm": False}),
    "npa-no-sg": ("NPA without SG", {"attention": "npa", "sg": False}),
    "npa-alone": ("NPA without both", {"attention": "npa", "lfm": False, "sg": False}),
}
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {  # each alone, beside the row with none
    "no-switch": ("as in the preset", {}),
    "lfm-cutoff-0.25": ("LFM cutoff 0.25 in place of 0.125", {"lfm_cutoff": 0.25}),
    "sg-cutoff-0.25": ("SG cutoff 0.25 in place of 0.125", {"sg_cutoff": 0.25}),
    "sg-annealed": ("SG cutoff from 0.5 to 0.125", {"sg_cutoff_start": 0.5}),
    "gaussian": ("Gaussian filter", {"filter": "gaussian"}),
    "butterworth": ("Butterworth filter", {"filter": "butterworth"}),
    "trajectory": ("SG to the base stage's trajectory", {"anchor": "trajectory"}),
    "alternate": ("alternating patch grid", {"jitter": "alternate"}),
    "guided-two-thirds": ("guidance in the first two thirds", {"guidance_until": 2 / 3}),
}
SWEEP: dict[str, tuple[str, dict[str, Any]]] = {
    (name := f"restart-{restart}-cutoff-{cutoff}"): (
        name, {"attention": "npa", "restart": restart, "lfm_cutoff": cutoff, "sg_cutoff": cutoff}
    )
    for restart in (0.2, 0.3, 0.4, 0.5)
    for cutoff in (0.125, 0.25, 0.5)
}  # fmt: skip
CASCADES = {name: settings for name, (_, settings) in (ABLATION | SWEEP | SWITCHES).items()}
RECORDED = {"super-resolution": "base picture, bicubic", "diffusehigh": "DiffuseHigh", "scalecrafter": "ScaleCrafter"}  # work as recorded
METHODS = {"multidiffusion": "MultiDiffusion", "demofusion": "DemoFusion", **RECORDED}
UNDRAWN = {"autoencoded": "true renders, autoencoded", "true": "true renders"}  # by no model
NATIVE = {"native": "native size", "native-true": "true renders, native size"}
WORDS = {"words": "prompts of an hour and a place"}
LABELS = {"direct": "direct inference", **METHODS, **UNDRAWN, **NATIVE, **WORDS}
LABELS |= {name: label for name, (label, _) in (ABLATION | SWEEP | SWITCHES).items()}
TABLES = {
    "The parts of the method": ("direct", *METHODS, *ABLATION, *UNDRAWN),
    "The switches": tuple(SWITCHES),
    "Restart and cutoff": tuple(SWEEP),
    "At native size": tuple(NATIVE),
    "Words": tuple(WORDS),
}
COLUMNS = {  # heading and format
    "n": ("pictures", "{:.0f}"),
    "size": ("pixels", "{:.0f}"),
    "one_disc": ("exactly one disc", "{:.1%}"),
    "hour": ("hour as prompted", "{:.1%}"),
    "place": ("place as prompted", "{:.1%}"),
    "discs": ("discs", "{:.2f}"),
    "swd": ("SWD, all levels", "{:.1f}"),
    "swd_fine": ("SWD, finest", "{:.1f}"),
    "spectrum": ("spectrum distance", "{:.3f}"),
    "hf_ratio": ("HF ratio", "{:.4f}"),
    "seam": ("seam z", "{:+.2f}"),
    "seam_control": ("control z", "{:+.2f}"),
    "seconds": ("s per picture", "{:.2f}"),
    "gflops": ("attention GFLOPs", "{:.2f}"),
    "all_gflops": ("all GFLOPs", "{:.1f}"),
}
SPREAD = ("seconds_p20", "seconds_p80")  # beside the median, in its cell
FACTS = ("command", "model", *facts.FACTS)
FIELDS = ("row", *COLUMNS, *SPREAD, *FACTS)

Rows = Mapping[str, Mapping[str, str]]


def sections(*results: Rows) -> list[str]:
    """A section for every group of rows, in it a table for every machine's results, and what each row was measured with."""
    lines: list[str] = []
    for title, names in TABLES.items():
        tables = [rows for records in results if (rows := [records[name] for name in names if name in records])]
        lines += [f"## {title}", ""] if tables else []
        for rows in tables:
            lines += [*_table(rows, spread=True), "", *_measured_with(rows)]
    return lines[:-1]


def summary(records: Rows) -> list[str]:
    """The README's table: the main columns of the ablation."""
    rows = [records[name] for name in ("direct", *METHODS, *ABLATION) if name in records]
    return _table(rows, columns=("one_disc", "discs", "swd", "seconds", "gflops", "all_gflops"))


def _table(rows: Sequence[Mapping[str, str]], *, columns: Collection[str] = COLUMNS.keys(), spread: bool = False) -> list[str]:
    from pandas import DataFrame

    cells = DataFrame({"row": [LABELS.get(row["row"], row["row"]) for row in rows]})
    for name in columns:
        heading, form = COLUMNS[name]
        if any(row.get(name) for row in rows):
            cells[heading] = [form.format(float(row[name])) if row.get(name) else "-" for row in rows]
        if name == "seconds" and spread and heading in cells:
            low, high = SPREAD
            cells[heading] += [f" ({float(row[low]):.2f} - {float(row[high]):.2f})" if row.get(low) else "" for row in rows]
    return table(cells, text=["row"])


def _measured_with(rows: Sequence[Mapping[str, str]]) -> list[str]:
    from pandas import DataFrame

    lines: list[str] = []
    groups = DataFrame(rows).groupby(list(FACTS), sort=False)["row"]
    for (command, model, torch_version, diffusers_version, machine, threads, commit), names in groups:
        which = f" ({', '.join(names)})" if groups.ngroups > 1 else ""
        lines.append(f"`{command}`{which}: model {model}, torch {torch_version}, diffusers {diffusers_version},")
        lines += [f"{machine}, {threads} threads, commit {commit}.", ""]
    return lines
