"""Small models that the tests of `bench.cascade` draw with, and what a benchmark must leave as it was."""

from __future__ import annotations

from dataclasses import replace

from torch.nn import functional as F

from bench.cascade import authors as cascade_authors
from bench.cascade.rows import FIELDS, Bench, Row, Unit
from scalediff.cascade import schedule
from scalediff.cascade import stage as library_cascade
from scalediff.patching import call
from scalediff_kernels.neighborhood import windowed_sdpa

REPLACED = {
    (F, "scaled_dot_product_attention"), (call, "neighborhood_patch_attention"), (call, "joint_neighborhood_patch_attention"),
    (call.Call, "attend"), (library_cascade, "mix_frequencies"), (schedule, "_guided"), (windowed_sdpa, "_sdpa"),
    (cascade_authors, "_sdpa"),
}  # fmt: skip
TINY = {"sdxl-small": 16, "flux-small": 32, "demo": 128}
STEPS = {"sdxl-small": (6, 2), "flux-small": (4, 2)}  # of the base stage, and of a stage that restarts


def small_benches() -> dict[str, Bench]:
    """Each has drawn once: diffusers leaves something of its own in a model that it has run. SDXL runs 6 steps instead of its 30."""
    found = {name: Bench(name, "cpu", lambda dtype: 1.0, limit=100.0, steps=2, view_batch=4) for name in STEPS}
    for name, bench in found.items():
        bench.drawn.settings = replace(bench.drawn.settings, steps=STEPS[name][0])
        bench.drawn.pipe(**bench.drawn.arguments, height=16, width=16, num_inference_steps=1, output_type="latent")
    return found


def unit(model: str, method: str, how: str = "eager") -> Unit:
    return Unit(model, TINY[model], method, how)


def rows_of(bench: Bench, one: Unit) -> dict[str, Row]:
    found = list(bench.rows(one))
    named = {row["row"].removeprefix(f"{one.name}/"): row for row in found}
    assert len(named) == len(found), "rows must be named once"
    assert all(set(row) <= set(FIELDS) for row in found)
    return named
