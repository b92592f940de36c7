"""The sections of docs/benchmarks.md, each out of the rows of one benchmark; what no machine has measured has a row that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench.flops import METHODS as COUNTED
from bench.flops_models import TITLES
from bench.report_goals import FAMILIES, GOALS, H200, METHODS, NO_TURNED_TEXT, Found
from bench.report_rows import NOT_YET, Group, Results, Row, number, table
from bench.shapes import CPU_SHAPES, QUICK, tasks

PARTS = ("attention", "cross", "rest of the denoiser", "guidance", "rest of the steps", "mixing", "encode", "decode", "rest")
_PICTURES = {"sdxl": ("npa", "authors", "multidiffusion", "demofusion"), "flux": ("npa", "authors-jitter", "multidiffusion")}
_MAIN = ("triton", "gather", "gather-cudnn", "flex-tuned", "flex-pretiled", "natten", "full", "full-cudnn", "multidiffusion-cudnn")
_CPU = ("sdpa", "gather", "flex", "full")


def goals(results: Results, *, readme: bool = False) -> list[str]:
    """Every goal, its number or why there is none; in the README those that are told there."""
    lines = []
    for goal in GOALS:
        answers: list[Found | None] = [*goal.found(results)]
        for answer in answers or [None] if goal.readme or not readme else []:
            device = goal.device if answer is None or answer.value is None else answer.group.machine
            by = f"{answer.commands}: {answer.group.versions}" if answer and answer.commands else ""
            lines.append([device, goal.what, goal.goal, goal.told(answer), by])
    headings = ["device", "what", "goal", "measured", "by"]
    if readme and not any(line[-1] for line in lines):
        headings, lines = headings[:-1], [line[:-1] for line in lines]
    return table(headings, lines, words=len(headings))


def checks(results: Results) -> list[str]:
    """What `bench.gpu` ran on a device that is no speed: tests and compute-sanitizer."""
    rows = [(group, row) for group in results.gpu for row in group.rows if row["row"] in ("tests", "sanitizer")]
    if not rows:
        return [f"Tests and compute-sanitizer on a GPU: {NOT_YET.replace('measured', 'run')}."]
    lines = [[row["row"], row["status"], row["note"], f"`{row['command']}`: {group.versions}"] for group, row in rows]
    return table(["part", "status", "what was told", "by"], lines, words=4)


def pictures(results: Results) -> list[str]:
    """Whole runs and where their time goes, by device; then what is missing."""
    lines: list[str] = []
    for group in results.cascade:
        lines += ["", f"### {group.machine}, {group.facts['commit']}", "", f"{group.file}, {group.commands()}: {group.versions}.", ""]
        lines += _runs(group) + _shares(group)
    seen = {(r["model"], r["size"], r["method"]) for g in results.cascade if H200 in g.machine for r in g.rows if r["part"] == "run"}
    missing = [
        [H200, model, "4096", METHODS[method], NOT_YET]
        for model, methods in _PICTURES.items()
        for method in methods
        if (model, "4096", method) not in seen
    ]
    if missing:
        lines += ["", *table(["device", "model", "px", "method", "s"], missing, words=4)]
    return lines


def _runs(group: Group) -> list[str]:
    lines = []
    runs = [row for row in group.rows if row["part"] == "run"]
    for row in runs:
        head = [row["model"], row["size"], METHODS.get(row["method"], row["method"]), row["compile"]]
        if row["status"] != "ok":
            lines.append([*head, *[""] * 6, _why(row)])
            continue
        ours = next((r for r in runs if _like(r, row) and r["method"] == "npa" and r["status"] == "ok"), None)
        ratio = f"{float(row['composed_s']) / float(ours['composed_s']):.2f}" if ours else ""
        memory = f"{float(row['peak_megabytes']) / 1000:.1f}" if row.get("peak_megabytes") else ""
        numbers = [row.get("measured_s", ""), row["composed_s"], ratio, row["useful_tflop"], row["matrix_percent"], memory]
        lines.append([*head, *numbers, row.get("note", "")])
    headings = ["model", "px", "method", "blocks", "s, measured", "s, composed", "x ours", "useful TFLOP", "% of a matrix product"]
    headings += ["peak GB", "note"]
    return table(headings, lines, words=4)


def _like(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("model", "size", "compile"))


def _why(row: Row) -> str:
    return f"{row['status']}: {row['note']}" if row.get("note") else row["status"]


def shares(group: Group) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Seconds of a run by part, of every run that was composed; by model, size, method and how blocks are run.

    Attention inside compiled blocks is not told apart: it is in the rest of the denoiser.
    """
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in group.rows:
        seconds = number(row, "in_run_s")
        if row["status"] == "ok" and row["part"] not in ("run", "gate") and seconds is not None:
            parts = found.setdefault((row["model"], row["size"], row["method"], row["compile"]), {})
            parts[row["part"]] = parts.get(row["part"], 0.0) + seconds
    told = {}
    for key, raw in found.items():
        denoiser = raw.get("denoiser", 0.0)
        parts = {name: raw.get(name, 0.0) for name in PARTS}
        parts["rest of the denoiser"] = max(0.0, denoiser - parts["attention"] - parts["cross"])
        parts["rest of the steps"] = max(0.0, raw.get("step", 0.0) - denoiser - parts["guidance"])
        if sum(parts.values()) > 0:
            told[key] = parts
    return told


