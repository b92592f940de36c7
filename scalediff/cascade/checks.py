"""The checks before a run of the cascade."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, get_args

import torch
from torch import Tensor

from scalediff.arguments import (
    Check,
    check_boolean,
    check_callable,
    check_mapping,
    check_positive,
    check_wrap,
    choice,
    instance,
    optional,
    shown,
    wrong_type,
)  # fmt: skip
from scalediff.cascade.changing import CHANGE_ARGUMENTS, check_strength
from scalediff.cascade.generators import Generators
from scalediff.cascade.latents import has_size
from scalediff.cascade.memory import images_per_call
from scalediff.cascade.pipeline import (
    Sizes,
    cascade_of,
    check_call,
    edits_picture,
    latent_size,
    native_size,
    pixels_per_latent,
    side_multiples,
    size_multiple,
    stage_arguments,
    takes_size_conditioning,
    wrap_of,
)  # fmt: skip
from scalediff.cascade.schedule import check_scheduler, check_steps, repeats_first_step, schedule_length
from scalediff.cascade.upsampling import check_upsampler
from scalediff.patching.circular import check_convolutions
from scalediff.patching.networks import changes_picture, denoiser_of, family_in_use, handle_of, original_call, padding_parts
from scalediff.settings import Attention, Preset, Settings
from scalediff_kernels.lowpass.geometry import Kind, coarse_length

# Arguments of the pipeline's call that generate and upscale have themselves, or that each stage sets.
_RESERVED = {"prompt", "negative_prompt", "height", "width", "generator", "num_inference_steps", "latents", "output_type", "return_dict"}


def _check_prompt(name: str, value: Any) -> None:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise wrong_type(name, "a string or a list of strings", value)
    if not isinstance(value, str) and not value:
        raise ValueError(f"{name} must be a string or a list of at least one, got {name}=[]")


def _check_generator(name: str, value: Any) -> None:
    if not all(isinstance(one, torch.Generator) for one in (value if isinstance(value, list) else [value])):
        raise wrong_type(name, "a torch.Generator or a list of them", value)


def _check_sizes(name: str, value: Any) -> None:
    """A sequence of pairs of integers; `check_sizes` in `scalediff.settings` checks what they are."""
    pairs = list(value) if isinstance(value, tuple | list) else [value]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise wrong_type(name, "a list of (height, width) in pixels", value)
    for pair in pairs:
        for side in pair:
            check_positive(f"every side in {name}", side)


# The arguments of generate and upscale whose type does not depend on the pipeline. Settings and RunOptions check theirs.
DRAWING_CHECKS: Mapping[str, Check] = {
    "prompt": optional(_check_prompt),
    "negative_prompt": optional(_check_prompt),
    "height": check_positive,
    "width": check_positive,
    "strength": optional(check_strength),
    "call": optional(check_mapping),
    "generator": optional(_check_generator),
    "preset": instance((str, Preset, Settings), "the name of a preset, a Preset or a Settings"),
    "sizes": optional(_check_sizes),
    "vae_tiling": optional(check_boolean),
    "vae_attention": choice(get_args(Attention)),
    "split_guidance": check_boolean,
    "upsampler": optional(check_upsampler),
    "workdir": optional(instance((str, PathLike), "a path")),
    "on_stage": optional(check_callable),
    "on_step": optional(check_callable),
    "progress": check_boolean,
    "wrap": optional(check_wrap),
    "force": check_boolean,
}


def check_inputs(
    pipe: Any,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    generator: Generators | None,
    call: Mapping[str, Any] | None,
    *,
    has_picture: bool = False,
) -> None:
    """Check that a pipeline can run the cascade with these inputs; `has_picture` says whether the run starts from a picture.

    Raises:
        ValueError: There is no prompt, the numbers of prompts, negative prompts and generators differ, or `call` has a name that it
            must not have.
        TypeError, NotImplementedError: As `check_call`.
    """
    check_call(pipe, has_picture=has_picture)
    given = {name: value for name, value in (call or {}).items() if value is not None}
    if edits_picture(pipe, given):
        raise ValueError(f"the cascade draws from text alone: call must not hold a picture for {type(pipe).__name__}, got image")
    embeds_negative = any(name.startswith("negative_prompt_embeds") for name in given)
    reserved = (_RESERVED | (CHANGE_ARGUMENTS if changes_picture(type(pipe)) else set())) & set(call or {})
    if embeds_negative and "negative_prompt" not in given:  # some pipelines have a default that must be None beside embeddings
        reserved -= {"negative_prompt"}
    if reserved:
        raise ValueError(
            f"call must not hold arguments of generate or upscale, or those that each stage sets, got {', '.join(sorted(reserved))}"
        )
    for name, value in (call or {}).items():
        if not _takes(pipe, name):
            raise ValueError(f"call must hold arguments of the call of {type(pipe).__name__}, got {shown(name, value)}")
    if "num_images_per_prompt" in given:
        check_positive("num_images_per_prompt", given["num_images_per_prompt"])
    if prompt is None and not any(name.startswith("prompt_embeds") for name in given):
        raise ValueError("prompt must be given, or its embeddings in call, got prompt=None")
    if isinstance(prompt, list) and isinstance(negative_prompt, list) and len(prompt) != len(negative_prompt):
        raise ValueError(f"negative_prompt must have one entry for each of the {len(prompt)} prompts, got {len(negative_prompt)}")
    check_generators(generator, images_per_call({"prompt": prompt, **given}))


def check_generators(generator: Generators | None, count: int) -> None:
    """Check that a list of generators has one for each of `count` pictures."""
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"generator must be one generator, or one for each of the {count} pictures, got a list of {len(generator)}")


def check_workdir(pipe: Any, workdir: Any, generator: Generators | None, mesh: Any) -> None:
    """Check that a run with a workdir has a generator, and that one whose pictures are split over ranks has one and no workdir."""
    handle = handle_of(pipe)
    split = mesh is not None or (handle is not None and bool(handle.groups))
    if split and (workdir is not None or generator is None):
        raise ValueError(f"mesh needs a generator in the same state on all ranks, and no workdir, got {generator=} and {workdir=}")
    if workdir is not None and generator is None:
        raise ValueError("workdir needs a generator, so that the same call can resume the run, got generator=None")


def _takes(pipe: Any, name: str) -> bool:
    """Whether the pipeline's call has an argument of this name."""
    parameters = inspect.signature(original_call(pipe)).parameters
    if name in parameters:
        return True
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return False
    # The pipelines of diffusers ignore further keywords, except these two of earlier versions; others may pass them on.
    return name in ("callback", "callback_steps") or not type(pipe).__module__.startswith("diffusers.")


