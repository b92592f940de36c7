"""Scores as rows of a CSV and as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from bench.evaluate.distances import Interval
from bench.evaluate.protocols import Protocol, described
from bench.evaluate.scoring import REFERENCE, Score
from bench.harness.facts import FACTS
from bench.harness.rows import Row

FIELDS = (
    "row", "folder", "statistic", "value", "low", "high", "baseline", "difference", "difference_low", "difference_high", "pictures",
    "references", "protocol", "note", "command", *FACTS,
)  # fmt: skip
# Heading, and what a good value is.
STATISTICS = {
    "fid": ("FID", "lower"), "kid": ("KID", "lower"), "kid_subsets": ("KID of subsets", "lower"), "is": ("IS", "higher"),
    "fid_patch": ("FID of crops", "lower"), "kid_patch": ("KID of crops", "lower"),
    "kid_patch_subsets": ("KID of crops, subsets", "lower"), "is_patch": ("IS of crops", "higher"), "clip": ("CLIP", "higher"),
    "swd": ("SWD", "lower"), "swd_fine": ("SWD, finest level", "lower"), "spectrum": ("spectrum", "lower"),
    "hf_ratio": ("HF ratio", "that of true pictures"), "seam": ("seam", "as its control"), "seam_control": ("seam control", ""),
    "discs": ("discs", "1 in a true picture"), "seconds": ("s per picture", "lower"),
}  # fmt: skip
Scores = Mapping[str, Mapping[str, Score]]


def records(scores: Scores, *, protocol: str, pictures: int, references: int, command: str) -> Iterable[Row]:
    """A row for each folder and statistic."""
    baseline = next(iter(scores))
    for folder, columns in scores.items():
        for statistic, one in columns.items():
            gap = one.difference
            yield {
                "row": f"{folder}/{protocol}/{statistic}" if protocol else f"{folder}/{statistic}",
                "folder": folder, "statistic": statistic, "value": _cell(one.value.value), "low": _cell(one.value.low),
                "high": _cell(one.value.high), "baseline": baseline if gap else "", "difference": _cell(gap.value) if gap else "",
                "difference_low": _cell(gap.low) if gap else "", "difference_high": _cell(gap.high) if gap else "",
                "pictures": str(references if folder == REFERENCE else pictures), "references": str(references),
                "protocol": protocol, "note": one.note, "command": command,
            }  # fmt: skip


def page(scores: Scores, protocols: Mapping[str, Protocol], *, pictures: int, references: int, compared: str, notes: Sequence[str]) -> str:
    """The page: a table of values, one of differences from the first folder, and what the protocol means."""
    baseline, names = next(iter(scores)), [name for name in STATISTICS if any(name in columns for columns in scores.values())]
    headings = [f"{heading} ({good})" if good else heading for heading, good in (STATISTICS[name] for name in names)]
    lines = [
        f"{pictures} pictures a folder, {references or 'no'} reference pictures{compared}. In brackets: 95 % bootstrap over pictures.",
        "",
    ]
    lines += _table(["folder", *headings], [[f, *(_shown(c[n].value) if n in c else "" for n in names)] for f, c in scores.items()])
    gaps = {f: [_shown(c[n].difference) if n in c else "" for n in names] for f, c in scores.items() if f not in (baseline, REFERENCE)}
    if gaps:
        lines += ["", f"Differences from {baseline}, paired by prompt and seed:", ""]
        lines += _table(["folder", *(STATISTICS[name][0] for name in names)], [[f, *cells] for f, cells in gaps.items()])
    for name, protocol in protocols.items():
        lines += ["", *described(name, protocol)]
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), ""])


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = "|".join(["---", *("--:" for _ in headings[1:])])
    return [f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def _shown(one: Interval | None) -> str:
    if one is None:
        return ""
    return f"{one.value:.4g}" + ("" if math.isnan(one.low) else f" [{one.low:.4g}, {one.high:.4g}]")


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
