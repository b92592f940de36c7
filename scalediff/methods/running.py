"""What the methods share: checks, restoring the pipeline, and replacing the output of its denoiser."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from scalediff.cascade.borrowing import intercept_denoiser, is_tiled, restored_pipeline, tiled
from scalediff.cascade.generators import fresh_generator
from scalediff.cascade.latents import decode_finite, to_pil_images, unpacked
from scalediff.cascade.memory import images_per_call, joined_sizes, needs_tiling, out_of_memory
from scalediff.cascade.pipeline import call_stage, cascade_of, guidance_argument, takes_size_conditioning
from scalediff.cascade.progress import show_pipeline_bar
from scalediff.cascade.results import Stage
from scalediff.families.grid import Grid
from scalediff.methods.views import INPUTS, Denoise, Inputs
from scalediff.patching.networks import denoiser_of, handle_of, original_call
from scalediff.settings import Settings


def inputs_of(pipe: Any, method: str) -> Inputs:
    """How the arguments of this pipeline's denoiser are cut into views.

    Raises:
        NotImplementedError: The denoiser is not supported.
    """
    for cls in type(denoiser_of(pipe)).__mro__:
        if cls.__name__ in INPUTS:
            return INPUTS[cls.__name__]
    raise NotImplementedError(f"{method} supports {', '.join(sorted(INPUTS))}, got {type(denoiser_of(pipe)).__name__}")


def check_linear(pipe: Any, arguments: Mapping[str, Any], schedulers: Collection[str], method: str) -> None:
    """Check that averaging model outputs equals averaging the samples that the scheduler would compute from each of them.

    Raises:
        NotImplementedError: The scheduler adds noise, clips its samples or is not among `schedulers`, or guidance is rescaled.
    """
    name, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    why = f"{method} needs a scheduler whose step is linear and adds no noise"
    if name not in schedulers:
        raise NotImplementedError(f"{why}: one of {', '.join(sorted(schedulers))}, got {name}")
    for option in ("stochastic_sampling", "clip_sample", "thresholding"):
        if config.get(option, False):
            raise NotImplementedError(f"{why}: {name} without {option}, got {option}={config[option]}")
    if "sde" in str(config.get("algorithm_type", "")):
        raise NotImplementedError(f"{why}: {name} without an sde algorithm, got algorithm_type={config['algorithm_type']!r}")
    parameters = inspect.signature(original_call(pipe)).parameters
    for option in ("eta", "guidance_rescale", "cfg_normalization"):
        value = arguments.get(option, parameters[option].default if option in parameters else None)
        if value:
            raise NotImplementedError(f"{why}: call the pipeline with {option}={type(value)()}, got {option}={value}")


def check_own_schedule(arguments: Mapping[str, Any]) -> None:
    """Check that the call has no custom schedule, for methods that start in the middle of one.

    Raises:
        ValueError: It has one.
    """
    for name in ("timesteps", "sigmas", "denoising_end"):
        if arguments.get(name) is not None:
            raise ValueError(f"phases set their own schedule, got {name}={arguments[name]}")


def complete_arguments(pipe: Any, arguments: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Add steps, guidance and a generator to the arguments of the pipeline's call that lack them."""
    found = {**guidance_argument(pipe, settings.guidance_scale), "num_inference_steps": settings.steps, **arguments}
    return found | {"generator": found.get("generator") or fresh_generator()}


@contextmanager
def with_full_attention(pipe: Any) -> Iterator[None]:
    """Run a pipeline with the model's full attention, and restore it on exit."""
    handle = handle_of(pipe)
    attention = handle.attention if handle is not None else "full"
    with restored_pipeline(pipe):
        try:
            if handle is not None:
                handle.attention = "full"
            yield
        finally:
            if handle is not None:
                handle.attention = attention


