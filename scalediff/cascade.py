"""Upsample, noise, denoise: a picture far above a model's native size, through the pipeline's own call.

    base stage at native size, the model's own attention
    for each stage (x2 until the target):
        Z_LU = bicubic(latent);  Z_RU = encode(bicubic(decode(latent)));  Z_ref = LFM(Z_RU, Z_LU)
        x = add_noise(Z_ref, restart);  denoise from there with NPA on and SG at every step

ScaleDiff, arXiv:2510.25818.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.families import FAMILIES, family_of
from scalediff.families.base import Cascade, Family
from scalediff.hooks import Handle, denoiser_of, handle_of, is_text_to_image, original_call, patch_model
from scalediff.latents import decode, encode, pack, pictures_of, unpack
from scalediff.schedule import Guidance, check_scheduler, guided_scheduler, recording_scheduler
from scalediff.settings import Settings, plan_sizes
from scalediff.workdir import Saved, Workdir
from scalediff_kernels import mix_frequencies
from scalediff_kernels.lowpass.geometry import coarse_length

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class Stage:
    """One finished stage.

    Attributes:
        index, of: Its number from 1, and how many there are.
        height, width: Pixels.
        images: PIL pictures, one per prompt.
        latents: `[B, C, Y, X]`, scaled as the pipeline hands them out.
        steps: Denoising steps run.
        seconds: Wall-clock time, its decoding included.
        settings: What the run was asked for.
    """

    index: int
    of: int
    height: int
    width: int
    images: list[Any]
    latents: Tensor
    steps: int
    seconds: float
    settings: Settings


def preset(pipe: Any) -> Settings:
    """The family's default settings for this pipeline."""
    denoiser = denoiser_of(pipe)
    return family_with_cascade(denoiser)[1].preset(denoiser)


def family_with_cascade(denoiser: nn.Module) -> tuple[Family, Cascade]:
    family = family_of(denoiser)
    if family is None or family.cascade is None:
        known = ", ".join(sorted(name for name, one in FAMILIES.items() if one.cascade is not None))
        raise ValueError(f"the cascade knows pipelines around {known}, got {type(denoiser).__name__}")
    return family, family.cascade


def native_size(pipe: Any) -> tuple[int, int]:
    """Pixels (height, width) that the model was trained at; of a patched one, those of its window."""
    denoiser, handle = denoiser_of(pipe), handle_of(pipe)
    family, cascade = family_with_cascade(denoiser)
    y, x = handle.window if handle is not None else family.native_grid(denoiser) or (0, 0)
    return y * cascade.patch * pipe.vae_scale_factor, x * cascade.patch * pipe.vae_scale_factor


def stage_sizes(pipe: Any, height: int, width: int) -> list[tuple[int, int]]:
    """The sizes of all stages up to a target, in pixels; raises as `plan_sizes`."""
    cascade = family_with_cascade(denoiser_of(pipe))[1]
    multiple = max(cascade.size_multiple, cascade.patch * pipe.vae_scale_factor)
    return plan_sizes((height, width), native=native_size(pipe), multiple=multiple)


def call_pipeline(pipe: Any, arguments: dict[str, Any]) -> Any:
    """A patched pipeline's call: its own up to the native size, the cascade above; arguments and return value are the pipeline's."""
    native = native_size(pipe)
    height, width = arguments.get("height") or native[0], arguments.get("width") or native[1]
    if (height <= native[0] and width <= native[1]) or height * width <= native[0] * native[1]:
        return original_call(pipe)(pipe, **arguments)
    settings, handle = preset(pipe), handle_of(pipe)
    settings = replace(
        settings,
        steps=arguments.setdefault("num_inference_steps", settings.steps),
        guidance_scale=arguments.setdefault(family_with_cascade(denoiser_of(pipe))[1].guidance, settings.guidance_scale),
        attention=handle.attention if handle is not None else settings.attention,
    )
    if arguments.get("generator") is None:
        arguments["generator"] = fresh_generator()
    return run(pipe, arguments, stage_sizes(pipe, height, width), settings)


_LATENT = {"output_type": "latent", "return_dict": False}


