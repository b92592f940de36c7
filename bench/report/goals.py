"""What the project aims at, and how far it is: every number out of the CSVs, within one group.

A baseline counts at its best configuration among those tried for both sides: blocks compiled or not, any of its backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.report.rows import NOT_YET, Group, Results, Row, number

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
NO_TURNED_TEXT = ("FlexAttention on tiles", "NATTEN as called")  # text that is turned for each window is no option of theirs
KERNEL = {
    "flux-4096/bf16/window": ("FLUX 4096 px, 512 text, bf16", 650.0),
    "sdxl-64-4096/fp16": ("SDXL 4096 px, 256 x 256, fp16", 476.0),
    "sdxl-32-4096/fp16": ("SDXL 4096 px, 128 x 128, fp16", 476.0),
}


class Found(NamedTuple):
    """Of one group: a number, or in words why there is none; and how it came about."""

    group: Group
    value: float | None
    words: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        device: Parts of the machine's name, joined by "or", or `"CPU"`.
        what: For people.
        bound, unit: What to reach, and what comes after the number.
        kind: Of groups.
        find: The number of one group; None where it has nothing about it.
        most: The bound is not to be exceeded, instead of to be reached.
        readme: Told in the README, too.
    """

    device: str
    what: str
    bound: float
    unit: str
    kind: Literal["attention", "cascade"]
    find: Callable[[Group], Found | None]
    most: bool = False
    readme: bool = True

    @property
    def goal(self) -> str:
        return f"{'within' if self.most else 'at least'} {self.bound:g}{self.unit}"

    def found(self, results: Results) -> list[Found]:
        """One for every group with a number; without any, the last one that tells why, if one does."""
        groups: Iterable[Group] = getattr(results, self.kind)
        here = [group for group in groups if is_of(self.device, group)]
        answers = [answer for group in here if (answer := self.find(group)) is not None]
        return [answer for answer in answers if answer.value is not None] or answers[-1:]

    def told(self, answer: Found | None) -> str:
        """The number and whether it is enough, or why there is none."""
        if answer is None:
            return NOT_YET
        if answer.value is None:
            return answer.words
        digits = next(n for n in range(3, 18) if self._met(float(f"{answer.value:.{n}g}")) == self._met(answer.value))
        return f"{answer.value:.{digits}g}{self.unit}, {'met' if self._met(answer.value) else 'missed'} ({answer.words})"

    def _met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


def is_of(device: str, group: Group) -> bool:
    """Whether a group was measured on a device that goals name so."""
    return group.on_cpu if device == "CPU" else any(name in group.machine for name in device.split(" or "))


def _refused(name: str, rows: Iterable[Row]) -> str:
    """Why there is no number of rows that have none."""
    wrong = [row for row in rows if row["status"] in ("FAILED", "error")]
    other = [row for row in rows if row["status"] == "skipped"]
    if wrong:
        return f"{wrong[0]['status']}, {name}: {wrong[0]['note']}"
    return f"{NOT_YET}: {name} skipped, {other[0]['note']}" if other else f"{NOT_YET}: {name} has no time"


def _runs(group: Group, model: str, size: int, method: str) -> dict[str, Row]:
    """By how blocks are run."""
    rows = (row for row in group.rows if (row["part"], row["model"], row["size"], row["method"]) == ("run", model, str(size), method))
    return {row["compile"]: row for row in rows}


def quicker(model: str, size: int, other: str) -> Callable[[Group], Found | None]:
    """How many times as long another method takes for a whole run: both measured, or both composed, each at its best."""

    def find(group: Group) -> Found | None:
        ours, theirs = (_runs(group, model, size, method) for method in ("npa", other))
        if not ours:
            return None
        hows = [how for how in ours if how in theirs]
        if not hows:
            return Found(group, None, f"{NOT_YET}: {METHODS[other]} was not run beside it")
        tried = [[runs[how] for how in hows] for runs in (ours, theirs)]
        for column in ("measured_s", "composed_s"):
            timed = [[row for row in rows if row["status"] == "ok" and row.get(column)] for rows in tried]
            if all(timed):
                mine, best = (min(rows, key=lambda row: float(row[column])) for rows in timed)
                words = f"{mine[column]} s for {best[column]} s, {column.removesuffix('_s')}; {mine['compile']} for {best['compile']}"
                return Found(group, float(best[column]) / float(mine[column]), words, _commands(mine, best))
        names = (METHODS["npa"], METHODS[other])
        lacking = next((n, rows) for n, rows in zip(names, tried, strict=True) if not any(r["status"] == "ok" for r in rows))
        return Found(group, None, _refused(*lacking))

    return find


def over_floor(model: str, size: int) -> Callable[[Group], Found | None]:
    """A whole run over the time of its useful FLOPs at the speed of a matrix product in the same process."""

    def find(group: Group) -> Found | None:
        runs = _runs(group, model, size, "npa")
        if not runs:
            return None
        for column in ("measured_s", "composed_s"):
            timed = [row for row in runs.values() if row["status"] == "ok" and row.get(column)]
            if timed:
                best = min(timed, key=lambda row: float(row[column]))
                floor = float(best["useful_tflop"]) / float(best["matrix_tflops"])
                words = f"{best[column]} s {column.removesuffix('_s')}, floor {floor:.4g} s, {best['compile']}"
                return Found(group, float(best[column]) / floor, words, _commands(best))
        return Found(group, None, _refused(METHODS["npa"], runs.values()))

    return find


