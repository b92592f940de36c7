"""What the cascade reads from a pipeline: family, presets, sizes, and the checks before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from scalediff.cascade.schedule import check_scheduler
from scalediff.families import FAMILIES, family_of
from scalediff.families.base import Cascade, Family
from scalediff.patching.networks import denoiser_of, handle_of, is_text_to_image, original_call
from scalediff.settings import Preset, Settings, check_sizes, plan_sizes
from scalediff_kernels.lowpass.geometry import coarse_length

Sizes = Sequence[tuple[int, int]]


def family_with_cascade(denoiser: nn.Module) -> tuple[Family, Cascade]:
    """The family of a denoiser and its `Cascade`.

    Raises:
        ValueError: The family is not known, or the cascade does not support it.
    """
    family = family_of(denoiser)
    if family is None or family.cascade is None:
        known = ", ".join(sorted(name for name, one in FAMILIES.items() if one.cascade is not None))
        raise ValueError(f"the cascade supports pipelines with one of {known}, got {type(denoiser).__name__}")
    return family, family.cascade


def cascade_of(pipe: Any) -> Cascade:
    """What the cascade needs to know about the pipeline's family; raises as `family_with_cascade`."""
    return family_with_cascade(denoiser_of(pipe))[1]


def named_preset(pipe: Any, name: str) -> Preset:
    """A preset of the pipeline's family, by name.

    Raises:
        ValueError: The family has no such preset, or the preset needs another scheduler.
    """
    presets = cascade_of(pipe).presets(denoiser_of(pipe))
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)} for this {type(denoiser_of(pipe)).__name__}, got {name!r}")
    wanted, spacing = presets[name].spacing, pipe.scheduler.config.get("timestep_spacing")
    if wanted and spacing != wanted:
        raise ValueError(
            f"preset {name!r} needs a scheduler with timestep_spacing={wanted!r}, got {type(pipe.scheduler).__name__} with {spacing=}"
        )
    return presets[name]


def preset(pipe: Any, name: str = "default") -> Settings:
    """The settings of a preset of the pipeline's family, by name; raises as `named_preset`."""
    return named_preset(pipe, name).settings


def native_size(pipe: Any) -> tuple[int, int]:
    """The model's native (height, width) in pixels; for a patched pipeline, the size of its window."""
    denoiser, handle = denoiser_of(pipe), handle_of(pipe)
    family, cascade = family_with_cascade(denoiser)
    y, x = handle.window if handle is not None else family.native_grid(denoiser) or (0, 0)
    return y * cascade.patch * pipe.vae_scale_factor, x * cascade.patch * pipe.vae_scale_factor


def stage_sizes(
    pipe: Any, height: int, width: int, given: Sizes | None = None, *, picture: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """The size of every stage up to a target: planned, or the caller's list after a check.

    Args:
        pipe: The pipeline.
        height, width: Target in pixels.
        given: The caller's (height, width) of every stage, or None.
        picture: (height, width) of the picture that replaces the base stage, for the check of `given`.

    Raises:
        ValueError: As `plan_sizes` and `check_sizes`.
    """
    cascade = cascade_of(pipe)
    rules: dict[str, Any] = {"native": native_size(pipe), "multiple": max(cascade.size_multiple, cascade.patch * pipe.vae_scale_factor)}
    if given is None:
        return plan_sizes((height, width), **rules)
    check_sizes(given, (height, width), picture=picture, **rules)
    return [(int(y), int(x)) for y, x in given]


def call_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """Run the unpatched call of a pipeline on copies of lists, because Z-Image's pipeline modifies a list of prompts."""
    copied = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return original_call(pipe)(pipe, **copied)


def check_call(pipe: Any) -> None:
    """Check that a pipeline can run the cascade.

    Raises:
        TypeError: It is not a text-to-image pipeline.
    """
    denoiser_of(pipe)
    if not hasattr(pipe, "vae_scale_factor") or not is_text_to_image(type(pipe)):
        raise TypeError(f"the cascade needs a text-to-image pipeline, got {type(pipe).__name__}")


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


def takes_size_conditioning(pipe: Any) -> bool:
    """Whether the pipeline conditions the model on a picture size, as SDXL's does."""
    return {"original_size", "target_size"} <= set(signature(original_call(pipe)).parameters)
