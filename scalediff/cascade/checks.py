"""The checks before a run of the cascade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scalediff.cascade.pipeline import Sizes, cascade_of, takes_size_conditioning
from scalediff.cascade.schedule import check_scheduler
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings
from scalediff_kernels.lowpass.geometry import coarse_length


def check_run(pipe: Any, arguments: Mapping[str, Any], sizes: Sizes, settings: Settings, *, restarts: int) -> None:
    """Raise the errors of the last `restarts` stages, those that restart from noise, before anything is computed."""
    factor, cascade = pipe.vae_scale_factor, cascade_of(pipe)
    if restarts:
        check_scheduler(pipe.scheduler)
        for name in ("timesteps", "sigmas", "denoising_end"):
            if arguments.get(name) is not None:
                raise ValueError(f"stages above the native size set their own schedule, got {name}={arguments[name]}")
        control = arguments.get("control_image")
        if any(isinstance(one, Tensor) for one in (control if isinstance(control, list) else [control])):
            raise ValueError("control_image must be a PIL picture, because it is resized for each stage, got a tensor")
        _check_settings(pipe, settings, restarts, has_base=restarts < len(sizes))
    for number, (height, width) in enumerate(sizes[len(sizes) - restarts :], start=1):
        stage = settings.of_stage(number, restarts)
        for cutoff in (stage.lfm_cutoff, stage.sg_cutoff, stage.sg_cutoff_start):
            if isinstance(cutoff, float | int):
                coarse_length(min(height, width) // factor, cutoff, stage.filter)
    latents, base = arguments.get("latents"), (sizes[0][0] // factor, sizes[0][1] // factor)
    if latents is not None and (latents.shape[1] != base[0] * base[1] // 4 if cascade.packed else tuple(latents.shape[-2:]) != base):
        raise ValueError(f"latents must have the size of the base stage, {base[0]} x {base[1]}, got {tuple(latents.shape)=}")


def _check_settings(pipe: Any, settings: Settings, restarts: int, *, has_base: bool) -> None:
    if settings.anchor == "trajectory" and settings.sg and not has_base:
        raise ValueError("anchor='trajectory' needs a base stage, which upscale does not have")
    until = settings.guidance_until
    if min(until if isinstance(until, tuple) else (until,)) < 1 and not cascade_of(pipe).conditional:
        name = type(denoiser_of(pipe)).__name__
        raise NotImplementedError(f"guidance_until below 1 needs classifier-free guidance in one doubled batch, got {name}")
    if settings.size_conditioning != "target" and not takes_size_conditioning(pipe):
        raise ValueError(f"size_conditioning needs a pipeline with the arguments original_size and target_size, got {type(pipe).__name__}")
