"""Scores as rows of a CSV and as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bench.evaluate.distances import Interval
from bench.evaluate.scoring import REFERENCE, Score
from bench.harness.facts import FACTS
from bench.harness.rows import Row

_DIFFERENCE = ("difference", "difference_low", "difference_high")
FIELDS = (
    "row", "folder", "statistic", *Interval._fields, "baseline", *_DIFFERENCE, "pictures", "references", "protocol", "command", *FACTS,
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


def records(scores: Scores, *, protocol: str, pictures: int, references: int, command: str) -> Iterator[Row]:
    """A row for each folder and statistic."""
    for folder, columns in scores.items():
        for statistic, one in columns.items():
            numbers = one.value._asdict()
            if one.difference is not None:
                numbers |= dict(zip(_DIFFERENCE, one.difference, strict=True))
            yield {
                "row": "/".join(filter(None, (folder, protocol, statistic))), "folder": folder, "statistic": statistic,
                **{name: "" if math.isnan(number) else f"{number:.6g}" for name, number in numbers.items()},
                "baseline": "" if one.difference is None else next(iter(scores)),
                "pictures": str(references if folder == REFERENCE else pictures), "references": str(references),
                "protocol": protocol, "command": command,
            }  # fmt: skip


def page(scores: Scores, *, pictures: int, references: int, compared: str, notes: Sequence[str]) -> str:
    """The page: a table of values, one of differences from the first folder, and notes."""
    names = [name for name in STATISTICS if any(name in columns for columns in scores.values())]
    headings = [f"{heading} ({good})" if good else heading for heading, good in (STATISTICS[name] for name in names)]
    values = {folder: [_shown(columns[name].value) if name in columns else "" for name in names] for folder, columns in scores.items()}
    lines = [f"{pictures} pictures a folder, {references or 'no'} reference pictures{compared}. In brackets: 95 % bootstrap over pictures."]
    lines += ["", *_table(headings, values)]
    baseline, *others = (folder for folder in scores if folder != REFERENCE)
    if others:
        gaps = {folder: [_shown(scores[folder][name].difference) if name in scores[folder] else "" for name in names] for folder in others}
        lines += ["", f"Differences from {baseline}, paired by prompt and seed:", ""]
        lines += _table([STATISTICS[name][0] for name in names], gaps)
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), ""])


def _table(headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    rule = "|".join(["---", *("--:" for _ in headings)])
    return [f"| folder | {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join([name, *row])} |" for name, row in rows.items())]


def _shown(one: Interval | None) -> str:
    if one is None:
        return ""
    return f"{one.value:.4g}" + ("" if math.isnan(one.low) else f" [{one.low:.4g}, {one.high:.4g}]")
