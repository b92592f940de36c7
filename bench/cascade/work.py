"""The useful work of a run, in TFLOPs, 2 for a multiply-add, counted on the meta device. Padding never counts.

The denoiser as `scalediff.cost.flops` counts it. An autoencoder that works in tiles attends only within them, so it is counted as so many
pictures of native size as fit into the area, without the overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch

from bench.cascade.methods import Drawn, Method, StagePlan
from scalediff.cascade.pipeline import cascade_of
from scalediff.cost import flops
from scalediff.families import family_of
from scalediff.patching.networks import denoiser_of
from scalediff.patching.subclass import own_class
from scalediff_kernels.neighborhood.api import TextQueries


class Work:
    """Counts for one pipeline; every pass is counted once."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn, denoiser = drawn, denoiser_of(drawn.pipe)
        family = family_of(denoiser)
        assert family is not None
        window = drawn.subject.window or family.native_grid(denoiser)  # a small model's family may name the window of the large one
        self._family = replace(family, native_grid=lambda _: window)
        with torch.device("meta"):
            self._denoiser, self._vae = (_without_weights(network) for network in (denoiser, drawn.pipe.vae))
        guided = drawn.settings.guidance_scale > 1 and cascade_of(drawn.pipe).conditional
        self._passes = 2 if guided else 1
        self._pass, self._coded = cache(self._count_pass), cache(self._count_coded)

    def step(self, method: Method, stage: StagePlan) -> flops.Forward:
        """One step, all views and both passes of guidance included."""
        windows = stage.restarts and method.kind == "cascade" and method.attention == "npa"
        one = self._pass(self._drawn.native if stage.views else stage.side, method.text_queries if windows else None)
        return flops.Forward(*((stage.views or 1) * self._passes * part for part in one))

    def run(self, method: Method, stages: Sequence[StagePlan]) -> float:
        """A whole run: every stage is decoded, and encoded again for the next one of a cascade."""
        total = sum(stage.steps * sum(self.step(method, stage)) + self._coded("decode", stage.side) for stage in stages)
        return total + sum(self._coded("encode", stage.side) for stage in stages[1:] if method.kind == "cascade")

    def _count_pass(self, side: int, rule: TextQueries | None) -> flops.Forward:
        """One pass of the denoiser, with windows where there is a rule for text queries."""
        grid = side // self._drawn.pipe.vae_scale_factor
        with torch.device("meta"):
            inputs = self._drawn.subject.inputs(grid, grid)
        with mock.patch.object(flops, "family_of", return_value=self._family):
            return flops.forward_work(self._denoiser, inputs, attention="npa" if rule else "full", text_queries=rule or "window")

    def _count_coded(self, what: str, side: int) -> float:
        from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

        native, factor, channels = self._drawn.native, self._drawn.pipe.vae_scale_factor, self._vae.config.latent_channels
        if getattr(self._drawn.pipe.vae, "use_tiling", False) and side != native:
            return self._coded(what, native) * (side / native) ** 2
        shape = (1, 3, side, side) if what == "encode" else (1, channels, side // factor, side // factor)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(self._vae, what)(torch.empty(shape, device="meta"))
        return float(counter.get_total_flops()) / 1e12


def _without_weights(network: Any) -> Any:
    kind: Any = own_class(type(network))
    return kind.from_config(network.config).eval()