def check_run(pipe: Any, arguments: Mapping[str, Any], sizes: Sizes, settings: Settings, *, restarts: int) -> None:
    """Raise the errors of the last `restarts` stages, those that restart from noise, before anything is computed."""
    _check_stage_arguments(pipe, arguments, sizes[-1])
    _check_wrap(pipe, sizes, wrap_of(pipe, settings))
    if restarts:
        check_scheduler(pipe.scheduler)
        if arguments.get("denoising_end") is not None:
            raise ValueError(f"stages above the native size run to the end, got denoising_end={arguments['denoising_end']}")
        custom = schedule_length(arguments)
        if custom not in (None, settings.steps):
            raise ValueError(f"steps must be the length of the custom timesteps or sigmas, {custom}, got steps={settings.steps}")
        if custom is None:
            check_steps(pipe.scheduler, settings.steps)
        control = arguments.get("control_image")
        if any(isinstance(one, Tensor) for one in (control if isinstance(control, list) else [control])):
            raise ValueError("control_image must be a PIL picture, because it is resized for each stage, got a tensor")
        _check_settings(pipe, settings, restarts, has_base=restarts < len(sizes))
    for number, (height, width) in enumerate(sizes[len(sizes) - restarts :], start=1):
        stage = settings.of_stage(number, restarts)
        for cutoff in (stage.lfm_cutoff, stage.sg_cutoff, stage.sg_cutoff_start):
            if isinstance(cutoff, float | int):
                _check_coarse_grid(pipe, (height, width), cutoff, stage.filter)
    latents, base = arguments.get("latents"), latent_size(pipe, sizes[0])
    form = cascade_of(pipe).input_form or cascade_of(pipe).form
    if latents is not None and not has_size(pipe, latents, base, form):
        raise ValueError(f"latents must have the size of the base stage, {base[0]} x {base[1]}, got {tuple(latents.shape)=}")


