"""Small models that the tests of `bench.cascade` draw with, and what a benchmark must leave as it was."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bench.cascade import __main__ as cascade
from bench.cascade import authors as cascade_authors
from bench.cascade.methods import METHODS
from bench.cascade.rows import Bench, Limits, Row, Unit
from bench.roofline.ceilings import Ceilings
from scalediff.cascade import run as library_cascade
from scalediff.cascade import schedule
from scalediff.patching import plan
from scalediff_kernels.neighborhood import windowed_sdpa

REPLACED = {
    (F, "scaled_dot_product_attention"), (plan, "neighborhood_patch_attention"), (plan, "joint_neighborhood_patch_attention"),
    (plan.Call, "attend"), (library_cascade, "mix_frequencies"), (schedule, "_guided"), (windowed_sdpa, "_sdpa"),
    (cascade_authors, "_sdpa"),
}  # fmt: skip
LIMITS = Limits(100.0, 2)
TINY = {"sdxl-small": 16, "flux-small": 32, "demo": 128}


def ceiling(dtype: torch.dtype) -> Ceilings:
    return Ceilings(1.0, 1.0)


def small_benches() -> dict[str, Bench]:
    """Each has drawn once: diffusers leaves something of its own in a model that it has run."""
    found = {name: Bench(name, "cpu", ceiling, LIMITS, view_batch=4) for name in ("sdxl-small", "flux-small")}
    for bench in found.values():
        bench.drawn.pipe(**bench.drawn.arguments, height=16, width=16, num_inference_steps=1, output_type="latent")
    return found


def unit(model: str, method: str, how: str = "eager") -> Unit:
    return Unit(model, TINY[model], method, how)


def rows_of(bench: Bench, one: Unit) -> dict[str, Row]:
    found = list(bench.rows(one, METHODS[one.method]))
    named = {row["row"].removeprefix(f"{one.name}/"): row for row in found}
    assert len(named) == len(found), "rows must be named once"
    assert all(set(row) <= set(cascade.FIELDS) for row in found)
    return named
