"""What the cascade asks of a pipeline, and how it borrows one: everything is given back as it was found."""

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
    """The family of a denoiser, and what the cascade knows of it.

    Raises:
        ValueError: no such family, or one that only the hook knows.
    """
    family = family_of(denoiser)
    if family is None or family.cascade is None:
        known = ", ".join(sorted(name for name, one in FAMILIES.items() if one.cascade is not None))
        raise ValueError(f"the cascade knows pipelines around {known}, got {type(denoiser).__name__}")
    return family, family.cascade


def cascade_of(pipe: Any) -> Cascade:
    return family_with_cascade(denoiser_of(pipe))[1]


def named_preset(pipe: Any, name: str) -> Preset:
    """One of the family's presets for this pipeline.

    Raises:
        ValueError: the family has none of that name, or the pipeline's scheduler is not what the preset is for.
    """
    presets = cascade_of(pipe).presets(denoiser_of(pipe))
    if name not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)} for this {type(denoiser_of(pipe)).__name__}, got {name!r}")
    wanted, spacing = presets[name].spacing, pipe.scheduler.config.get("timestep_spacing")
    if wanted and spacing != wanted:
        raise ValueError(
            f"preset {name!r} is for a scheduler with timestep_spacing={wanted!r}, got {type(pipe.scheduler).__name__} {spacing=}"
        )
    return presets[name]


def preset(pipe: Any, name: str = "default") -> Settings:
    """The settings of one of the family's presets; raises as `named_preset`."""
    return named_preset(pipe, name).settings


def native_size(pipe: Any) -> tuple[int, int]:
    """Pixels (height, width) that the model was trained at; of a patched one, those of its window."""
    denoiser, handle = denoiser_of(pipe), handle_of(pipe)
    family, cascade = family_with_cascade(denoiser)
    y, x = handle.window if handle is not None else family.native_grid(denoiser) or (0, 0)
    return y * cascade.patch * pipe.vae_scale_factor, x * cascade.patch * pipe.vae_scale_factor


def stage_sizes(
    pipe: Any, height: int, width: int, given: Sizes | None = None, *, picture: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """The sizes of all stages up to a target, in pixels, or a caller's own after a look at them.

    With the size of a picture that stands for the base stage, a caller's own begin above it.

    Raises:
        ValueError: as `plan_sizes` and `check_sizes`.
    """
    cascade = cascade_of(pipe)
    rules: dict[str, Any] = {"native": native_size(pipe), "multiple": max(cascade.size_multiple, cascade.patch * pipe.vae_scale_factor)}
    if given is None:
        return plan_sizes((height, width), **rules)
    check_sizes(given, (height, width), picture=picture, **rules)
    return [(int(y), int(x)) for y, x in given]


def call_pipeline(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """The pipeline's own call, with lists of its own: Z-Image's writes its chat template into a list of prompts."""
    copied = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    return original_call(pipe)(pipe, **copied)


def check_call(pipe: Any) -> None:
    """Raises TypeError: not a text-to-image pipeline."""
    denoiser_of(pipe)
    if not hasattr(pipe, "vae_scale_factor") or not is_text_to_image(type(pipe)):
        raise TypeError(f"the cascade needs a text-to-image pipeline, got {type(pipe).__name__}")


def check_run(pipe: Any, arguments: Mapping[str, Any], sizes: Sizes, settings: Settings, *, restarts: int) -> None:
    """Refuse before anything is drawn what one of the last `restarts` stages would refuse."""
    factor, cascade = pipe.vae_scale_factor, cascade_of(pipe)
    if restarts:
        check_scheduler(pipe.scheduler)
        for name in ("timesteps", "sigmas", "denoising_end"):
            if arguments.get(name) is not None:
                raise ValueError(f"stages above the native size lay out their own schedule, got {name}={arguments[name]}")
        control = arguments.get("control_image")
        if any(isinstance(one, Tensor) for one in (control if isinstance(control, list) else [control])):
            raise ValueError("control_image must be a PIL picture, which is fitted to each stage, got a tensor")
        _check_settings(pipe, settings, restarts, has_base=restarts < len(sizes))
    for number, (height, width) in enumerate(sizes[len(sizes) - restarts :], start=1):
        stage = settings.of_stage(number, restarts)
        for cutoff in (stage.lfm_cutoff, stage.sg_cutoff, stage.sg_cutoff_start):
            if isinstance(cutoff, float | int):
                coarse_length(min(height, width) // factor, cutoff, stage.filter)
    latents, base = arguments.get("latents"), (sizes[0][0] // factor, sizes[0][1] // factor)
    if latents is not None and (latents.shape[1] != base[0] * base[1] // 4 if cascade.packed else tuple(latents.shape[-2:]) != base):
        raise ValueError(f"latents are those of the base stage, {base[0]} x {base[1]}, got {tuple(latents.shape)=}")


def _check_settings(pipe: Any, settings: Settings, restarts: int, *, has_base: bool) -> None:
    if settings.anchor == "trajectory" and settings.sg and not has_base:
        raise ValueError("anchor='trajectory' is what the base stage took for the picture: a given picture has none")
    until = settings.guidance_until
    if min(until if isinstance(until, tuple) else (until,)) < 1 and not cascade_of(pipe).conditional:
        name = type(denoiser_of(pipe)).__name__
        raise NotImplementedError(f"guidance_until below 1 is for models that are guided in one doubled batch, got {name}")
    if settings.size_conditioning != "target" and not takes_size_conditioning(pipe):
        raise ValueError(f"size_conditioning is for pipelines that tell a size to the model, got {type(pipe).__name__}")


def takes_size_conditioning(pipe: Any) -> bool:
    return {"original_size", "target_size"} <= set(signature(original_call(pipe)).parameters)