def _check_wrap(pipe: Any, sizes: Sizes, wrap: tuple[bool, bool]) -> None:
    """Check that the model and the sizes of all stages allow a picture that continues on the other side."""
    if not any(wrap):
        return
    family, name = family_in_use(denoiser_of(pipe)), type(denoiser_of(pipe)).__name__
    if family is None or not family.wraps:
        raise NotImplementedError(f"wrap is for models without positions, such as U-Nets: those of {name} end at the border, got {wrap=}")
    check_convolutions(padding_parts(pipe), wrap)
    check_ends(pipe, sizes, wrap)


def check_ends(pipe: Any, sizes: Sizes, wrap: tuple[bool, bool]) -> None:
    """Check that the two ends of a picture meet, at all these (height, width) in pixels, along axes that wrap.

    Raises:
        ValueError: A side that wraps has no whole tokens at some level of the model.
    """
    for size in sizes:
        for side, multiple, on in zip(size, side_multiples(pipe, wrap), wrap, strict=True):
            if on and side % multiple:
                raise ValueError(f"a side that wraps must be a multiple of {multiple} pixels in every stage, got {size[0]} x {size[1]}")


def _check_stage_arguments(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Check that the caller does not ask for another size, and that the model has positions for this one, in pixels."""
    for name, value in stage_arguments(pipe, size).items():
        given = arguments.get(name)
        if name not in ("height", "width") and given is not None and given != value:
            raise ValueError(f"the cascade calls {type(pipe).__name__} with {name}={value}, got {name}={given}")
    cascade, denoiser = cascade_of(pipe), denoiser_of(pipe)
    largest, pixels = cascade.largest_grid(denoiser), cascade.patch * pixels_per_latent(pipe)
    if largest is not None and (size[0] > largest[0] * pixels or size[1] > largest[1] * pixels):
        raise ValueError(
            f"{type(denoiser).__name__} has positions for at most {largest[0]} x {largest[1]} tokens, {largest[0] * pixels} x "
            f"{largest[1] * pixels} pixels, got {size[0]} x {size[1]}"
        )


def _check_coarse_grid(pipe: Any, size: tuple[int, int], cutoff: float, kind: Kind) -> None:
    """Check that the filter's coarse grid has at least one pixel. The size is named if it is to blame, and the cutoff otherwise."""
    factor = pixels_per_latent(pipe)
    length, native = min(size) // factor, min(native_size(pipe)) // factor
    if kind == "resize" and length < native and length * cutoff < 1 <= native * cutoff:
        least = math.ceil(math.ceil(1 / cutoff) * factor / size_multiple(pipe)) * size_multiple(pipe)
        raise ValueError(
            f"a stage of {size[0]} x {size[1]} is too narrow: the coarse grid of its low-pass filter has no pixel along the shorter side, "
            f"which must be at least {least} pixels in every stage above the base, got {min(size)}"
        )
    coarse_length(length, cutoff, kind)


def _check_settings(pipe: Any, settings: Settings, restarts: int, *, has_base: bool) -> None:
    if settings.anchor == "trajectory" and settings.sg and not has_base:
        raise ValueError("anchor='trajectory' needs a base stage, which upscale does not have")
    if settings.anchor == "trajectory" and settings.sg and repeats_first_step(pipe.scheduler):
        name = type(pipe.scheduler).__name__
        raise NotImplementedError(f"anchor='trajectory' needs stages with the last model calls of the base stage, got {name}")
    until = settings.guidance_until
    if min(until if isinstance(until, tuple) else (until,)) < 1 and not cascade_of(pipe).conditional:
        name = type(denoiser_of(pipe)).__name__
        raise NotImplementedError(f"guidance_until below 1 needs classifier-free guidance in one doubled batch, got {name}")
    if settings.size_conditioning != "target" and not takes_size_conditioning(pipe):
        raise ValueError(f"size_conditioning needs a pipeline with the arguments original_size and target_size, got {type(pipe).__name__}")
