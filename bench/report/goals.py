"""The project's performance goals, and how far each is met: every number out of one group of the CSVs. Needs no pandas.

A baseline counts at its best configuration among those tried for both sides: blocks compiled or not, any of its backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from bench.report.rows import NOT_YET, Group, Results, Row

HOPPER = "H100 or H200"
METHODS = {
    "npa": "ScaleDiff, ours",
    "npa-global": "ScaleDiff, ours, text queries once",
    "authors": "ScaleDiff, the authors' form",
    "authors-jitter": "ScaleDiff, the authors' form with their padded jitter",
    "cascade-full": "the cascade with full attention",
    "multidiffusion": "MultiDiffusion",
    "demofusion": "DemoFusion",
    "direct": "direct inference",
}
FAMILIES = {
    "gather and SDPA": ("gather", "gather-cudnn", "gather-flash"),
    "FlexAttention on tiles": ("flex", "flex-pretiled"),
    "NATTEN as called": ("natten",),
    "the fastest dense attention, windows ready": ("windows-cudnn", "windows-flash"),
}
FACTORS = dict(zip(FAMILIES, (2, 1.3, 1, 1), strict=True))  # how many times as fast as each the kernel should be
NO_ROTATED_TEXT = ("FlexAttention on tiles", "NATTEN as called")  # they cannot rotate text for each window
KERNEL = {
    "flux-4096/bf16/window": ("FLUX 4096 px, 512 text, bf16", 650.0),
    "sdxl-64-4096/fp16": ("SDXL 4096 px, 256 x 256, fp16", 476.0),
    "sdxl-32-4096/fp16": ("SDXL 4096 px, 128 x 128, fp16", 476.0),
}


class Answer(NamedTuple):
    """What one group says about a goal, and the rows that say so. Without a number the note says why there is none."""

    group: Group
    value: float | None
    note: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Goal:
    device: str  # parts of the machine's name, joined by "or", or "CPU"
    what: str  # is measured
    bound: float  # to reach
    unit: str  # after the number
    kind: Literal["attention", "cascade"]  # the benchmark
    find: Callable[[Group], Answer | None]  # the answer of one group; None where rows are missing
    most: bool = False  # the bound is not to be exceeded, instead of to be reached
    readme: bool = True  # shown in the README too

    @property
    def goal(self) -> str:
        return f"{'within' if self.most else 'at least'} {self.bound:g}{self.unit}"

    def answers(self, results: Results) -> list[Answer]:
        """Of groups that were measured on such a device, every one with a number; without any, the last that says why not."""
        groups: Iterable[Group] = getattr(results, self.kind)
        if self.device == "CPU":
            here = [group for group in groups if group.on_cpu]
        else:
            here = [group for group in groups if any(name in group.machine for name in self.device.split(" or "))]
        found = [answer for group in here if (answer := self.find(group)) is not None]
        return [answer for answer in found if answer.value is not None] or found[-1:]

    def result_text(self, answer: Answer | None) -> str:
        """The number and whether the goal is met, or why there is none."""
        if answer is None or answer.value is None:
            return answer.note if answer else NOT_YET
        digits = next(n for n in range(3, 18) if self._met(float(f"{answer.value:.{n}g}")) == self._met(answer.value))
        return f"{answer.value:.{digits}g}{self.unit}, {'met' if self._met(answer.value) else 'missed'} ({answer.note})"

    def _met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


def _untimed(group: Group, *sides: Iterable[Row]) -> Answer | None:
    """Why there is no number: of the first side without a time a row that failed, or else one that was skipped."""
    side = next((rows for rows in sides if all(row["status"] != "ok" for row in rows)), ())
    row = min(side, key=lambda row: row["status"] == "skipped", default=None)
    return None if row is None else Answer(group, None, f"{row['status']}: {row['note']} ({row['row']})", (row,))


def _fastest(*sides: Iterable[Row]) -> tuple[str, list[Row]] | None:
    """The fastest row of each side in the first column that every side has a time in: never a measured run beside a composed one."""
    for column in ("measured_s", "composed_s", "p50_ms"):  # whole runs have p50_ms only beside measured_s
        timed = [[row for row in rows if row["status"] == "ok" and row.get(column)] for rows in sides]
        if all(timed):
            return column, [min(rows, key=lambda row: float(row[column])) for rows in timed]
    return None


def _runs(group: Group, model: str, method: str, size: int = 4096) -> dict[str, Row]:
    """Whole runs, by how blocks are run: eagerly or compiled."""
    wanted = ("run", model, str(size), method)
    return {row["compile"]: row for row in group.rows if (row["part"], row["model"], row["size"], row["method"]) == wanted}


def _calls(group: Group, task: str, providers: Sequence[str]) -> list[Row]:
    return [row for row in group.rows if row["provider"] in providers and row["row"] == f"{task}/{row['provider']}"]


def _ratio(group: Group, ours: Iterable[Row], theirs: Iterable[Row]) -> Answer | None:
    """How many times as long the other side takes, each at its best."""
    if (best := _fastest(ours, theirs)) is None:
        return _untimed(group, ours, theirs)
    column, (one, two) = best
    unit = column.rpartition("_")[2]
    how = two["provider"] if unit == "ms" else f"{column.removesuffix('_s')}; {one['compile']} for {two['compile']}"
    note = f"{one[column]} {unit} for {two[column]} {unit}, {how}"
    return Answer(group, float(two[column]) / float(one[column]), note, (one, two))


def quicker(model: str, other: str, group: Group) -> Answer | None:
    """How many times as long another method takes for a whole run at 4096 px, in what both were tried in: eager or compiled blocks."""
    runs, others = _runs(group, model, "npa"), _runs(group, model, other)
    tried = [how for how in runs if how in others]
    return _ratio(group, [runs[how] for how in tried], [others[how] for how in tried])


def over_floor(model: str, group: Group) -> Answer | None:
    """A whole run at 4096 px over the time of its useful FLOPs at the speed of a matrix product in the same process."""
    runs = _runs(group, model, "npa").values()
    if (best := _fastest(runs)) is None:
        return _untimed(group, runs)
    column, (row,) = best
    floor = float(row["useful_tflop"]) / float(row["matrix_tflops"])
    note = f"{row[column]} s {column.removesuffix('_s')}, floor {floor:.4g} s, {row['compile']}"
    return Answer(group, float(row[column]) / floor, note, (row,))


def rate(task: str, group: Group) -> Answer | None:
    """Useful TFLOP/s of the kernel."""
    for row in _calls(group, task, ("triton",)):
        if row["status"] != "ok":
            return _untimed(group, [row])
        return Answer(group, float(row["tflops"]), f"{row['p50_ms']} ms, {row['matrix_percent']}% of a matrix product", (row,))
    return None


def quicker_kernel(task: str, family: str, group: Group) -> Answer | None:
    """How many times as long the best of a family takes."""
    task = comparable(task, family)
    return _ratio(group, _calls(group, task, ("triton",)), _calls(group, task, FAMILIES[family]))


def comparable(task: str, family: str) -> str:
    """The task that a family can run in place of one: text queries once, where text would be rotated for each window."""
    return task.replace("/window", "/global") if family in NO_ROTATED_TEXT else task


def as_dense(group: Group) -> Answer | None:
    """Useful FLOP/s of windows by SDPA over those of full attention by SDPA, on the worst of the CPU's shapes."""
    rows = {row["row"]: row for row in group.rows if row["shape"].startswith("cpu-")}
    value, notes, used = float("inf"), [], list[Row]()
    for name, ours in rows.items():
        task = name.removesuffix("/sdpa")
        dense = rows.get(f"{task}/full")
        if task == name or dense is None or dense["status"] == "skipped":
            continue
        if not ours["status"] == dense["status"] == "ok":
            return _untimed(group, [ours], [dense])
        ratio, faster = float(ours["tflops"]) / float(dense["tflops"]), float(dense["p50_ms"]) / float(ours["p50_ms"])
        one = f" (one window alone {float(ours['window_tflops']) / float(dense['tflops']):.2f})" if ours.get("window_tflops") else ""
        notes.append(f"{task.replace('/fp32', '')} {ratio:.2f}{one}, {faster:.2f}x as fast")
        value, used = min(value, ratio), [*used, ours, dense]
    return Answer(group, value, "; ".join(notes), tuple(used)) if used else None


