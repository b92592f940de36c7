"""TFLOPs of drawing a large picture by several methods, counted on the meta device: one model, one size, one method a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from bench.flops.models import MODELS
from scalediff.cost.flops import FACTOR, Forward, attention_work, autoencoder_work, built, layer_work, passes_of_a_step, stages
from scalediff.families import family_of
from scalediff.settings import Attention
from scalediff_kernels.neighborhood.api import TextQueries


class Method(NamedTuple):
    """How a picture above the native size is drawn.

    Attributes:
        label: For people.
        cascade: From the native size, stage by stage; otherwise all steps are run at the target, from noise.
        attention: Above the native size, of the whole grid, of windows with text queries by either rule, or of each view alone;
            of a phase of DemoFusion each of its views and dilated samples.
    """

    label: str
    cascade: bool
    attention: Literal["full", "window", "global", "views", "phases"]


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
        self.denoiser, self._vae = built(self.model)
        family = family_of(self.denoiser)
        assert family is not None
        native = family.native_grid(self.denoiser)
        assert native is not None
        self.native = native[0] * self.model.tokens
        joint = any(site.role == "joint" for site in family.sites(self.denoiser))
        self._queries = ("window", "global") if joint else ()
        possible = {"global": joint, "phases": hasattr(self.denoiser, "up_blocks")}  # text in the same softmax; a U-Net
        self.methods = tuple(name for name, method in METHODS.items() if possible.get(method.attention, True))
        self._layers = cache(lambda side: layer_work(self.denoiser, self._inputs(side)))
        self._coded = cache(lambda side, after: autoencoder_work(self._vae, (side, side), after and (after, after)))

    def row(self, size: int, method: str) -> Row:
        """One method at a size in pixels per side.

        Raises:
            ValueError: the model cannot draw this size.
        """
        how = METHODS[method]
        settings, sizes = stages(self.model, self.denoiser, (size, size))
        sides = [side for side, _ in (sizes if how.cascade else sizes[-1:])]
        if how.attention == "phases":
            sides = [min(size, phase * self.native) for phase in range(1, math.ceil(size / self.native) + 1)]
        steps = [settings.steps, *[settings.stage_steps if how.cascade else settings.steps] * (len(sides) - 1)]
        passes = [passes_of_a_step(self.model, settings) * n for n in steps]
        works = [self.forward(side, how.attention) for side in sides]
        run = Forward(*(sum(n * part for n, part in zip(passes, parts, strict=True)) for parts in zip(*works, strict=True)))
        encoded = sides[1:] if how.cascade else [None] * (len(sides) - 1)  # every stage is encoded again, every phase only decoded
        vae = sum(self._coded(side, after) for side, after in zip(sides, [*encoded, None], strict=True))
        rule = how.attention if how.attention in self._queries else ""
        text = self._inputs(size)["encoder_hidden_states"].shape[1]
        row = {"model": self.name, "size": size, "method": method, "text": text, "text_queries": rule, "passes": passes[-1]}
        row |= {"tflops_forward": sum(works[-1]), "tflops_run": sum(run) + vae}
        row |= {f"forward_{part}": tflops for part, tflops in works[-1]._asdict().items()}
        return row | {f"run_{part}": tflops for part, tflops in run._asdict().items()} | {"vae": vae}

    def forward(self, side: int, attention: str) -> Forward:
        """One pass at a size in pixels per side; of views, all of them at the native size, and dilated samples beside them in a phase."""
        if attention in ("views", "phases") and side > self.native:
            native = self.forward(self.native, "full")
            count, phase = views(side, self.native) ** 2, math.ceil(side / self.native)
            dilated = native if attention == "views" else self.forward(FACTOR * math.ceil(side / FACTOR / phase), "full")
            samples = phase**2 if attention == "phases" else 0
            return Forward(*(count * part + samples * other for part, other in zip(native, dilated, strict=True)))
        rule: TextQueries = "global" if attention == "global" else "window"
        kind: Attention = "npa" if attention in ("window", "global") else "full"
        return Forward(*attention_work(self.denoiser, self._inputs(side), attention=kind, text_queries=rule), *self._layers(side))

    def _inputs(self, side: int) -> dict[str, Any]:
        with torch.device("meta"):
            return self.model.inputs(side // FACTOR, side // FACTOR)


def views(side: int, native: int) -> int:
    """MultiDiffusion's views along an axis: of native size, the last one at the border (arXiv:2302.08113).

    They lie half a view apart, as where ScaleDiff compares with them (arXiv:2510.25818); its authors' own script takes an eighth.
    """
    return 1 + math.ceil((side - native) / (native // 2))


def rows(models: Iterable[str], sizes: Sequence[int]) -> Iterator[Row]:
    """Every model and size by every method that the model has."""
    for counter in map(Counter, models):
        yield from (counter.row(size, method) for size in sizes for method in counter.methods)
