"""The generated parts of docs/evidence/benchmarks.md and of the README's goals, each from the rows of one benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pandas import DataFrame, Series

from bench.harness.tables import table
from bench.report.frames import PARTS, RUN, numbers, of_full_size, runs, shares, shown
from bench.report.goals import GOALS, METHODS, Answer
from bench.report.rows import Group, Results, Row

_FAR = 10  # percent between composed and measured from which a note says so
_RUN_HEADINGS = {"model": "model", "size": "px", "title": "method", "compile": "blocks"}


def goals(results: Results, *, readme: bool = False) -> list[str]:
    """Every goal with its number or why there is none, and the source of the numbers; in the README its own selection."""
    lines, sources = [], dict[tuple[str, str], tuple[Group, list[Row]]]()
    for goal in GOALS:
        answers: Sequence[Answer | None] = goal.answers(results) or [None]
        for answer in answers if goal.readme or not readme else ():
            device = goal.device if answer is None or answer.value is None else answer.group.machine
            lines.append([device, goal.what, goal.goal, goal.result_text(answer)])
            if answer and answer.rows:
                sources.setdefault((answer.group.file, answer.group.source([])), (answer.group, []))[1].extend(answer.rows)
    found = DataFrame(lines, columns=["device", "what", "goal", "measured"])
    return table(found, text=found.columns) + [line for group, rows in sources.values() for line in ("", group.source(rows))]


def checks(results: Results) -> list[str]:
    """Tests and compute-sanitizer, as `bench.gpu` ran them on a device."""
    parts = [(group, row) for group in results.gpu for row in group.rows if row["row"] in ("tests", "tests-all", "sanitizer")]
    rows = [[row["row"], row["status"], row["note"], group.source([row]).partition(", ")[2]] for group, row in parts]
    found = DataFrame(rows, columns=["part", "status", "last line", "measured by"])
    return table(found, text=found.columns) if rows else ["Tests and compute-sanitizer on a GPU: not run yet."]


def heading(group: Group, groups: Sequence[Group]) -> list[str]:
    """Machine and commit; settings too where another group differs in nothing else."""
    twins = [other for other in groups if (other.machine, other.facts["commit"]) == (group.machine, group.facts["commit"])]
    settings = f", {group.settings}" if len(twins) > 1 and group.settings else ""
    return ["", f"### {group.machine}, {group.facts['commit']}{settings}", "", group.source(), ""]


def skipped(names: Series[Any], frame: DataFrame) -> list[str]:
    """One line for every name and reason of the rows that were skipped."""
    rows = frame.assign(name=names)[frame["status"] == "skipped"]
    counts = rows.groupby(["name", "note"], sort=False).size()
    lines = [f"- {name}: {note} ({count} row{'s' * (count > 1)})." for (name, note), count in counts.items()]
    return ["", "Skipped:", "", *lines] if lines else []


def _remarks(frame: DataFrame) -> Series[Any]:
    """The note of a row, after its status where that is not ok."""
    status = frame["status"].where(frame["status"] != "ok", "")
    joined = status.str.cat(frame["note"].fillna(""), sep=": ")
    return joined.str.removeprefix(": ").str.removesuffix(": ")


def pictures(results: Results) -> list[str]:
    """By group: whole runs, and where their time goes."""
    lines: list[str] = []
    groups = of_full_size(results.cascade)
    for group in groups:
        frame, parts = runs(group), shares(group)
        lines += [*heading(group, groups), *_runs_table(frame), *skipped(frame["model"] + " by " + frame["title"], frame)]
        if not parts.empty:
            percent = parts[PARTS].div(parts[PARTS].sum(axis=1), axis=0).mul(100).map("{:.1f}%".format)
            names = parts[RUN].assign(title=parts["method"].replace(METHODS))[list(_RUN_HEADINGS)].rename(columns=_RUN_HEADINGS)
            lines += ["", "Share of the composed time:", "", *table(names.join(percent), text=("model", "px", "method", "blocks"))]
    return lines


def _runs_table(frame: DataFrame) -> list[str]:
    columns = ("measured_s", "composed_s", "p20_ms", "p50_ms", "p80_ms")
    times = numbers(frame, *columns).where(frame["status"] == "ok")
    ours = frame[RUN].assign(**times)[(frame["method"] == "npa")].drop(columns="method")
    ours = frame[RUN].merge(ours, how="left", on=["model", "size", "compile"])
    measured, composed = (shown(times[column] / ours[column], "{:.2f}") for column in columns[:2])
    spread = shown(times["p50_ms"] / 1e3, "{:.5g}") + shown(times["p20_ms"] / 1e3, " ({:.5g} - ") + shown(times["p80_ms"] / 1e3, "{:.5g})")
    off = 100 * (times["composed_s"] / times["measured_s"] - 1)
    far = shown(off.where(off.abs() > _FAR), lambda x: f"composed {abs(x):.0f} % {'above' if x > 0 else 'below'} measured; ")
    ok, empty = frame["status"] == "ok", Series("", index=frame.index)
    cells = frame[list(_RUN_HEADINGS)].rename(columns=_RUN_HEADINGS).assign(
        **{
            "s, measured": spread.where(times[["p20_ms", "p50_ms", "p80_ms"]].notna().all(axis=1), frame["measured_s"].where(ok, "")),
            "s, composed": frame["composed_s"].where(ok, ""),
            "x ours": measured.where(measured != "", composed.where(composed == "", composed + " composed")),
            "useful TFLOP": frame["useful_tflop"].where(ok, ""),
            "% of a matrix product": frame["matrix_percent"].where(ok, ""),
            "peak MB": frame.get("peak_megabytes", empty).where(ok, ""),
            "of it before the run": frame.get("before_megabytes", empty).where(ok, ""),
            "note": (far + _remarks(frame)).str.removesuffix("; "),
        }
    )  # fmt: skip
    return table(cells[frame["status"] != "skipped"], text=("model", "px", "method", "blocks", "note"))


def attention(results: Results) -> list[str]:
    """One call by every implementation, by group."""
    return [line for group in results.attention for line in (*heading(group, results.attention), *_calls(group))]


def _calls(group: Group) -> list[str]:
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
        "x ours": shown(values["p50_ms"] / frame["task"].map(ours), "{:.2f}"),
        "useful TFLOP/s": frame["tflops"].where(ok, ""), "% of a matrix product": frame["matrix_percent"].where(ok, ""),
        "executed / useful": shown(values["executed_gflop"] / values["useful_gflop"], "{:.2f}"),
        "made ready, ms": frame["setup_ms"].where(ok, ""), "peak MB": frame["peak_megabytes"].where(ok, ""),
        "error": frame["error"].where(ok, ""),
        "by": frame["backend"].where(ok, "").str.cat(_remarks(frame), sep="; ").str.strip("; "),
    })  # fmt: skip
    return table(cells[frame["status"] != "skipped"], text=("shape", "implementation", "computes", "by")) + skipped(
        frame["provider"], frame
    )