def _attention(group: Group, task: str, providers: Sequence[str]) -> dict[str, Row]:
    """Rows of a task by provider."""
    rows = {row["provider"]: row for row in group.rows if row["row"] == f"{task}/{row['provider']}"}
    return {name: rows[name] for name in providers if name in rows}


def rate(task: str) -> Callable[[Group], Found | None]:
    """Useful TFLOP/s of the kernel."""

    def find(group: Group) -> Found | None:
        for row in _attention(group, task, ("triton",)).values():
            if row["status"] != "ok":
                return Found(group, None, _refused("the kernel", [row]))
            words = f"{row['p50_ms']} ms, {row['matrix_percent']}% of a matrix product"
            return Found(group, float(row["tflops"]), words, _commands(row))
        return None

    return find


def quicker_kernel(task: str, family: str) -> Callable[[Group], Found | None]:
    """How many times as long the best of a family takes."""

    def find(group: Group) -> Found | None:
        ours, theirs = _attention(group, task, ("triton",)), _attention(group, task, FAMILIES[family])
        if not ours:
            return None
        if not theirs:
            return Found(group, None, f"{NOT_YET}: {family} was not run beside it")
        for name, rows in (("the kernel", ours), (family, theirs)):
            if not any(row["status"] == "ok" for row in rows.values()):
                return Found(group, None, _refused(name, rows.values()))
        best = min((row for row in theirs.values() if row["status"] == "ok"), key=lambda row: float(row["p50_ms"]))
        mine = ours["triton"]
        words = f"{mine['p50_ms']} ms for {best['p50_ms']} ms, {best['provider']}"
        return Found(group, float(best["p50_ms"]) / float(mine["p50_ms"]), words, _commands(mine, best))

    return find


def comparable(task: str, family: str) -> str:
    """The task that a family can run in place of one: text queries once, where text would be turned for each window."""
    return task.replace("/window", "/global") if family in NO_TURNED_TEXT else task


def as_dense(group: Group) -> Found | None:
    """Useful FLOP/s of windows by SDPA over those of full attention by SDPA, on the worst of the shapes; and how much sooner they end."""
    rows = {row["row"]: row for row in group.rows if row["shape"].startswith("cpu-")}
    tasks = [name.removesuffix("/sdpa") for name in rows if name.endswith("/sdpa")]
    both = ((task, rows[f"{task}/sdpa"], rows.get(f"{task}/full")) for task in tasks)
    pairs = {task: (mine, dense) for task, mine, dense in both if dense is not None and dense["status"] != "skipped"}
    if not pairs:
        return None
    for pair in pairs.values():
        for name, row in zip(("windows by SDPA", "full attention by SDPA"), pair, strict=True):
            if row["status"] != "ok":
                return Found(group, None, _refused(name, [row]))
    ratios = {task: float(mine["tflops"]) / float(dense["tflops"]) for task, (mine, dense) in pairs.items()}
    sooner = {task: float(dense["p50_ms"]) / float(mine["p50_ms"]) for task, (mine, dense) in pairs.items()}
    alone = {task: rate / float(dense["tflops"]) for task, (mine, dense) in pairs.items() if (rate := number(mine, "window_tflops"))}
    each = (
        f"{task.replace('/fp32', '')} {ratio:.2f}{f' of {alone[task]:.2f}' if task in alone else ''}, in {sooner[task]:.2f}x less time"
        for task, ratio in ratios.items()
    )
    words = "; ".join([*each, *(["of: SDPA on one such window alone"] if alone else [])])
    return Found(group, min(ratios.values()), words, _commands(*(row for pair in pairs.values() for row in pair)))


def _commands(*rows: Row) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["command"] for row in rows))


GOALS: tuple[Goal, ...] = (
    Goal(HOPPER, "SDXL 4096 px, a whole run, beside MultiDiffusion", 3, "x", "cascade", quicker("sdxl", 4096, "multidiffusion")),
    Goal(HOPPER, "SDXL 4096 px, a whole run, beside DemoFusion", 12, "x", "cascade", quicker("sdxl", 4096, "demofusion")),
    Goal(HOPPER, "SDXL 4096 px, a whole run, beside the authors' form", 1.3, "x", "cascade", quicker("sdxl", 4096, "authors")),
    Goal(HOPPER, "SDXL 4096 px, a whole run, over the floor of its FLOPs", 2, "x", "cascade", over_floor("sdxl", 4096), most=True),
    Goal(HOPPER, "FLUX 4096 px, a whole run, beside MultiDiffusion", 3.5, "x", "cascade", quicker("flux", 4096, "multidiffusion")),
    Goal(HOPPER, "FLUX 4096 px, a whole run, over the floor of its FLOPs", 1.5, "x", "cascade", over_floor("flux", 4096), most=True),
    Goal("CPU", "useful FLOP/s of windows by SDPA, beside full attention by SDPA", 0.9, "x", "attention", as_dense),
    *(
        Goal(HOPPER, f"kernel, {title}", tflops, " TFLOP/s", "attention", rate(task), readme=False)
        for task, (title, tflops) in KERNEL.items()
    ),
    *(
        Goal(
            HOPPER,
            f"kernel, {title}, beside {family}",
            bound,
            "x",
            "attention",
            quicker_kernel(comparable(task, family), family),
            readme=False,
        )
        for task, (title, _) in KERNEL.items()
        for family, bound in (
            ("gather and SDPA", 2),
            ("FlexAttention on tiles", 1.3),
            ("NATTEN as called", 1),
            ("the fastest dense attention, windows ready", 1),
        )
    ),
)
