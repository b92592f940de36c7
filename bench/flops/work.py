"""The stages of a run by any method, and the useful work in them, counted on networks without weights as `scalediff.cost.flops` does.

2 FLOPs a multiply-add; padding never counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch

from bench.attention.shapes import view_starts
from scalediff.cost import flops
from scalediff.cost.flops import Forward
from scalediff.patching.subclass import original_class
from scalediff.settings import Attention, Settings
from scalediff_kernels.neighborhood.api import TextQueries

# What a pass above the native size attends to: the whole grid; windows, with text queries by either rule; each of MultiDiffusion's views
# alone; or, in a phase of DemoFusion, each of its views and dilated samples.
Above = Literal["full", "window", "global", "views", "phases"]


class StagePlan(NamedTuple):
    side: int  # pixels
    steps: int
    passes: int  # of the denoiser in all steps, those of guidance included
    above: Above
    phase: int  # of DemoFusion; 1 for all other stages
    restarts: bool  # from the picture of a stage before


def plan(sides: Sequence[int], above: Above, *, cascade: bool, settings: Settings, guided: bool) -> list[StagePlan]:
    """The stages of a run at `sides` pixels: a cascade takes fewer steps after its base stage, every phase of DemoFusion takes all."""
    stages = []
    for number, side in enumerate(sides, start=1):
        later = number > 1 and cascade
        steps = settings.stage_steps if later else settings.steps
        until = math.ceil(settings.guidance_until * steps) if later and isinstance(settings.guidance_until, float) else steps
        how: Above = above if later or above in ("views", "phases") else "full"
        stages.append(StagePlan(side, steps, steps + until * guided, how, number if how == "phases" else 1, number > 1))
    return stages


class Work:
    """TFLOPs of a model whose networks are on the meta device.

    `inputs` makes the arguments of the denoiser from a latent grid `(Y, X)`; `native` is pixels per side that the model was trained at,
    `factor` pixels per latent along an axis. A `tiled` autoencoder attends only within its tiles: it is counted as so many pictures of
    native size as fit into the area. `family` stands in place of the denoiser's own.
    """

    def __init__(
        self, denoiser: Any, vae: Any, inputs: Callable[[int, int], dict[str, Any]], *, native: int, factor: int, tiled: bool = False,
        family: Any = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.native, self.tiled, self._vae, self._factor = denoiser, native, tiled, vae, factor
        self._inputs, self._family = inputs, family
        self._layers = cache(lambda side: flops.layer_work(denoiser, self.inputs(side)))
        self._coded = cache(self._count_coded)

    def inputs(self, side: int) -> dict[str, Any]:
        with torch.device("meta"):
            return self._inputs(side // self._factor, side // self._factor)

    def forward(self, side: int, above: Above = "full", phase: int = 1) -> Forward:
        """One pass at a size in pixels per side; of views, all of them at the native size, and a phase's dilated samples beside them."""
        if above in ("views", "phases") and side > self.native:
            views, dilated = len(view_starts(side, self.native)) ** 2, phase**2 if above == "phases" else 0
            one = self.forward(self.native)
            sample = self.forward(self._factor * math.ceil(side / self._factor / phase)) if dilated else one
            return Forward(*(views * part + dilated * other for part, other in zip(one, sample, strict=True)))
        rule: TextQueries = "global" if above == "global" else "window"
        attention: Attention = "npa" if above in ("window", "global") else "full"
        with mock.patch.object(flops, "family_of", return_value=self._family) if self._family else nullcontext():
            attended = flops.attention_work(self.denoiser, self.inputs(side), attention=attention, text_queries=rule)
        return Forward(*attended, *self._layers(side))

    def step(self, stage: StagePlan) -> Forward:
        """One step of a stage, all views and both passes of guidance included."""
        return Forward(*(stage.passes / stage.steps * part for part in self.forward(stage.side, stage.above, stage.phase)))

    def run(self, stages: Sequence[StagePlan]) -> tuple[Forward, float]:
        """A whole run, and its autoencoder: every stage is decoded, and encoded again for the next one of a cascade."""
        steps = [[stage.steps * part for part in self.step(stage)] for stage in stages]
        coded = sum(self._coded("decode", stage.side) for stage in stages)
        coded += sum(self._coded("encode", stage.side) for stage in stages if stage.restarts and stage.above != "phases")
        return Forward(*map(sum, zip(*steps, strict=True))), coded

    def _count_coded(self, what: str, side: int) -> float:
        if self.tiled and side != self.native:
            return self._coded(what, self.native) * (side / self.native) ** 2
        latents = (1, self._vae.config.latent_channels, side // self._factor, side // self._factor)
        picture = torch.empty((1, 3, side, side) if what == "encode" else latents, device="meta")
        return sum(flops._count_flops(lambda: getattr(self._vae, what)(picture)).values())


def without_weights(network: Any) -> Any:
    """The same network on the meta device, in fp32."""
    cls: Any = original_class(type(network))
    with torch.device("meta"):
        return cls.from_config(network.config).eval()
