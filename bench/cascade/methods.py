"""How a picture is drawn by each of the methods that `bench.cascade` compares, and the useful work of it.

Legend: Y x X latent grid.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import scalediff
from bench.cascade.authors import Authors
from bench.cascade.models import SEED, Subject
from scalediff.cascade.latents import packed
from scalediff.cascade.pipeline import cascade_of, native_size, preset, stage_sizes
from scalediff.cascade.stage import Stage
from scalediff.cost import flops
from scalediff.cost.flops import Forward, forward_work
from scalediff.families import family_of
from scalediff.families.grid import Grid
from scalediff.methods import DemoFusion, MultiDiffusion, running
from scalediff.methods.demofusion import phase_sizes
from scalediff.methods.multidiffusion import multidiffusion
from scalediff.methods.views import corners
from scalediff.patching.networks import denoiser_of, original_call
from scalediff.patching.subclass import original_class
from scalediff.settings import Settings
from scalediff_kernels.neighborhood.api import Impl, TextQueries

Kind = Literal["direct", "views", "phases", "cascade"]


@dataclass(frozen=True)
class Method:
    """One way of drawing above the native size.

    Attributes:
        name: On the command line and in rows.
        title: For people.
        kind: All steps at the target, whole or in views; DemoFusion's phases; or ScaleDiff's stages.
        attention: Of a cascade above its base stage.
        text_queries: The rule for queries of text in windows.
        authors: Windows in the authors' form: without jitter, with it, or not.
        joint: For models alone that have text in the same softmax.
    """

    name: str
    title: str
    kind: Kind
    attention: Literal["npa", "full"] = "full"
    text_queries: TextQueries = "window"
    authors: Literal["", "plain", "jitter"] = ""
    joint: bool = False


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("direct", "direct inference, full attention", "direct"),
        Method("multidiffusion", "MultiDiffusion, views half a window apart", "views"),
        Method("demofusion", "DemoFusion", "phases"),
        Method("cascade-full", "ScaleDiff's cascade with full attention", "cascade"),
        Method("authors", "ScaleDiff, attention in the authors' form", "cascade", "npa", authors="plain"),
        Method("authors-jitter", "the same with their padded jitter", "cascade", "npa", authors="jitter", joint=True),
        Method("npa", "ScaleDiff, ours", "cascade", "npa"),
        Method("npa-global", "ScaleDiff, ours, text queries once", "cascade", "npa", text_queries="global", joint=True),
    )
}
OURS = ("npa", "npa-global")


class Planned(NamedTuple):
    """One stage of a run.

    Attributes:
        size: Pixels.
        steps: That the true run takes.
        views: Passes of native size that a step's pass is made of; 0 where it is one pass of the stage's own size.
        restarts: Begun from the picture of the stage before.
    """

    size: Grid
    steps: int
    views: int
    restarts: bool


class Drawn:
    """A pipeline ready to draw by any method; methods with views pass `view_batch` of them at once."""

    def __init__(self, subject: Subject, device: str, *, view_batch: int = 8) -> None:
        self.subject, self.device, self.view_batch = subject, device, view_batch
        self.pipe, self.arguments = subject.build(device)
        if not subject.small:
            self.pipe.vae.enable_tiling()  # as the authors do; pictures of native size are one tile

    @property
    def joint(self) -> bool:
        """Whether text is in the same softmax."""
        family = family_of(denoiser_of(self.pipe))
        assert family is not None
        return any(site.role == "joint" for site in family.sites(denoiser_of(self.pipe)))

    @property
    def impl(self) -> Impl:
        """Of the attention: on a GPU the kernel for models of 16 bits or nothing, for what is timed as ours must be it."""
        return "triton" if self.device == "cuda" and self.subject.dtype.itemsize == 2 else "auto"

    @property
    def settings(self) -> Settings:
        return preset(self.pipe)

    def refusal(self, method: Method) -> str:
        """Why a method has no row for this model, in a sentence; empty where it has."""
        if method.joint and not self.joint:
            what = "the authors jitter FLUX alone" if method.authors else "queries of text have a rule only in joint attention"
            return f"{what}, and {self.subject.title} has text in calls of its own"
        return ""

    def plan(self, method: Method, size: int) -> list[Planned]:
        """The stages of a true run; raises ValueError for a size that the model cannot draw."""
        with self.patched(method):
            settings, target, native = self.settings, (size, size), native_size(self.pipe)
            sizes = stage_sizes(self.pipe, size, size)
            if method.kind == "cascade":
                above = [Planned(one, settings.stage_steps, 0, True) for one in sizes[1:]]
                return [Planned(sizes[0], settings.steps, 0, False), *above]
            if method.kind == "direct":
                return [Planned(target, settings.steps, 0, False)]
            if method.kind == "views":
                return [Planned(target, settings.steps, self._views(target, native), False)]
            planned = [Planned(native, settings.steps, 0, False)]
            for phase, one in enumerate(phase_sizes(self.pipe, size, size)[1:], start=2):
                planned.append(Planned(one, settings.steps, self._views(one, native) + phase**2, True))
            return planned

    def _views(self, size: Grid, native: Grid) -> int:
        factor = self.pipe.vae_scale_factor
        (y, x), window = ([n // factor for n in one] for one in (size, native))
        return len(corners((y, x), window=(window[0], window[1]), stride=(window[0] // 2, window[1] // 2)))

    def draw(
        self, method: Method, size: int, *, steps: int | None = None, on_stage: Callable[[Stage], None] | None = None,
        on_step: Callable[..., dict[str, Any]] | None = None,
    ) -> list[Stage]:  # fmt: skip
        """A true run, or with `steps` one with so many in every stage.

        Raises:
            NotImplementedError: the method cannot draw with this pipeline.
        """
        settings = self.settings if steps is None else replace(self.settings, steps=steps, restart=1.0)
        settings = replace(settings, attention=method.attention if method.kind == "cascade" else settings.attention)
        arguments = self.arguments | ({"callback_on_step_end": on_step} if on_step is not None else {})
        generator = torch.Generator().manual_seed(SEED)
        with self.patched(method):
            if method.kind == "direct":
                return self._direct(arguments | {"generator": generator}, (size, size), settings, on_stage)
            prompt = arguments.pop("prompt", None)
            how: dict[str, Any] = {"call": arguments, "generator": generator, "on_stage": on_stage, "preset": settings}
            if method.kind != "cascade":
                how["method"] = (MultiDiffusion if method.kind == "views" else DemoFusion)(view_batch=self.view_batch)
            return scalediff.generate(self.pipe, prompt, height=size, width=size, **how).stages

    def _direct(
        self, arguments: dict[str, Any], size: Grid, settings: Settings, on_stage: Callable[[Stage], None] | None
    ) -> list[Stage]:  # fmt: skip
        since = time.perf_counter()
        with torch.no_grad(), running.borrowed(self.pipe):
            complete = running.complete_arguments(self.pipe, arguments, settings)
            latents = running.generate_latents(self.pipe, complete, size)
            stage = running.finished(self.pipe, complete, latents, size, settings, index=1, of=1, since=since)
        if on_stage is not None:
            on_stage(stage)
        return [stage]

    def stage(self, method: Method, *, steps: int) -> Tensor:
        """The latents of one stage of twice the native size, from a picture of random pixels; for gates."""
        from PIL import Image

        with self.patched(method):
            height, width = native_size(self.pipe)
            pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8)
            settings = replace(self.settings, steps=steps, restart=1.0, attention=method.attention)
            arguments = dict(self.arguments)
            drawn = scalediff.upscale(
                self.pipe, Image.fromarray(pixels.numpy()), arguments.pop("prompt", None), height=2 * height, width=2 * width,
                sizes=[(2 * height, 2 * width)], call=arguments, generator=torch.Generator().manual_seed(SEED), preset=settings,
            )  # fmt: skip
        return drawn.stages[-1].latents

    def quarters(self, *, steps: int) -> tuple[Tensor, Tensor]:
        """Latents of twice the native size from one noise: by MultiDiffusion with a window between views, and each quarter by itself."""
        settings, (height, width) = replace(self.settings, steps=steps, restart=1.0), self.native
        y, x = (side // self.pipe.vae_scale_factor for side in (height, width))
        rng = torch.Generator().manual_seed(SEED)
        noise = torch.randn(1, self.pipe.vae.config.latent_channels, 2 * y, 2 * x, generator=rng).to(self.device, self.subject.dtype)
        arguments = running.complete_arguments(self.pipe, dict(self.arguments), settings)
        if "original_size" in inspect.signature(original_call(self.pipe)).parameters:
            arguments |= dict.fromkeys(("original_size", "target_size"), (2 * height, 2 * width))  # a view is told the whole picture's
        options = MultiDiffusion(stride=min(y, x), view_batch=1)
        with self.patched(METHODS["direct"]), torch.no_grad():
            given = arguments | {"latents": packed(self.pipe, noise)}
            whole = multidiffusion(self.pipe, given, (2 * height, 2 * width), settings, options)[-1].latents
            with running.borrowed(self.pipe):
                quarters = [
                    [
                        running.generate_latents(self.pipe, arguments | {"latents": packed(self.pipe, quarter)}, (height, width))
                        for quarter in half.split(x, dim=-1)
                    ]
                    for half in noise.split(y, dim=-2)
                ]
        return whole, torch.cat([torch.cat(half, dim=-1) for half in quarters], dim=-2)

    @property
    def native(self) -> Grid:
        """Pixels."""
        with self.patched(METHODS["direct"]):
            return native_size(self.pipe)

    @contextmanager
    def patched(self, method: Method) -> Iterator[None]:
        """Inside, the denoiser has the method's windows, for whatever is drawn in windows."""
        rule: TextQueries = method.text_queries if self.joint else "window"
        with scalediff.patch_model(self.pipe, window=self.subject.window, text_queries=rule, impl=self.impl):
            jitter = method.authors == "jitter"
            with Authors(denoiser_of(self.pipe), jitter=jitter).installed() if method.authors else nullcontext():
                yield


