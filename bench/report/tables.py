"""The generated parts of docs/evidence/benchmarks.md and of the README's goals, each from the rows of one benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pandas import DataFrame, Series, factorize, isna, to_numeric

from bench.harness.pages import table
from bench.report.goals import GOALS, METHODS
from bench.report.rows import Group, Results, Row

RUN = ["model", "size", "method", "compile"]
PARTS = ["attention", "cross", "rest of the denoiser", "guidance", "rest of the steps", "mixing", "encode", "decode", "rest"]
_RAW = ["step", "denoiser", "attention", "cross", "guidance", "mixing", "encode", "decode", "rest"]
_HEADINGS = {"model": "model", "size": "px", "title": "method", "compile": "blocks"}
_FAR = 10  # percent between composed and measured from which a note says so


def goals(results: Results, *, readme: bool = False) -> list[str]:
    """Every goal with its number or why there is none, and the source of either; in the README its own selection."""
    lines, sources = [], dict[tuple[str, str], tuple[Group, list[Row]]]()
    for goal in (goal for goal in GOALS if goal.readme or not readme):
        answers = goal.answers(results)
        for answer in answers:
            sources.setdefault((answer.group.file, answer.group.source([])), (answer.group, []))[1].extend(answer.rows)
        lines += [[answer.group.machine, goal.what, goal.goal, goal.result_text(answer)] for answer in answers]
        lines += [] if answers else [[goal.device, goal.what, goal.goal, goal.result_text(None)]]
    found = DataFrame(lines, columns=["device", "what", "goal", "measured"])
    return table(found, text=found.columns) + [line for group, rows in sources.values() for line in ("", group.source(rows))]


def checks(results: Results) -> list[str]:
    """Tests and compute-sanitizer, as `bench.gpu` ran them on a device."""
    parts = [(group, row) for group in results.gpu for row in group.rows if row["row"] in ("tests", "tests-all", "sanitizer")]
    rows = [[row["row"], row["status"], row["note"], group.source([row]).partition(", ")[2]] for group, row in parts]
    found = DataFrame(rows, columns=["part", "status", "last line", "measured by"])
    return table(found, text=found.columns) if rows else ["Tests and compute-sanitizer on a GPU: not run yet."]


def pictures(results: Results) -> list[str]:
    """By group: whole runs, and where their time goes."""
    lines: list[str] = []
    groups = of_full_size(results.cascade)
    for group in groups:
        frame, parts = runs(group), shares(group)
        lines += [*_heading(group, groups), *_runs_table(frame), *_skipped(frame["model"] + " by " + frame["title"], frame)]
        if not parts.empty:
            percent = parts[PARTS].div(parts[PARTS].sum(axis=1), axis=0).mul(100).map("{:.1f}%".format)
            names = parts[RUN].assign(title=parts["method"].replace(METHODS))[list(_HEADINGS)].rename(columns=_HEADINGS)
            lines += ["", "Share of the composed time:", "", *table(names.join(percent), text=_HEADINGS.values())]
    return lines


def attention(results: Results) -> list[str]:
    """One call by every implementation, by group."""
    return [line for group in results.attention for line in (*_heading(group, results.attention), *_calls_table(group))]


def of_full_size(groups: Sequence[Group]) -> list[Group]:
    """The groups without rows of the small models, which only show that every method runs."""
    rows = ([row for row in group.rows if not row["model"].endswith("-small")] for group in groups)
    return [group._replace(rows=left) for group, left in zip(groups, rows, strict=True) if left]


def numbers(frame: DataFrame, *columns: str) -> DataFrame:
    """Columns of text as numbers; NaN where there is none, or no such column."""
    return frame.reindex(columns=list(columns)).apply(to_numeric, errors="coerce")


def runs(group: Group) -> DataFrame:
    """Whole runs, with columns of numbers beside those of the CSV: the time measured or else composed, in `seconds`."""
    frame = DataFrame(group.rows)
    frame = _in_order(frame[frame["part"] == "run"])
    frame["seconds"] = numbers(frame, "measured_s").measured_s.fillna(numbers(frame, "composed_s").composed_s)
    frame["title"] = frame["method"].replace(METHODS)
    return frame


def shares(group: Group) -> DataFrame:
    """Seconds of every composed run by part, with `RUN` as columns too. Attention in compiled blocks is in the rest of the denoiser."""
    frame = DataFrame(group.rows)
    frame["seconds"] = numbers(frame, "in_run_s").in_run_s
    parts = frame[(frame["status"] == "ok") & ~frame["part"].isin(["run", "gate"]) & frame["seconds"].notna()]
    if parts.empty:
        return DataFrame(columns=[*RUN, *PARTS])
    stages = parts.pivot_table(index=[*RUN, "stage"], columns="part", values="seconds", aggfunc="sum", sort=False)
    stages = stages.reindex(columns=_RAW).fillna(0.0)
    stages["rest of the denoiser"] = (stages["denoiser"] - stages["attention"] - stages["cross"]).clip(lower=0)
    stages["rest of the steps"] = stages["step"] - stages["denoiser"] - stages["guidance"]  # medians need not add up: can be negative
    whole = stages[PARTS].groupby(level=RUN, sort=False).sum().clip(lower=0)
    return _in_order(whole[whole.sum(axis=1) > 0].reset_index())


def _in_order(frame: DataFrame) -> DataFrame:
    """Models as they come; small sizes first; methods in one order; eager before compiled."""
    place = {method: index for index, method in enumerate(METHODS)}
    method = frame["method"].map(place).fillna(len(place))
    numbered = {"model": factorize(frame["model"])[0], "size": frame["size"].astype(int), "compile": frame["compile"] != "eager"}
    keys = frame.assign(**numbered, method=method).sort_values(RUN, kind="stable")
    return frame.loc[keys.index].reset_index(drop=True)


def _heading(group: Group, groups: Sequence[Group]) -> list[str]:
    """Machine and commit; settings too where another group differs in nothing else."""
    twins = [other for other in groups if (other.machine, other.facts["commit"]) == (group.machine, group.facts["commit"])]
    settings = f", {group.settings}" if len(twins) > 1 and group.settings else ""
    return ["", f"### {group.machine}, {group.facts['commit']}{settings}", "", group.source(), ""]


def _skipped(names: Series[Any], frame: DataFrame) -> list[str]:
    """One line for every name and reason of the rows that were skipped."""
    counts = frame.assign(name=names)[frame["status"] == "skipped"].groupby(["name", "note"], sort=False).size()
    lines = [f"- {name}: {note} ({count} row{'s' * (count > 1)})." for (name, note), count in counts.items()]
    return ["", "Skipped:", "", *lines] if lines else []


def _shown(values: Series[Any], form: str | Callable[[float], str]) -> Series[Any]:
    """Numbers as text; empty where there is none."""
    return values.map(lambda value: "" if isna(value) else form.format(value) if isinstance(form, str) else form(value)).astype(str)


def _remarks(frame: DataFrame) -> Series[Any]:
    """The note of a row, after its status where that is not ok."""
    joined = frame["status"].replace("ok", "").str.cat(frame["note"].fillna(""), sep=": ")
    return joined.str.removeprefix(": ").str.removesuffix(": ")


def _runs_table(frame: DataFrame) -> list[str]:
    ok = frame["status"] == "ok"
    times = numbers(frame, "measured_s", "composed_s", "p20_ms", "p50_ms", "p80_ms").where(ok)
    ours = frame[RUN].assign(**times)[frame["method"] == "npa"].drop(columns="method")
    ours = frame[RUN].merge(ours, how="left", on=["model", "size", "compile"])
    measured, composed = (_shown(times[column] / ours[column], "{:.2f}") for column in ("measured_s", "composed_s"))
    spread = _shown(times["p50_ms"] / 1e3, "{:.5g}")
    spread += _shown(times["p20_ms"] / 1e3, " ({:.5g} - ") + _shown(times["p80_ms"] / 1e3, "{:.5g})")
    off = 100 * (times["composed_s"] / times["measured_s"] - 1)
    far = _shown(off.where(off.abs() > _FAR), lambda x: f"composed {abs(x):.0f} % {'above' if x > 0 else 'below'} measured; ")
    whole = times[["p20_ms", "p50_ms", "p80_ms"]].notna().all(axis=1)
    given = {"useful TFLOP": "useful_tflop", "% of a matrix product": "matrix_percent", "peak MB": "peak_megabytes",
             "of it before the run": "before_megabytes"}  # fmt: skip
    cells = frame[list(_HEADINGS)].rename(columns=_HEADINGS).assign(**{
        "s, measured": spread.where(whole, frame["measured_s"].where(ok, "")),
        "s, composed": frame["composed_s"].where(ok, ""),
        "x ours": measured.where(measured != "", composed.where(composed == "", composed + " composed")),
        **{heading: frame.get(column, Series("", index=frame.index)).where(ok, "") for heading, column in given.items()},
        "note": (far + _remarks(frame)).str.removesuffix("; "),
    })  # fmt: skip
    return table(cells[frame["status"] != "skipped"], text=("model", "px", "method", "blocks", "note"))


def _calls_table(group: Group) -> list[str]:
    frame = DataFrame(group.rows)
    task = [row.removesuffix(f"/{provider}") for row, provider in zip(frame["row"], frame["provider"], strict=True)]
    frame = frame.assign(task=task).reindex(columns=dict.fromkeys([*frame, "task", "backend", "setup_ms", "peak_megabytes"]), fill_value="")
    ok = frame["status"] == "ok"
    values = numbers(frame, "p50_ms", "useful_gflop", "executed_gflop").where(ok)
    ours = values["p50_ms"][frame["provider"] == ("sdpa" if group.on_cpu else "triton")]
    ours.index = frame["task"][ours.index]
    cells = DataFrame({
        "shape": frame["task"], "implementation": frame["provider"], "computes": frame["function"],
        "ms": (frame["p50_ms"] + " (" + frame["p20_ms"] + " - " + frame["p80_ms"] + ")").where(ok, ""),
        "x ours": _shown(values["p50_ms"] / frame["task"].map(ours), "{:.2f}"),
        "useful TFLOP/s": frame["tflops"].where(ok, ""), "% of a matrix product": frame["matrix_percent"].where(ok, ""),
        "executed / useful": _shown(values["executed_gflop"] / values["useful_gflop"], "{:.2f}"),
        "made ready, ms": frame["setup_ms"].where(ok, ""), "peak MB": frame["peak_megabytes"].where(ok, ""),
        "error": frame["error"].where(ok, ""),
        "by": frame["backend"].where(ok, "").str.cat(_remarks(frame), sep="; ").str.strip("; "),
    })  # fmt: skip
    shown = table(cells[frame["status"] != "skipped"], text=("shape", "implementation", "computes", "by"))
    return shown + _skipped(frame["provider"], frame)