@torch.no_grad()
def run(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: list[tuple[int, int]],
    settings: Settings,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
    picture: Tensor | None = None,
    base: tuple[int, int] | None = None,
    workdir: Workdir | None = None,
) -> Any:
    """All stages. With `on_stage` every one is decoded for it; without, the last call's own return value is returned.

    A picture, `[B, 3, height, width]` in [-1, 1], stands for the base stage, whose size `base` then is. Stages that a workdir holds
    are taken from there.
    """
    _check(pipe, arguments, sizes, settings, restarts=len(sizes) if picture is not None else len(sizes) - 1)
    call, scheduler = original_call(pipe), pipe.scheduler
    trained_size = family_with_cascade(denoiser_of(pipe))[1].trained_size
    asked: Mapping[str, Any] = {}
    latents = decoded = torch.empty(0)
    with _borrowed(pipe, settings) as handle:
        done = workdir.finished() if workdir is not None else []
        if picture is not None:
            decoded = picture.to(pipe._execution_device)
            latents = encode(pipe, decoded).to(pipe.dtype)
        if picture is not None or 0 < len(done) < len(sizes):
            asked = _rehearsed(pipe, scheduler, arguments, base or sizes[0])
        for index, (height, width) in enumerate(sizes, start=1):
            if index <= len(done):
                latents, seconds = done[index - 1].latents.to(pipe._execution_device), done[index - 1].seconds
                decoded = decode(pipe, latents)
                _set_states(arguments["generator"], done[index - 1].states)
                if on_stage is not None:
                    steps = settings.steps if index == 1 and picture is None else settings.stage_steps
                    on_stage(Stage(index, len(sizes), height, width, pictures_of(pipe, decoded), latents, steps, seconds, settings))
                continue
            since = time.perf_counter()
            changes: dict[str, Any] = {"height": height, "width": width}
            restarts = index > 1 or picture is not None
            if restarts:
                asked = asked or pipe.scheduler.asked
                pipe.scheduler = scheduler
                changes |= _restart(pipe, asked, latents, decoded, (height, width), settings, arguments["generator"])
            elif len(sizes) > 1:
                pipe.scheduler = recording_scheduler(scheduler)
            if handle is not None:
                handle.attention = settings.attention if restarts else "full"
                handle.restart_jitter()
            if trained_size and restarts and settings.attention == "npa":
                setattr(pipe, trained_size, round(math.sqrt(height * width)))
            if progress is not None:
                pipe.set_progress_bar_config(desc=f"stage {index}/{len(sizes)}  {height} x {width}", disable=not progress)
            if index == len(sizes) and on_stage is None:
                return call(pipe, **{**arguments, **changes})
            latents = _unpacked(pipe, call(pipe, **{**arguments, **changes, **_LATENT})[0], (height, width))
            decoded = decode(pipe, latents)
            if on_stage is not None:
                steps, images = changes.get("num_inference_steps", settings.steps), pictures_of(pipe, decoded)
                seconds = time.perf_counter() - since
                if workdir is not None:
                    workdir.save(index, Saved(latents, _states(arguments["generator"]), seconds), images)
                on_stage(Stage(index, len(sizes), height, width, images, latents, steps, seconds, settings))
            if getattr(pipe, "interrupt", False):  # diffusers' flag, set by a callback: this stage is the last
                return None if on_stage is not None else _as_they_are(pipe, arguments, scheduler, latents, height, width)
    return None


def _states(generator: Generators) -> list[Tensor]:
    return [one.get_state() for one in (generator if isinstance(generator, list) else [generator])]


def _set_states(generator: Generators, states: list[Tensor]) -> None:
    for one, state in zip(generator if isinstance(generator, list) else [generator], states, strict=True):
        one.set_state(state)


def _as_they_are(pipe: Any, arguments: Mapping[str, Any], scheduler: Any, latents: Tensor, height: int, width: int) -> Any:
    """The pipeline's own return value for these latents: its call, with a schedule of no steps."""
    pipe.scheduler = guided_scheduler(scheduler, steps=1, kept=0, guidance=Guidance(None, 1.0))
    changes = {"height": height, "width": width, "latents": _packed(pipe, latents), "num_inference_steps": 1}
    return original_call(pipe)(pipe, **{**arguments, **changes})


def _rehearsed(pipe: Any, scheduler: Any, arguments: Mapping[str, Any], base: tuple[int, int]) -> Mapping[str, Any]:
    """What the pipeline would ask of its scheduler for a picture of the base size: its call, with a schedule of no steps."""
    pipe.scheduler = recording_scheduler(scheduler, runs=False)
    changes = {"height": base[0], "width": base[1], "generator": fresh_generator()}
    original_call(pipe)(pipe, **{**arguments, **changes, **_LATENT})
    asked: Mapping[str, Any] = pipe.scheduler.asked
    pipe.scheduler = scheduler
    return asked


def check_call(pipe: Any) -> None:
    denoiser_of(pipe)
    if not hasattr(pipe, "vae_scale_factor") or not is_text_to_image(type(pipe)):
        raise TypeError(f"the cascade needs a text-to-image pipeline, got {type(pipe).__name__}")


