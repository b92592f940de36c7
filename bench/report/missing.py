"""What docs/evidence/benchmarks.md says is not measured yet: what the benchmarks can run, less what rules exclude, less what a CSV has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import torch

from bench.attention import compiled as providers_compiled
from bench.attention.compiled import PROVIDERS
from bench.attention.providers import Provider
from bench.attention.shapes import CPU_SHAPES, SHAPES, Task, tasks
from bench.cascade.methods import METHODS, Method
from bench.cascade.models import GROWTH_SIZES, SUBJECTS, TRUE
from bench.report.goals import HOPPER, is_of
from bench.report.rows import Group, Results, table

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
JOINT = ("flux",)  # text in the same softmax, and no U-Net


def missing(results: Results) -> list[str]:
    """A line for every shape, and for every model and size, of which a row is missing."""
    found = [
        *(_calls(results, HOPPER, shape) for shape in SHAPES),
        *(_runs(results, HOPPER, model, size) for model in TRUE for size in SUBJECTS[model].sizes),
        *(_calls(results, "CPU", shape) for shape in CPU_SHAPES),
        *(_runs(results, "CPU", "demo", size) for size in GROWTH_SIZES),
    ]
    lines = [line for line in found if line[-1]]
    return table(["device", "of", "what"], lines, words=3) if lines else ["All that the benchmarks can run has a row."]


def _calls(results: Results, device: str, shape: str) -> list[str]:
    cpu = device == "CPU"
    wanted = attention(shape, providers_compiled.CPU if cpu else PROVIDERS, "cpu" if cpu else "cuda")
    return [device, shape, _left(wanted, _rows(results.attention, device), "implementations")]


def _runs(results: Results, device: str, model: str, size: int) -> list[str]:
    wanted = {how: tuple(cascade(model, how)) for how in (("eager",) if device == "CPU" else ("eager", "compiled"))}
    rows = _rows(results.cascade, device)
    seen = {f"{how}/{method}" for how in wanted for method in METHODS if f"{model}/{size}/{method}/{how}/run" in rows}
    return [device, f"{model}, {size} px", _left(wanted, seen, "methods")]


def _left(wanted: Mapping[str, Sequence[str]], seen: Set[str], what: str) -> str:
    """Those without a row, by what they are wanted of; empty where there is none."""
    left = {key: [name for name in names if f"{key}/{name}" not in seen] for key, names in wanted.items()}
    if all(len(left[key]) == len(names) for key, names in wanted.items()):
        return f"all {what}"
    told = {key.split("/")[-1]: ", ".join(names) for key, names in left.items() if names}
    return "; ".join(f"{key}: {names}" if len(wanted) > 1 else names for key, names in told.items())


def _rows(groups: Iterable[Group], device: str) -> set[str]:
    """Names of rows of a device, whatever came of them."""
    return {row["row"] for group in groups if is_of(device, group) for row in group.rows}


def attention(shape: str, names: Iterable[str], device: str) -> dict[str, tuple[str, ...]]:
    """By task of a shape in its model's dtype, the implementations that no rule excludes."""
    return {
        "/".join(filter(None, (task.name, DTYPES[task.dtype], task.rule))): tuple(n for n in names if not excluded(PROVIDERS[n], task))
        for task in tasks([shape], None, device)
    }


def excluded(provider: Provider, task: Task) -> bool:
    """Whether it refuses the task for what the task is, on any machine, whatever is installed there."""
    return task.rule not in provider.rules or (provider.name == "reference" and provider.refusal(task) != "")


def cascade(model: str, how: str) -> Iterator[str]:
    """Methods that can draw with a model, its blocks run in one way."""
    for name, method in METHODS.items():
        if exists(method, joint=model in JOINT) and not (how == "compiled" and method.authors == "jitter"):
            yield name


def exists(method: Method, *, joint: bool) -> bool:
    """Whether a method is one for models with text in the same softmax, or for U-Nets."""
    return method.kind != "phases" if joint else not method.joint
