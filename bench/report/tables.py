"""The sections of docs/evidence/benchmarks.md but for whole pictures, each out of the rows of one benchmark."""

from __future__ import annotations

from bench.flops.__main__ import METHODS as COUNTED
from bench.flops.models import TITLES
from bench.report.goals import GOALS, Found
from bench.report.rows import NOT_YET, Group, Results, Row, filled, heading, number, skipped, table, why


def goals(results: Results, *, readme: bool = False) -> list[str]:
    """Every goal, its number or why there is none; in the README those that are told there. Then what the numbers were made by."""
    lines, made = [], dict[str, tuple[Group, dict[str, None]]]()
    for goal in GOALS:
        answers: list[Found | None] = [*goal.found(results)]
        for answer in answers or [None] if goal.readme or not readme else []:
            device = goal.device if answer is None or answer.value is None else answer.group.machine
            lines.append([device, goal.what, goal.goal, goal.told(answer)])
            if answer and answer.commands:
                _, commands = made.setdefault(f"{answer.group.file} {answer.group.versions}", (answer.group, {}))
                commands |= dict.fromkeys(answer.commands)
    sources = [line for group, commands in made.values() for line in ("", group.made_by([*commands]))]
    return table(["device", "what", "goal", "measured"], lines, words=4) + sources


def checks(results: Results) -> list[str]:
    """What `bench.gpu` ran on a device that is no speed: tests and compute-sanitizer."""
    rows = [(group, row) for group in results.gpu for row in group.rows if row["row"] in ("tests", "tests-all", "sanitizer")]
    if not rows:
        return [f"Tests and compute-sanitizer on a GPU: {NOT_YET.replace('measured', 'run')}."]
    lines = [[row["row"], row["status"], row["note"], f"`{row['command']}`: {group.versions}"] for group, row in rows]
    return table(["part", "status", "what was told", "by"], lines, words=4)


def attention(results: Results) -> list[str]:
    """One call by every implementation, by device."""
    return [line for group in results.attention for line in (*heading(group, results.attention), *_calls(group))]


def _calls(group: Group) -> list[str]:
    lines = []
    rows = {row["row"]: row for row in group.rows}
    own = "sdpa" if group.on_cpu else "triton"
    for row in group.rows:
        task = row["row"].removesuffix(f"/{row['provider']}")
        if row["status"] == "ok":
            by = "; ".join(filter(None, (row.get("backend"), row.get("note"))))
            lines.append([task, row["provider"], row["function"], *_numbers(row, rows.get(f"{task}/{own}")), by])
        elif row["status"] != "skipped":
            lines.append([task, row["provider"], row["function"], *[""] * 8, why(row)])
    headings = ["shape", "implementation", "computes", "ms", "x ours", "useful TFLOP/s", "% of a matrix product", "executed / useful"]
    headings += ["made ready, ms", "peak MB", "error", "by"]
    return filled(headings, lines, words=3, last=1) + skipped((row["provider"], row) for row in group.rows)


def _numbers(row: Row, ours: Row | None) -> list[str]:
    spread = f"{row['p50_ms']} ({row['p20_ms']} - {row['p80_ms']})"
    ratio = f"{float(row['p50_ms']) / float(ours['p50_ms']):.2f}" if ours and ours["status"] == "ok" else ""
    executed, useful = number(row, "executed_gflop"), number(row, "useful_gflop")
    more = f"{executed / useful:.2f}" if executed and useful else ""
    memory = [row.get("setup_ms", ""), row.get("peak_megabytes", "")]
    return [spread, ratio, row["tflops"], row["matrix_percent"], more, *memory, row["error"]]


def work(results: Results, size: int = 4096) -> list[str]:
    """TFLOPs of a run, method by method, and how many times those of NPA."""
    rows = {(row["model"], row["method"]): row for row in results.flops if row["size"] == str(size)}
    models = list(dict.fromkeys(model for model, _ in rows))
    if not models:
        return [f"{NOT_YET}."]
    lines = []
    for method in dict.fromkeys(method for _, method in rows):
        cells = []
        for model in models:
            row, npa = rows.get((model, method)), rows.get((model, "npa"))
            ratio = f" ({float(row['tflops_run']) / float(npa['tflops_run']):.2f}x)" if row and npa else ""
            cells.append(f"{float(row['tflops_run']):,.0f}{ratio}" if row else "-")
        lines.append([COUNTED[method].label if method in COUNTED else method, *cells])
    return table([f"TFLOP of a run, {size} px", *(TITLES.get(model, model) for model in models)], lines, words=1)
