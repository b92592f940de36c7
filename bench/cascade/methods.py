"""How each of the methods that `bench.cascade` compares draws a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import scalediff
from bench.cascade.authors import Authors
from bench.cascade.models import SEED, Subject
from bench.flops.work import Above, StagePlan, Work, plan, without_weights
from scalediff.cascade.latents import packed
from scalediff.cascade.pipeline import cascade_of, family_with_cascade, native_size, preset, stage_sizes, takes_size_conditioning
from scalediff.cascade.results import Stage
from scalediff.methods import DemoFusion, Direct, MultiDiffusion
from scalediff.methods.demofusion import phase_sizes
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings
from scalediff_kernels.neighborhood.api import Impl, TextQueries


@dataclass(frozen=True)
class Method:
    name: str  # on the command line and in rows
    kind: Literal["direct", "views", "phases", "cascade"]  # all steps at the target, whole or in views; DemoFusion; or ScaleDiff's stages
    attention: Literal["npa", "full"] = "full"  # of a cascade above its base stage
    text_queries: TextQueries = "window"  # the rule for text queries in windows
    authors: Literal["", "plain", "jitter"] = ""  # windows in the authors' form, without or with their jitter
    joint: bool = False  # only for models with text in the same softmax

    @property
    def repeatable(self) -> bool:
        """Whether its windows are the same in every call."""
        return self.authors != "jitter"


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("direct", "direct"),
        Method("multidiffusion", "views"),
        Method("demofusion", "phases"),
        Method("cascade-full", "cascade"),
        Method("authors", "cascade", "npa", authors="plain"),
        Method("authors-jitter", "cascade", "npa", authors="jitter", joint=True),
        Method("npa", "cascade", "npa"),
        Method("npa-global", "cascade", "npa", text_queries="global", joint=True),
    )
}
OURS = ("npa", "npa-global")


class Drawn:
    """A pipeline that draws square pictures by any method; methods with views pass `view_batch` of them at once."""

    def __init__(self, subject: Subject, device: str, *, view_batch: int = 8) -> None:
        self.subject, self.device, self.view_batch = subject, device, view_batch
        self.pipe, self.arguments = subject.make(device)
        self.pipe.set_progress_bar_config(disable=True)
        if not subject.small:
            self.pipe.vae.enable_tiling()  # as the authors do; pictures of native size are one tile
        self.settings = preset(self.pipe)
        denoiser = denoiser_of(self.pipe)
        self.family = family_with_cascade(denoiser)[0]
        self.rotation = self.family.rotation(denoiser)
        self.joint = any(site.role == "joint" for site in self.family.sites(denoiser))  # text in the same softmax
        with self.patched(METHODS["direct"]):
            self.native = native_size(self.pipe)[0]  # pixels per side that the model was trained at

    @property
    def impl(self) -> Impl:
        """Models of 16 bits on a GPU take the kernel and nothing else: what is timed as ours must be it."""
        return "triton" if self.device == "cuda" and self.subject.dtype.itemsize == 2 else "auto"

    def refusal(self, method: Method) -> str:
        """Why a method cannot draw with this model; empty where it can."""
        if not method.joint or self.joint:
            return ""
        what = "the authors jitter FLUX alone" if method.authors else "queries of text have a rule only in joint attention"
        return f"{what}, and {self.subject.title} has text in calls of its own"

    def plan(self, method: Method, side: int) -> list[StagePlan]:
        """The stages of a whole run; raises ValueError for a size that the model cannot draw."""
        with self.patched(method):
            sizes = (phase_sizes if method.kind == "phases" else stage_sizes)(self.pipe, side, side)
        sides = [one for one, _ in sizes]
        above: Above = method.text_queries if method.attention == "npa" else "full"
        if method.kind in ("views", "phases"):
            above = method.kind
        guided = self.settings.guidance_scale > 1 and bool(cascade_of(self.pipe).conditional)
        how: dict[str, Any] = {"cascade": method.kind == "cascade", "settings": self.settings, "guided": guided}
        return plan(sides[-1:] if method.kind in ("direct", "views") else sides, above, **how)

    def draw(
        self, method: Method, side: int, *, steps: int | None = None, stride: int | None = None,
        on_stage: Callable[[Stage], None] | None = None, **call: Any,
    ) -> list[Stage]:  # fmt: skip
        """A whole run, or one with this many `steps` in every stage; `call` are more arguments of the pipeline's call.

        Raises NotImplementedError if the method cannot draw with this pipeline.
        """
        size, settings, call = (side, side), self._settings(method, steps), {**self.arguments, **call}
        generator = torch.Generator().manual_seed(SEED)
        with self.patched(method), torch.no_grad():
            if method.kind == "cascade":
                prompt = call.pop("prompt", None)
                how: dict[str, Any] = {"call": call, "generator": generator, "preset": settings, "on_stage": on_stage}
                return scalediff.generate(self.pipe, prompt, height=side, width=side, **how).stages
            options: Any = {
                "direct": Direct(), "phases": DemoFusion(view_batch=self.view_batch),
                # one view at a time where they do not overlap: the passes of direct inference
                "views": MultiDiffusion(stride=stride, view_batch=1 if stride else self.view_batch),
            }[method.kind]  # fmt: skip
            run = scalediff.methods.METHODS[method.name].run
            return run(self.pipe, call | {"generator": generator}, size, settings, options, on_stage=on_stage)

    def _settings(self, method: Method, steps: int | None) -> Settings:
        settings = replace(self.settings, attention=method.attention)
        return settings if steps is None else replace(settings, steps=steps, restart=1.0)

    def stage(self, method: Method, *, steps: int) -> Tensor:
        """For gates: the latents of one stage of twice the native size that starts from random pixels."""
        from PIL import Image

        rng, side, call = torch.Generator().manual_seed(SEED), 2 * self.native, dict(self.arguments)
        picture = Image.fromarray(torch.randint(256, (self.native, self.native, 3), generator=rng, dtype=torch.uint8).numpy())
        how: dict[str, Any] = {"generator": torch.Generator().manual_seed(SEED), "preset": self._settings(method, steps)}
        with self.patched(method):
            prompt = call.pop("prompt", None)
            result = scalediff.upscale(self.pipe, picture, prompt, height=side, width=side, sizes=[(side, side)], call=call, **how)
        return result.stages[-1].latents

    def quarters(self, *, steps: int) -> tuple[Tensor, Tensor]:
        """For gates: latents of twice the native size from one noise, by MultiDiffusion without overlap and by each quarter alone."""
        view, side, rng = self.native // self.pipe.vae_scale_factor, 2 * self.native, torch.Generator().manual_seed(SEED)
        noise = torch.randn(1, self.pipe.vae.config.latent_channels, 2 * view, 2 * view, generator=rng).to(self.device, self.subject.dtype)
        call: dict[str, Any] = {}
        if takes_size_conditioning(self.pipe):  # a view gets the size of the whole picture
            call = dict.fromkeys(("original_size", "target_size"), (side, side))

        def drawn(method: str, size: int, latents: Tensor) -> Tensor:
            return self.draw(METHODS[method], size, steps=steps, stride=view, latents=packed(self.pipe, latents), **call)[-1].latents

        halves = [[drawn("direct", self.native, quarter) for quarter in half.split(view, -1)] for half in noise.split(view, -2)]
        return drawn("multidiffusion", side, noise), torch.cat([torch.cat(half, -1) for half in halves], -2)

    @contextmanager
    def patched(self, method: Method) -> Iterator[None]:
        """Inside, the denoiser has the method's windows."""
        rule: TextQueries = method.text_queries if self.joint else "window"
        with scalediff.patch_model(self.pipe, window=self.subject.window, text_queries=rule, impl=self.impl):
            authors = Authors(self.rotation, jitter=not method.repeatable)
            with authors.installed() if method.authors else nullcontext():
                yield

    def work(self) -> Work:
        """Useful TFLOPs of runs with this model."""
        denoiser, vae = denoiser_of(self.pipe), self.pipe.vae
        window = self.subject.window or self.family.native_grid(denoiser)  # a small model's family may name that of the large one
        how: dict[str, Any] = {"native": self.native, "factor": self.pipe.vae_scale_factor, "tiled": getattr(vae, "use_tiling", False)}
        family = replace(self.family, native_grid=lambda _: window)
        return Work(without_weights(denoiser), without_weights(vae), self.subject.inputs, **how, family=family)