class Work:
    """Useful TFLOPs of the parts of a run, counted on the meta device; padding never counts.

    Of the denoiser as `scalediff.cost.flops` counts it. An autoencoder that works in tiles attends within them alone: counted as so many
    pictures of native size as there are in the area, whatever overlaps.
    """

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn
        pipe, family = drawn.pipe, family_of(denoiser_of(drawn.pipe))
        assert family is not None
        with torch.device("meta"):
            self._denoiser = _twin(denoiser_of(pipe))
            self._vae = _twin(pipe.vae)
        self._native = drawn.subject.window or family.native_grid(denoiser_of(pipe))
        self._forward, self._coded = cache(self._count_forward), cache(self._count_coded)

    def step(self, method: Method, planned: Planned) -> Forward:
        """Of one step, both passes of guidance and all views counted."""
        above = planned.restarts and method.attention == "npa" and method.kind == "cascade"
        kind = method.text_queries if above else "full"
        one = self._forward(self._drawn.native if planned.views else planned.size, kind)
        times = (planned.views or 1) * self.passes
        return Forward(*(times * part for part in one))

    @property
    def passes(self) -> int:
        """Passes of the denoiser in a step, guidance included."""
        settings = self._drawn.settings
        return 2 if settings.guidance_scale > 1 and cascade_of(self._drawn.pipe).conditional else 1

    def autoencoder(self, method: Method, planned: list[Planned]) -> float:
        """Of a run: every stage is decoded, and the next one of a cascade encoded."""
        total = sum(self._coded("decode", one.size) for one in planned)
        return total + (sum(self._coded("encode", one.size) for one in planned[1:]) if method.kind == "cascade" else 0.0)

    def run(self, method: Method, planned: list[Planned]) -> float:
        """Of a whole run."""
        return sum(one.steps * sum(self.step(method, one)) for one in planned) + self.autoencoder(method, planned)

    def _count_forward(self, size: Grid, kind: str) -> Forward:
        factor = self._drawn.pipe.vae_scale_factor
        grid = size[0] // factor, size[1] // factor
        with torch.device("meta"):
            inputs = self._drawn.subject.inputs(*grid)
        rule: TextQueries = "global" if kind == "global" else "window"
        if kind == "full" or self._drawn.subject.window is None:
            return forward_work(self._denoiser, inputs, attention="full" if kind == "full" else "npa", text_queries=rule)
        return self._small_windows(inputs, rule)

    def _small_windows(self, inputs: dict[str, Any], rule: TextQueries) -> Forward:
        """A small model's family may name the window of its large one."""
        family = family_of(self._denoiser)
        assert family is not None
        own = replace(family, native_grid=lambda denoiser: self._native)
        with mock.patch.object(flops, "family_of", return_value=own):
            return forward_work(self._denoiser, inputs, attention="npa", text_queries=rule)

    def _count_coded(self, what: str, size: Grid) -> float:
        from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

        native = self._drawn.native
        if getattr(self._drawn.pipe.vae, "use_tiling", False) and size != native:
            return self._coded(what, native) * math.prod(size) / math.prod(native)
        factor, channels = self._drawn.pipe.vae_scale_factor, self._vae.config.latent_channels
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), torch.device("meta"), counter:
            if what == "encode":
                self._vae.encode(torch.empty(1, 3, *size))
            else:
                self._vae.decode(torch.empty(1, channels, size[0] // factor, size[1] // factor))
        return counter.get_total_flops() / 1e12


def _twin(network: nn.Module) -> Any:
    """The same network without weights, in fp32."""
    cls: Any = original_class(type(network))
    return cls.from_config(network.config).eval()
