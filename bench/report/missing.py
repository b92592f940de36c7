"""What has not been measured yet: what the benchmarks can run, less what the CSVs have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pandas import DataFrame

from bench.attention import compiled
from bench.attention.compiled import PROVIDERS
from bench.attention.providers import Provider
from bench.attention.shapes import CPU_SHAPES, SHAPES, Task, tasks
from bench.cascade.methods import METHODS, Method
from bench.cascade.models import GROWTH_SIZES, SUBJECTS, TRUE
from bench.harness.tables import table
from bench.report.goals import HOPPER, is_of
from bench.report.rows import Results

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
JOINT = ("flux",)  # text in the same softmax, and no U-Net


def missing(results: Results) -> list[str]:
    """A line for every shape, and for every model and size, that lacks a row on its device."""
    groups = [*results.attention, *results.cascade]
    seen = {device: {row["row"] for group in groups if is_of(device, group) for row in group.rows} for device in (HOPPER, "CPU")}
    wanted = DataFrame([*_calls(), *_runs()], columns=["device", "of", "variant", "name", "row", "every"])
    wanted["missing"] = [row not in seen[device] for device, row in zip(wanted.device, wanted.row, strict=True)]
    lines = []
    for (device, of), rows in wanted.groupby(["device", "of"], sort=False):
        names = {str(variant): ", ".join(left) for variant, left in rows[rows.missing].groupby("variant", sort=False).name}
        each = [f"{variant}: {left}" if rows.variant.nunique() > 1 else left for variant, left in names.items()]
        if names:
            lines.append([device, of, rows.every.iloc[0] if rows.missing.all() else "; ".join(each)])
    found = DataFrame(sorted(lines, key=lambda line: line[0] == "CPU"), columns=["device", "of", "what"])
    return table(found, text=found.columns) if lines else ["All that the benchmarks can run has a row."]


def _calls() -> Iterator[tuple[str, ...]]:
    """Every shape in its model's dtype, by every rule for text and every implementation that no rule excludes."""
    for device, shapes, names in ((HOPPER, SHAPES, list(PROVIDERS)), ("CPU", CPU_SHAPES, list(compiled.CPU))):
        for task in tasks(list(shapes), None, "cpu" if device == "CPU" else "cuda"):
            key = "/".join(filter(None, (task.name, DTYPES[task.dtype], task.rule)))
            for name in names:
                if not excluded(PROVIDERS[name], task):
                    yield device, task.name, task.rule, name, f"{key}/{name}", "all implementations"


def _runs() -> Iterator[tuple[str, ...]]:
    """Every model and size by every method that exists; on a GPU with blocks run eagerly and compiled."""
    pictures = [(HOPPER, model, size) for model in TRUE for size in SUBJECTS[model].sizes]
    for device, model, size in [*pictures, *(("CPU", "demo", size) for size in GROWTH_SIZES)]:
        for how in ("eager",) if device == "CPU" else ("eager", "compiled"):
            for name, method in METHODS.items():
                if exists(method, joint=model in JOINT) and not (how == "compiled" and method.authors == "jitter"):
                    yield device, f"{model}, {size} px", how, name, f"{model}/{size}/{name}/{how}/run", "all methods"


def excluded(provider: Provider, task: Task) -> bool:
    """Whether it refuses the task for what the task is, on any machine, whatever is installed there."""
    return task.rule not in provider.rules or (provider.name == "reference" and provider.refusal(task) != "")


def exists(method: Method, *, joint: bool) -> bool:
    """Whether a method is one for models with text in the same softmax, or for U-Nets."""
    return method.kind != "phases" if joint else not method.joint
