"""docs/guide/composition.md: which test shows what people combine with scalediff, by feature and by family, task and switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.harness.facts import ROOT
from bench.harness.pages import fill
from bench.models.marks import TASKS, WHERE, Composes, Draws, read_marks

PAGE = ROOT / "docs" / "guide" / "composition.md"
# What people combine, and the reason of each cell that has no test.
FEATURES: Mapping[str, Mapping[str, str]] = {
    "torch.compile": {},
    "export": {"cascade": "a graph is of one size, and a run is a loop of pipeline calls"},
    "attention backends": {},
    "attention slicing": {},
    "LoRA": {},
    "few-step LoRA": {"network": "a LoRA as any other: the few steps are those of the loop around the network"},
    "IP-Adapter": {},
    "ControlNet": {},
    "offloading": {},
    "layerwise casting": {},
    "quantised weights": {},
    "half precision": {},
    "context parallelism": {},
    "threads": {},
    "saving": {},
    "gradients": {"cascade": "a run computes no gradients, as diffusers' pipelines"},
    "VAE tiling": {"network": "the network has no autoencoder"},
    "prompt embeddings": {"network": "a network takes nothing else"},
    "callbacks": {"network": "the pipeline calls them between passes"},
    "custom timesteps or sigmas": {"network": "the scheduler's, which the network does not see"},
    "doubled batch of guidance": {},
    "perturbed-attention guidance": {},
    "guiders": {"network": "they combine the outputs of passes"},
    "CFG++": dict.fromkeys(WHERE, "diffusers 0.42 has no pipeline or scheduler for it"),
    "image-to-image": {"network": "the network computes as for text-to-image"},
    "inpainting": {"network": "the network computes as for text-to-image"},
    "pictures that wrap": {},
    "FirstBlockCache": {},
    "MagCache": {},
    "TaylorSeerCache": {},
    "PyramidAttentionBroadcast": {},
    "FasterCache": {},
    "SeaCache": {"cascade": "pipelines of pictures do not tell it the step, without which it skips nothing"},
    "TextKVCache": {},
    "cache-dit": {},
}


def page() -> str:
    """The page with its tables from the tests.

    Raises:
        ValueError: A mark cannot be read or names an unknown feature, or a cell has neither a test nor a reason, or both.
    """
    composes, draws = read_marks()
    return fill(
        PAGE.read_text(), {"features": feature_table(composes, FEATURES), "families": family_table(draws), "tests": switch_table(draws)}
    )


def feature_table(composes: Sequence[Composes], features: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One row a feature; raises as `page`."""
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
