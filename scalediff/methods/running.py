"""What the methods share in running a pipeline's own call: its denoiser answered for, its scheduler checked, its state given back."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from scalediff.cascade.borrowing import intercept_denoiser, kept, tiled
from scalediff.cascade.generators import fresh_generator
from scalediff.cascade.latents import decode, to_pil_images, unpack
from scalediff.cascade.memory import images_per_call, needs_tiling, out_of_memory
from scalediff.cascade.pipeline import call_pipeline, cascade_of
from scalediff.cascade.stage import Stage
from scalediff.families.grid import Grid
from scalediff.methods.views import INPUTS, Denoise, Inputs
from scalediff.patching.networks import denoiser_of, handle_of, original_call
from scalediff.settings import Settings


def inputs_of(pipe: Any, method: str) -> Inputs:
    """How the arguments of this pipeline's denoiser are cut.

    Raises:
        NotImplementedError: it is not known.
    """
    for cls in type(denoiser_of(pipe)).__mro__:
        if cls.__name__ in INPUTS:
            return INPUTS[cls.__name__]
    raise NotImplementedError(f"{method} cuts views for {', '.join(sorted(INPUTS))}, got {type(denoiser_of(pipe)).__name__}")


def check_linear(pipe: Any, arguments: Mapping[str, Any], schedulers: Collection[str], method: str) -> None:
    """Refuse where averaging model outputs is not averaging what the scheduler would step to from each of them.

    Raises:
        NotImplementedError: the scheduler draws noise, clips its samples or is not among `schedulers`; guidance is rescaled.
    """
    name, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    why = f"{method} averages model outputs, which equals averaging steps where a step is linear and draws no noise"
    if name not in schedulers:
        raise NotImplementedError(f"{why}: in {', '.join(sorted(schedulers))}, got {name}")
    for option in ("stochastic_sampling", "clip_sample", "thresholding"):
        if config.get(option, False):
            raise NotImplementedError(f"{why}: in {name} without {option}, got {option}={config[option]}")
    if "sde" in str(config.get("algorithm_type", "")):
        raise NotImplementedError(f"{why}: in {name} without noise, got algorithm_type={config['algorithm_type']!r}")
    parameters = inspect.signature(original_call(pipe)).parameters
    for option in ("eta", "guidance_rescale", "cfg_normalization"):
        value = arguments.get(option, parameters[option].default if option in parameters else None)
        if value:
            raise NotImplementedError(f"{why}: call the pipeline with {option}={type(value)()}, got {option}={value}")


def complete(pipe: Any, arguments: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The arguments of the pipeline's call, with the settings and a generator where they name none."""
    guidance = cascade_of(pipe).guidance
    found = {guidance: settings.guidance_scale, "num_inference_steps": settings.steps, **arguments}
    return found | {"generator": found.get("generator") or fresh_generator()}


@contextmanager
def borrowed(pipe: Any) -> Iterator[None]:
    """Give the pipeline back as it was; inside, a patched one has its own attention."""
    handle = handle_of(pipe)
    attention = handle.attention if handle is not None else "full"
    with kept(pipe):
        try:
            if handle is not None:
                handle.attention = "full"
            yield
        finally:
            if handle is not None:
                handle.attention = attention


@contextmanager
def replace_denoiser(pipe: Any, compute: Callable[[Denoise], Tensor], *, size: Grid, view_batch: int, method: str) -> Iterator[None]:
    """Within, every call that the pipeline makes of its denoiser is answered by `compute`, `[B, C, Y, X]` from a `Denoise`.

    The denoiser gets a class with another call for that long, on top of whatever it is: patched, compiled, offloaded.

    Raises:
        NotImplementedError: as `inputs_of`, and `Denoise` in a call.
    """
    inputs, inner = inputs_of(pipe, method), denoiser_of(pipe)
    patch = cascade_of(pipe).patch
    parameters = list(inspect.signature(type(inner).forward).parameters)[1:]

    def respond(forward: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        given = dict(zip(parameters, args, strict=False)) | dict(named)
        denoise = Denoise(forward, given, inputs, size=size, patch=patch, view_batch=view_batch)
        return denoise.answer(compute(denoise))

    with intercept_denoiser(pipe, respond):
        yield


def generate_latents(pipe: Any, arguments: Mapping[str, Any], size: Grid) -> Tensor:
    """`[B, C, Y, X]` by the pipeline's own call, for a picture of a size in pixels."""
    changes = {"height": size[0], "width": size[1], "output_type": "latent", "return_dict": False}
    latents: Tensor = call_pipeline(pipe, {**arguments, **changes})[0]
    packed = cascade_of(pipe).packed
    return unpack(latents, latent_size(pipe, size)) if packed else latents


def latent_size(pipe: Any, size: Grid) -> Grid:
    """The latent grid of a picture of a size in pixels."""
    return size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor


def show_progress(pipe: Any, progress: bool | None, *, index: int, of: int, size: Grid) -> None:
    if progress is not None:
        pipe.set_progress_bar_config(desc=f"stage {index}/{of}  {size[0]} x {size[1]}", disable=not progress)


def finished(
    pipe: Any, arguments: Mapping[str, Any], latents: Tensor, size: Grid, settings: Settings, *, index: int, of: int, since: float
) -> Stage:
    """The stage with these latents, decoded, in tiles where it would not fit in one piece; `since` is when it began.

    Raises:
        torch.OutOfMemoryError: names the stage, and what would fit.
    """
    steps = arguments["num_inference_steps"]
    tiles = needs_tiling(pipe, size, images_per_call(arguments)) or None
    now = {"tiled": bool(tiles or getattr(pipe.vae, "use_tiling", False)), "split": False}
    with tiled(pipe.vae, on=tiles), out_of_memory(pipe, pipe.scheduler, arguments, size, f"stage {index} of {of}", **now):
        images = to_pil_images(pipe, decode(pipe, latents))
    seconds = time.perf_counter() - since
    return Stage(
        index=index, of=of, height=size[0], width=size[1], images=images, latents=latents, steps=steps, seconds=seconds, settings=settings
    )
