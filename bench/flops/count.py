"""TFLOPs of drawing a large picture by several methods: one model, one size, one method a row.

Models are of true size, on the meta device: some of those of `scalediff plan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.flops.work import Above, Work, plan
from scalediff.cost.flops import passes_of_a_step, stages
from scalediff.cost.models import MODELS as PLANNED
from scalediff.cost.models import Model, built
from scalediff.families import family_of

_POSITIONS = 512  # along an axis, for 8192 pixels; the published tables are shorter, and looking up costs nothing that is counted


def _sd3() -> nn.Module:
    """The published transformer with more positions: its own table has 192 along an axis, for 3072 pixels."""
    import diffusers

    config = dict(PLANNED["sd3.5-large"].denoiser().config) | {"pos_embed_max_size": _POSITIONS}  # type: ignore[arg-type]
    return diffusers.SD3Transformer2DModel.from_config(config)  # type: ignore[no-any-return]


def _lumina_inputs(y: int, x: int) -> dict[str, Any]:
    """Those of the pipeline, which rotates 384 positions along an axis, for 6144 pixels, with more of them."""
    rotary = torch.empty(_POSITIONS, _POSITIONS, 36, dtype=torch.complex64)
    return PLANNED["lumina-next"].inputs(y, x) | {"image_rotary_emb": rotary}


MODELS: Mapping[str, Model] = {
    **{name: PLANNED[name] for name in ("sdxl", "flux")},
    "sd3.5-large": replace(PLANNED["sd3.5-large"], denoiser=_sd3),
    "lumina-next": replace(PLANNED["lumina-next"], inputs=_lumina_inputs),
}
TITLES = {"sdxl": "SDXL base 1.0", "flux": "FLUX.1-dev", "sd3.5-large": "Stable Diffusion 3.5 Large", "lumina-next": "Lumina-Next"}


class Method(NamedTuple):
    """How a picture above the native size is drawn: in a cascade from the native size, or with all steps at the target, from noise."""

    label: str  # for people
    cascade: bool
    above: Above


METHODS = {
    "direct": Method("direct inference", False, "full"),
    "multidiffusion": Method("MultiDiffusion", False, "views"),
    "demofusion": Method("DemoFusion", False, "phases"),
    "cascade-full": Method("cascade, full attention", True, "full"),
    "cascade-multidiffusion": Method("cascade, MultiDiffusion", True, "views"),
    "npa": Method("cascade, NPA", True, "window"),
    "npa-global": Method("cascade, NPA, text queries once", True, "global"),
}

Row = dict[str, Any]  # columns as docs/evidence/flops.md explains them; `cross` is attention to text in calls of its own


class Counter:
    """One model, built once; every size is run once, whatever the methods."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, MODELS[name]
        self.denoiser, vae = built(self.model)
        family = family_of(self.denoiser)
        assert family is not None
        native = family.native_grid(self.denoiser)
        assert native is not None
        self.work = Work(self.denoiser, vae, self.model.inputs, native=native[0] * self.model.tokens, factor=self.model.factor)
        joint = any(site.role == "joint" for site in family.sites(self.denoiser))
        self._queries = ("window", "global") if joint else ()
        possible = {"global": joint, "phases": hasattr(self.denoiser, "up_blocks")}  # text in the same softmax; a U-Net
        self.methods = tuple(name for name, method in METHODS.items() if possible.get(method.above, True))

    def row(self, size: int, method: str) -> Row:
        """One method at a size in pixels per side.

        Raises:
            ValueError: the model cannot draw this size.
        """
        _, cascade, above = METHODS[method]
        settings, sizes = stages(self.model, self.denoiser, (size, size))
        sides, native = [side for side, _ in (sizes if cascade else sizes[-1:])], self.work.native
        if above == "phases":
            sides = [min(size, phase * native) for phase in range(1, math.ceil(size / native) + 1)]
        guided = passes_of_a_step(self.model, settings) == 2
        planned = plan(sides, above, cascade=cascade, settings=settings, guided=guided)
        last = self.work.forward(planned[-1].side, above, planned[-1].phase)
        run, vae = self.work.run(planned)
        row = {"model": self.name, "size": size, "method": method, "text": self.work.inputs(size)["encoder_hidden_states"].shape[1]}
        row |= {"text_queries": above if above in self._queries else "", "passes": planned[-1].passes}
        row |= {"tflops_forward": sum(last), "tflops_run": sum(run) + vae}
        row |= {f"forward_{part}": tflops for part, tflops in last._asdict().items()}
        return row | {f"run_{part}": tflops for part, tflops in run._asdict().items()} | {"vae": vae}


def rows(models: Iterable[str], sizes: Sequence[int]) -> Iterator[Row]:
    """Every model and size by every method that the model has."""
    for counter in map(Counter, models):
        yield from (counter.row(size, method) for size in sizes for method in counter.methods)
