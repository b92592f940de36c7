"""Rows of a group as data frames: whole runs in one order, and the seconds of a run by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pandas import DataFrame, Series, factorize, isna, to_numeric

from bench.report.goals import METHODS
from bench.report.rows import Group

RUN = ["model", "size", "method", "compile"]
PARTS = ["attention", "cross", "rest of the denoiser", "guidance", "rest of the steps", "mixing", "encode", "decode", "rest"]
_RAW = ["step", "denoiser", "attention", "cross", "guidance", "mixing", "encode", "decode", "rest"]
_ROUNDING = 2e-4  # of the denoiser: the CSV has five digits


def of_full_size(groups: Sequence[Group]) -> list[Group]:
    """The groups without rows of the small models, which only show that every method runs."""
    rows = ([row for row in group.rows if not row["model"].endswith("-small")] for group in groups)
    return [group._replace(rows=left) for group, left in zip(groups, rows, strict=True) if left]


def numbers(frame: DataFrame, *columns: str) -> DataFrame:
    """Columns of text as numbers; NaN where there is none, or no such column."""
    return frame.reindex(columns=list(columns)).apply(to_numeric, errors="coerce")


def shown(values: Series[Any], form: str | Callable[[float], str]) -> Series[Any]:
    """Numbers as text; empty where there is none."""
    return values.map(lambda value: "" if isna(value) else form.format(value) if isinstance(form, str) else form(value)).astype(str)


def in_order(frame: DataFrame) -> DataFrame:
    """Models as they come; small sizes first; methods in one order; eager before compiled."""
    place = {method: index for index, method in enumerate(METHODS)}
    keys = {
        "model": factorize(frame["model"])[0], "size": frame["size"].astype(int),
        "method": frame["method"].map(place).fillna(len(place)), "compile": frame["compile"] != "eager",
    }  # fmt: skip
    order = DataFrame(keys, index=frame.index).sort_values(list(keys), kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def runs(group: Group) -> DataFrame:
    """Whole runs, with columns of numbers beside those of the CSV: the time measured or else composed, in `seconds`."""
    frame = DataFrame(group.rows)
    frame = in_order(frame[frame["part"] == "run"])
    frame["seconds"] = numbers(frame, "measured_s").measured_s.fillna(numbers(frame, "composed_s").composed_s)
    frame["title"] = frame["method"].replace(METHODS)
    return frame


def shares(group: Group) -> DataFrame:
    """Seconds of every composed run by part, with `RUN` as columns too. Attention in compiled blocks is in the rest of the denoiser.

    Raises:
        ValueError: attention takes longer than the denoiser that it is part of.
    """
    frame = DataFrame(group.rows)
    frame["seconds"] = numbers(frame, "in_run_s").in_run_s
    parts = frame[(frame["status"] == "ok") & ~frame["part"].isin(["run", "gate"]) & frame["seconds"].notna()]
    if parts.empty:
        return DataFrame(columns=[*RUN, *PARTS])
    stages = parts.pivot_table(index=[*RUN, "stage"], columns="part", values="seconds", aggfunc="sum", sort=False)
    stages = stages.reindex(columns=_RAW).fillna(0.0)
    inside = stages["attention"] + stages["cross"]
    for stage in stages.index[inside > (1 + _ROUNDING) * stages["denoiser"]]:
        model, size, method, how, name = stage
        where = f"{group.file}: {model}/{size}/{method}/{how}/{name}"
        took = f"got {inside[stage]:.5g} s for {stages['denoiser'][stage]:.5g} s"
        raise ValueError(f"{where}: attention and cross-attention must take no longer than the denoiser of their stage, {took}")
    stages["rest of the denoiser"] = (stages["denoiser"] - inside).clip(lower=0)
    stages["rest of the steps"] = stages["step"] - stages["denoiser"] - stages["guidance"]  # medians need not add up: can be negative
    whole = stages[PARTS].groupby(level=RUN, sort=False).sum().clip(lower=0)
    return in_order(whole[whole.sum(axis=1) > 0].reset_index())