def _shares(group: Group) -> list[str]:
    found = shares(group)
    if not found:
        return []
    lines = []
    for (model, size, method, how), parts in found.items():
        whole = sum(parts.values())
        lines.append([model, size, METHODS.get(method, method), how, *(f"{100 * parts[name] / whole:.1f}%" for name in PARTS)])
    return ["", "Share of the composed time:", "", *table(["model", "px", "method", "blocks", *PARTS], lines, words=4)]


def attention(results: Results) -> list[str]:
    """One call by every implementation, by device; then what is missing."""
    lines: list[str] = []
    for group in results.attention:
        lines += ["", f"### {group.machine}, {group.facts['commit']}", "", f"{group.file}, {group.commands()}: {group.versions}.", ""]
        lines += _calls(group)
    missing = []
    on_gpu = {row["row"] for group in results.attention if H200 in group.machine for row in group.rows}
    on_cpu = {row["row"] for group in results.attention if group.on_cpu for row in group.rows}
    for device, seen, names in ((H200, on_gpu, [*_tasks("cuda")]), ("CPU", on_cpu, [*_tasks("cpu")])):
        for name, providers in names:
            if left := [provider for provider in providers if f"{name}/{provider}" not in seen]:
                missing.append([device, name, ", ".join(left), NOT_YET])
    if missing:
        lines += ["", *table(["device", "shape", "implementation", "ms"], missing, words=3)]
    return lines


def _tasks(device: str) -> Iterator[tuple[str, Sequence[str]]]:
    """The names of what is to be measured, without a provider, and the providers."""
    shapes = list(QUICK if device == "cuda" else CPU_SHAPES)
    for task in tasks(shapes, None, device):
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[task.dtype]
        refusing = {name for family in NO_TURNED_TEXT for name in FAMILIES[family]} if task.rule == "window" else set()
        providers = [name for name in (_MAIN if device == "cuda" else _CPU) if name not in refusing]
        yield "/".join(filter(None, (task.name, dtype, task.rule))), providers


def _calls(group: Group) -> list[str]:
    lines, skipped = [], dict[tuple[str, str], list[str]]()
    rows = {row["row"]: row for row in group.rows}
    own = "sdpa" if group.on_cpu else "triton"
    for row in group.rows:
        task = row["row"].removesuffix(f"/{row['provider']}")
        if row["status"] == "skipped":
            skipped.setdefault((row["provider"], row["note"]), []).append(task)
            continue
        if row["status"] != "ok":
            lines.append([task, row["provider"], row["function"], *[""] * 6, _why(row)])
            continue
        ours = rows.get(f"{task}/{own}")
        ratio = f"{float(row['p50_ms']) / float(ours['p50_ms']):.2f}" if ours and ours["status"] == "ok" else ""
        spread = f"{row['p50_ms']} ({row['p20_ms']} - {row['p80_ms']})"
        numbers = [spread, ratio, row["tflops"], row["matrix_percent"], row.get("peak_megabytes", ""), row["error"]]
        lines.append([task, row["provider"], row["function"], *numbers, row.get("backend") or ""])
    headings = ["shape", "implementation", "computes", "ms", "x ours", "useful TFLOP/s", "% of a matrix product", "peak MB", "error", "by"]
    told = [f"Skipped: {name}, {note} ({len(found)} rows)." for (name, note), found in skipped.items()]
    return table(headings, lines, words=3) + ([""] if told else []) + told


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