GOALS: tuple[Goal, ...] = (
    Goal(HOPPER, "SDXL 4096 px, a whole run, beside MultiDiffusion", 3, "x", "cascade", partial(quicker, "sdxl", "multidiffusion")),
    Goal(HOPPER, "SDXL 4096 px, a whole run, beside DemoFusion", 12, "x", "cascade", partial(quicker, "sdxl", "demofusion")),
    Goal(HOPPER, "SDXL 4096 px, a whole run, beside the authors' form", 1.3, "x", "cascade", partial(quicker, "sdxl", "authors")),
    Goal(HOPPER, "SDXL 4096 px, a whole run, over the floor of its FLOPs", 2, "x", "cascade", partial(over_floor, "sdxl"), most=True),
    Goal(HOPPER, "FLUX 4096 px, a whole run, beside MultiDiffusion", 3.5, "x", "cascade", partial(quicker, "flux", "multidiffusion")),
    Goal(HOPPER, "FLUX 4096 px, a whole run, over the floor of its FLOPs", 1.5, "x", "cascade", partial(over_floor, "flux"), most=True),
    Goal("CPU", "useful FLOP/s of windows by SDPA, beside full attention by SDPA", 0.9, "x", "attention", as_dense),
    *(
        Goal(HOPPER, f"kernel, {title}", bound, " TFLOP/s", "attention", partial(rate, task), readme=False)
        for task, (title, bound) in KERNEL.items()
    ),
    *(
        Goal(HOPPER, f"kernel, {title}, beside {family}", factor, "x", "attention", partial(quicker_kernel, task, family), readme=False)
        for task, (title, _) in KERNEL.items()
        for family, factor in FACTORS.items()
    ),
)