@contextmanager
def replace_denoiser(pipe: Any, compute: Callable[[Denoise], Tensor], *, size: Grid, view_batch: int, method: str) -> Iterator[None]:
    """Replace the output of every denoiser call by `compute(Denoise)`, `[B, C, Y, X]`.

    Args:
        pipe: The pipeline. Its denoiser may be patched, compiled or offloaded.
        compute: Function that computes the output for the whole picture from a `Denoise`.
        size: Latent grid `(Y, X)` of the picture.
        view_batch: Number of views in one forward pass.
        method: Name of the method, for messages.

    Raises:
        NotImplementedError: The denoiser is not supported, or, in a call, one of its arguments.
    """
    inputs, inner = inputs_of(pipe, method), denoiser_of(pipe)
    patch = cascade_of(pipe).patch
    parameters = list(inspect.signature(type(inner).forward).parameters)[1:]

    def compute_output(forward: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        given = dict(zip(parameters, args, strict=False)) | dict(named)
        denoise = Denoise(forward, given, inputs, size=size, patch=patch, view_batch=view_batch)
        return denoise.as_output(compute(denoise))

    with intercept_denoiser(pipe, compute_output):
        yield


def generate_latents(pipe: Any, arguments: Mapping[str, Any], size: Grid) -> Tensor:
    """Latents `[B, C, Y, X]` from a call of the pipeline, for a picture of (height, width) pixels."""
    latents: Tensor = call_stage(pipe, size, {**arguments, "output_type": "latent", "return_dict": False})[0]
    return unpacked(pipe, latents, size)


def size_conditioning(pipe: Any, arguments: Mapping[str, Any], size: Grid) -> dict[str, Grid]:
    """The arguments that make SDXL's size conditioning (height, width) = `size` in a call of any size, unless the caller gave them.

    Empty for pipelines without size conditioning.
    """
    names = ("original_size", "target_size") if takes_size_conditioning(pipe) else ()
    return {name: size for name in names if arguments.get(name) is None}


def show_progress(pipe: Any, progress: bool | None, *, index: int, of: int, size: Grid) -> None:
    """Show the progress of a stage, or hide it; None leaves the pipeline's bar unchanged."""
    if progress is not None:
        show_pipeline_bar(pipe, f"stage {index}/{of}  {size[0]} x {size[1]}", show=progress)


def finished(
    pipe: Any,
    arguments: Mapping[str, Any],
    latents: Tensor,
    size: Grid,
    settings: Settings,
    *,
    index: int,
    of: int,
    since: float,
    decoded: Tensor | None = None,
) -> Stage:
    """Make the `Stage` of latents, decoded here unless `decoded` has their pictures. `since` is the time at which the stage started.

    Raises:
        ValueError: The latents have values that are not finite.
        torch.OutOfMemoryError: The device ran out of memory. The message names the stage and what would fit.
    """
    steps = arguments["num_inference_steps"]
    if decoded is None:
        with in_tiles_if_needed(pipe, arguments, size, f"stage {index} of {of}"):
            decoded = decode_finite(pipe, latents)
    images = to_pil_images(pipe, decoded)
    seconds = time.perf_counter() - since
    return Stage(
        index=index, of=of, height=size[0], width=size[1], images=images, latents=latents, steps=steps, seconds=seconds, settings=settings
    )


@contextmanager
def in_tiles_if_needed(pipe: Any, arguments: Mapping[str, Any], size: Grid, stage: str) -> Iterator[None]:
    """Run the autoencoder in parts if a picture of (height, width) pixels would not fit, and explain out-of-memory errors."""
    images = images_per_call(arguments)
    tiles = needs_tiling(pipe, size, images) or None
    joined = joined_sizes(pipe, size, images) if tiles else 1
    used = {"tiled": bool(tiles) or is_tiled(pipe.vae), "split": False}
    with tiled(pipe.vae, on=tiles, joined=joined), out_of_memory(pipe, pipe.scheduler, arguments, size, stage, **used):
        yield