def _check(pipe: Any, arguments: Mapping[str, Any], sizes: list[tuple[int, int]], settings: Settings, *, restarts: int) -> None:
    """Refuse before anything is drawn what one of the last `restarts` stages would refuse."""
    factor = pipe.vae_scale_factor
    if restarts:
        check_scheduler(pipe.scheduler)
        for name in ("timesteps", "sigmas", "denoising_end"):
            if arguments.get(name) is not None:
                raise ValueError(f"stages above the native size lay out their own schedule, got {name}={arguments[name]}")
    for height, width in sizes[len(sizes) - restarts :]:
        for cutoff in (settings.lfm_cutoff, settings.sg_cutoff):
            coarse_length(min(height, width) // factor, cutoff)
    latents, base = arguments.get("latents"), (sizes[0][0] // factor, sizes[0][1] // factor)
    packed = family_with_cascade(denoiser_of(pipe))[1].packed
    if latents is not None and (latents.shape[1] != base[0] * base[1] // 4 if packed else tuple(latents.shape[-2:]) != base):
        raise ValueError(f"latents are those of the base stage, {base[0]} x {base[1]}, got {tuple(latents.shape)=}")


@contextmanager
def _borrowed(pipe: Any, settings: Settings) -> Iterator[Handle | None]:
    """Give the pipeline back as it was; inside, the handle whose attention the stages switch (None: nothing is patched).

    A pipeline that is not patched gets its denoiser patched for the run, before anything is drawn, so that a model with
    nothing to patch is known at once.
    """
    scheduler, bar = pipe.scheduler, pipe.__dict__.get("_progress_bar_config")
    trained_size = family_with_cascade(denoiser_of(pipe))[1].trained_size
    pixels = getattr(pipe, trained_size) if trained_size else None
    handle = handle_of(pipe)
    with nullcontext(handle) if handle is not None or settings.attention == "full" else patch_model(denoiser_of(pipe)) as handle:
        attention = handle.attention if handle is not None else None
        try:
            yield handle
        finally:
            pipe.scheduler = scheduler
            if trained_size:
                setattr(pipe, trained_size, pixels)
            if bar is not None:
                pipe._progress_bar_config = bar
            else:
                pipe.__dict__.pop("_progress_bar_config", None)
            if handle is not None and attention is not None:
                handle.attention = attention


def _restart(
    pipe: Any,
    asked: Mapping[str, Any],
    latents: Tensor,
    decoded: Tensor,
    size: tuple[int, int],
    settings: Settings,
    generator: Generators,
) -> dict[str, Any]:
    """Hand the pipeline this stage's guided scheduler, a tail of the schedule that the base stage asked for.

    Returns the latents and steps that the pipeline's call starts from.
    """
    from diffusers.utils.torch_utils import randn_tensor

    reference = _reference(pipe, latents, decoded, size, settings)
    steps = settings.stage_steps
    cascade = family_with_cascade(denoiser_of(pipe))[1]
    guidance = Guidance(reference if settings.sg else None, settings.sg_cutoff, packed=cascade.packed)
    pipe.scheduler = guided_scheduler(pipe.scheduler, steps=settings.steps, kept=steps, guidance=guidance, asked=asked)
    pipe.scheduler.set_timesteps(steps)
    start = pipe.scheduler.levels[0]
    noise = randn_tensor(reference.shape, generator=generator, device=reference.device, dtype=reference.dtype)
    return {"latents": _packed(pipe, start.signal * reference + start.noise * noise), "num_inference_steps": steps}


def _packed(pipe: Any, latents: Tensor) -> Tensor:
    """As the pipeline takes latents."""
    return pack(latents) if family_with_cascade(denoiser_of(pipe))[1].packed else latents


def _unpacked(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, C, Y, X]` of what the pipeline hands out for a picture of a size in pixels."""
    factor = pipe.vae_scale_factor
    return unpack(latents, (size[0] // factor, size[1] // factor)) if family_with_cascade(denoiser_of(pipe))[1].packed else latents


def _reference(pipe: Any, latents: Tensor, decoded: Tensor, size: tuple[int, int], settings: Settings) -> Tensor:
    """The stage's clean reference `[B, C, Y, X]`: upsampled in RGB, its low band replaced by the latent's own."""
    z_ru = encode(pipe, F.interpolate(decoded, size=size, mode="bicubic", align_corners=False)).to(latents.dtype)
    if not z_ru.isfinite().all():
        raise ValueError(f"the autoencoder overflows in {pipe.vae.dtype}: load the pipeline in bfloat16 or float32")
    if not settings.lfm:
        return z_ru
    z_lu = F.interpolate(latents, size=z_ru.shape[-2:], mode="bicubic", align_corners=False)
    return mix_frequencies(z_ru, z_lu, cutoff=settings.lfm_cutoff)


def fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
