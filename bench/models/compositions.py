"""docs/guide/composition.md: which test shows what people combine with scalediff, by feature and by family, task and switch.

The marks `composes` and `draws` of the tests say what a test shows.

    @pytest.mark.composes("LoRA", "cascade")                           the test shows a feature on a patched network, or in the cascade
    @pytest.mark.composes("attention slicing", "network", refused="why")                the test shows that it raises an error
    @pytest.mark.composes("guiders", "cascade", case="HunyuanImage 2.1")                only this parameter of the test shows it
    @pytest.mark.draws("upscale", PICTURES, switch="mask")              the test runs a task with a switch, for each of these families

Files of tests that have such marks are imported, so what they import must be installed: `pip install -e ".[diffusers,test]"`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from inspect import isfunction
from typing import Any, NamedTuple

from bench.harness.facts import ROOT
from bench.harness.pages import fill

PAGE = ROOT / "docs" / "guide" / "composition.md"
WHERE = ("network", "cascade")
TASKS = ("text-to-image", "image-to-image", "inpainting", "upscale")
# What people combine, in the order of the page; and by feature the reasons of cells that have no test.
_FEATURES = (
    "torch.compile", "export", "attention backends", "attention slicing", "LoRA", "few-step LoRA", "IP-Adapter", "ControlNet", "offloading",
    "layerwise casting", "quantised weights", "half precision", "context parallelism", "threads", "saving", "gradients", "VAE tiling",
    "prompt embeddings", "callbacks", "custom timesteps or sigmas", "doubled batch of guidance", "perturbed-attention guidance", "guiders",
    "CFG++", "image-to-image", "inpainting", "pictures that wrap", "FirstBlockCache", "MagCache", "TaylorSeerCache",
    "PyramidAttentionBroadcast", "FasterCache", "SeaCache", "TextKVCache", "cache-dit",
)  # fmt: skip
_REASONS: Mapping[str, Mapping[str, str]] = {
    "export": {"cascade": "a graph is of one size, and a run is a loop of pipeline calls"},
    "few-step LoRA": {"network": "a LoRA as any other: the few steps are those of the loop around the network"},
    "gradients": {"cascade": "a run computes no gradients, as diffusers' pipelines"},
    "VAE tiling": {"network": "the network has no autoencoder"},
    "prompt embeddings": {"network": "a network takes nothing else"},
    "callbacks": {"network": "the pipeline calls them between passes"},
    "custom timesteps or sigmas": {"network": "the scheduler's, which the network does not see"},
    "guiders": {"network": "they combine the outputs of passes"},
    "CFG++": dict.fromkeys(WHERE, "diffusers 0.42 has no pipeline or scheduler for it"),
    "image-to-image": {"network": "the network computes as for text-to-image"},
    "inpainting": {"network": "the network computes as for text-to-image"},
    "SeaCache": {"cascade": "pipelines of pictures do not tell it the step, without which it skips nothing"},
}
FEATURES = {feature: _REASONS.get(feature, {}) for feature in _FEATURES}


class MarkedTest(NamedTuple):
    file: str  # from the root of the repository
    name: str
    slow: bool  # all of its cases are left out of the default run


class Composes(NamedTuple):
    """A test of a feature on a patched `network` or in the `cascade`. `refused` says why, where it shows that an error is raised."""

    test: MarkedTest
    feature: str
    where: str
    refused: str = ""
    case: str = ""


class Draws(NamedTuple):
    """A test that runs a task with a switch, for each of the families."""

    test: MarkedTest
    task: str
    families: tuple[str, ...]
    switch: str


def read_marks() -> tuple[list[Composes], list[Draws]]:
    """All marks of the tests, in the order of their files and lines; raises as `marks_of`."""
    found: list[Composes | Draws] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if re.search(r"mark\.(composes|draws)\(", path.read_text()):
            file = path.relative_to(ROOT)
            module = import_module(".".join(file.with_suffix("").parts))
            tests = [function for function in vars(module).values() if isfunction(function) and function.__module__ == module.__name__]
            found += [mark for test in tests for mark in marks_of(test, str(file))]
    return [mark for mark in found if isinstance(mark, Composes)], [mark for mark in found if isinstance(mark, Draws)]


def marks_of(function: Callable[..., Any], file: str) -> Iterator[Composes | Draws]:
    """The marks of one test, the uppermost first; ValueError where one names no place or task, TypeError for other arguments."""
    marks = getattr(function, "pytestmark", [])[::-1]
    test = MarkedTest(file, function.__name__, any(mark.name == "slow" for mark in marks))
    for mark in marks:
        if mark.name == "composes":
            composes = Composes(test, *mark.args, **mark.kwargs)
            _check(test, "where", composes.where, WHERE)
            yield composes
        elif mark.name == "draws":
            task, families = mark.args
            _check(test, "task", task, TASKS)
            names = (one if isinstance(one, str) else one.values[0] for one in families)  # or of pytest.param
            yield Draws(test, task, tuple(names), **mark.kwargs)


def _check(test: MarkedTest, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{test.file}, {test.name}: {name} must be one of {', '.join(known)}, got {name}={value!r}")


def page() -> str:
    """The page; ValueError for a mark that cannot be read, an unknown feature, and a cell that has not either a test or a reason."""
    composes, draws = read_marks()
    tables = {"features": feature_table(composes, FEATURES), "families": family_table(draws), "tests": switch_table(draws)}
    return fill(PAGE.read_text(), tables)


def feature_table(composes: Sequence[Composes], features: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One row a feature."""
    for mark in composes:
        if mark.feature not in features:
            raise ValueError(f"{mark.test.file}: the feature must be a row of FEATURES, got {mark.feature!r}")
    lines = ["| | patched network | cascade |", "|---|---|---|"]
    for feature, reasons in features.items():
        cells = []
        for where in WHERE:
            marks, reason = [mark for mark in composes if (mark.feature, mark.where) == (feature, where)], reasons.get(where, "")
            if bool(marks) == bool(reason):
                raise ValueError(f"{feature}, {where}: a cell must have a test or a reason, got {len(marks)} tests and {reason=}")
            cells.append("; ".join(map(_cell, marks)) or reason)
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return lines


def _cell(mark: Composes) -> str:
    test = f"`{mark.test.name}{f'[{mark.case}]' if mark.case else ''}`{' (slow)' * mark.test.slow}"
    return f"refused, {mark.refused}: {test}" if mark.refused else test


def family_table(draws: Sequence[Draws]) -> list[str]:
    """One row a family, with the switches that are tested for each task."""
    families = dict.fromkeys(family for mark in draws for family in mark.families)
    lines = [f"| | {' | '.join(TASKS)} |", f"|---|{'---|' * len(TASKS)}"]
    for family in sorted(families, key=str.lower):
        cells = [", ".join(sorted({m.switch for m in draws if m.task == task and family in m.families})) or "-" for task in TASKS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def switch_table(draws: Sequence[Draws]) -> list[str]:
    """One row a task and switch, with its tests."""
    lines = ["| task | switch | test |", "|---|---|---|"]
    for task, switch in sorted(dict.fromkeys((m.task, m.switch) for m in draws), key=lambda pair: TASKS.index(pair[0])):
        found = [m.test for m in draws if (m.task, m.switch) == (task, switch)]
        tests = "; ".join(f"`{test.file}`: `{test.name}`{' (slow)' * test.slow}" for test in dict.fromkeys(found))
        lines.append(f"| {task} | {switch} | {tests} |")
    return lines
