"""Scores as rows of a CSV and as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bench.evaluate.distances import Interval
from bench.evaluate.scoring import REFERENCE, Score
from bench.harness.facts import FACTS
from bench.harness.pages import table
from bench.harness.rows import Row

_DIFFERENCE = ("difference", "difference_low", "difference_high")
FIELDS = (
    "row", "folder", "statistic", *Interval._fields, "baseline", *_DIFFERENCE, "pictures", "references", "protocol", "command", *FACTS,
)  # fmt: skip
# Heading, and what a good value is.
STATISTICS = {
    "fid": ("FID", "lower"), "kid": ("KID", "lower"), "is": ("IS", "higher"),
    "fid_patch": ("FID of crops", "lower"), "kid_patch": ("KID of crops", "lower"),
    "is_patch": ("IS of crops", "higher"), "clip": ("CLIP", "higher"),
    "swd": ("SWD", "lower"), "swd_fine": ("SWD, finest level", "lower"), "spectrum": ("spectrum", "lower"),
    "hf_ratio": ("HF ratio", "that of true pictures"), "sharpness": ("sharpness", "that of true pictures"),
    "repetition": ("repetition", "that of true pictures"), "seam": ("seam", "as its control"), "seam_control": ("seam control", ""),
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
    from pandas import DataFrame

    headings = {name: f"{heading} ({good})" if good else heading for name, (heading, good) in STATISTICS.items()}
    values = [{"folder": folder} | {headings[name]: _shown(one.value) for name, one in row.items()} for folder, row in scores.items()]
    baseline, *others = (folder for folder in scores if folder != REFERENCE)
    gaps = [{"folder": folder} | {STATISTICS[name][0]: _shown(one.difference) for name, one in scores[folder].items()} for folder in others]
    lines = [f"{pictures} pictures a folder, {references or 'no'} reference pictures{compared}. In brackets: 95 % bootstrap over pictures."]
    lines += ["", *table(DataFrame(values, columns=["folder", *headings.values()]), text=["folder"])]
    if gaps:
        lines += ["", f"Differences from {baseline}, paired by prompt and seed:", ""]
        lines += table(DataFrame(gaps, columns=["folder", *(heading for heading, _ in STATISTICS.values())]), text=["folder"])
    return "\n".join([*lines, *(line for note in notes for line in ("", note)), ""])


def _shown(one: Interval | None) -> str:
    if one is None:
        return ""
    return f"{one.value:.4g}" + ("" if math.isnan(one.low) else f" [{one.low:.4g}, {one.high:.4g}]")
