"""A given picture inside a stage: where the stage starts, and what it keeps of the picture outside a mask.

    reference = picture outside the mask;  after each step, outside the mask, x = a picture + s noise

A pipeline that changes a picture adds noise to it itself, and an inpainting pipeline does so again after every step. Both ask the scheduler
to do it, which here adds the noise of the stage.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.latents import encode
from scalediff.cascade.pictures import mask_of_latents, picture_at
from scalediff.cascade.pipeline import cascade_of
from scalediff.cascade.upsampling import Upsampler, upsampled_picture
from scalediff.families.packing import arrange
from scalediff.patching.networks import changes_picture
from scalediff.patching.subclass import original_class


@dataclass(frozen=True)
class Given:
    """A picture that a run starts from, on any device.

    Attributes:
        picture: `[B, 3, height, width]` in [-1, 1].
        base: (height, width) of the base stage in pixels.
        mask: `[B, 1, height, width]` of any size: 1 where the picture may change, 0 where it is kept. All of it may change when None.
        strength: Share of the schedule that the base stage runs on the picture; None if the picture stands in place of the base stage.
    """

    picture: Tensor
    base: tuple[int, int]
    mask: Tensor | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Kept:
    """What a stage keeps of a picture.

    Attributes:
        latents: `[B, C, Y, X]` of the picture at the size of the stage.
        free: Boolean `[B, 1, Y, X]`: where the stage may change the picture.
    """

    latents: Tensor
    free: Tensor


def kept_of(
    pipe: Any, given: Given, size: tuple[int, int], upsampler: Upsampler | None = None, *, wrap: tuple[bool, bool] = (False, False)
) -> Kept | None:
    """What a stage of (height, width) pixels keeps of the given picture, which continues along axes that wrap; None without a mask."""
    if given.mask is None:
        return None
    picture, mask = given.picture.to(pipe._execution_device), given.mask.to(pipe._execution_device)
    larger = size[0] > picture.shape[-2] or size[1] > picture.shape[-1]
    latents = encode(pipe, upsampled_picture(picture, size, upsampler, wrap=wrap) if larger else picture_at(picture, size, wrap=wrap))
    return Kept(latents, mask_of_latents(mask, size, (latents.shape[-2], latents.shape[-1])))


def masked(kept: Kept | None, latents: Tensor) -> Tensor:
    """Latents `[B, C, Y, X]` inside the mask, and the picture's outside it."""
    return latents if kept is None else torch.where(kept.free, latents, kept.latents.to(latents))


def entering_scheduler(pipe: Any, scheduler: Any, *, start: Tensor, noise: Tensor, kept: Kept | None) -> Any:
    """A guided scheduler whose stage starts from `start`, and which keeps the picture outside the mask after every step.

    Args:
        pipe: The pipeline.
        scheduler: A scheduler that `guided_scheduler` made; its class is replaced.
        start: `[B, C, Y, X]`, the noised latents that the stage starts from.
        noise: `[B, C, Y, X]`, the noise in them.
        kept: What the stage keeps; None keeps nothing.
    """
    cls, cascade = type(scheduler), cascade_of(pipe)
    own = functools.partial(arrange, form=cascade.form, patch=cascade.patch)  # the form of the steps
    noise_of_steps = own(noise)
    picture = own(kept.latents) if kept is not None else None
    free = own(kept.free.expand_as(kept.latents)) if kept is not None else None

    def noised(self: Any, clean: Tensor) -> Tensor:
        """Clean latents, on the grid or in the form of the steps, at the noise level of the next model call."""
        if self.calls_done == len(self.levels):
            return clean
        level = self.levels[self.calls_done]
        fitting = noise_of_steps if noise_of_steps.shape == clean.shape else noise.reshape(clean.shape)
        return level.signal * clean + level.noise * fitting.to(clean)  # type: ignore[no-any-return]

    def with_noise(self: Any, clean: Tensor) -> Tensor:
        """What the pipeline gets: the start before the first step, in the form in which it asks, and the noised picture after a step."""
        return noised(self, clean) if self.calls_done else start.to(clean).reshape(clean.shape)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = cls.step(self, *args, **kwargs)
        if picture is None or free is None:
            return result
        x = torch.where(free, result[0], noised(self, picture.to(result[0])))
        if isinstance(result, tuple):
            return tuple(x if one is result[0] else one for one in result)
        return type(result)(**{**result, "prev_sample": x})

    return _subclassed(scheduler, step=step, **_noise_methods(cls, with_noise))


def resting_scheduler(scheduler: Any, latents: Tensor) -> Any:
    """A guided scheduler of one step that leaves the latents `[B, C, Y, X]` as they are, for a call that only decodes them."""
    cls = type(scheduler)

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (sample,)

    return _subclassed(scheduler, step=step, **_noise_methods(cls, lambda self, clean: latents.to(clean).reshape(clean.shape)))


class ScheduleSet(Exception):
    """Raised by a `stopping_scheduler`."""


def stopping_scheduler(scheduler: Any) -> Any:
    """A recording scheduler that raises `ScheduleSet` when its schedule is set: pipelines that change a picture need a step to run."""
    cls = type(scheduler)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.set_timesteps(self, *args, **kwargs)
        raise ScheduleSet

    return _subclassed(scheduler, set_timesteps=set_timesteps)


def _subclassed(scheduler: Any, **members: Any) -> Any:
    """The scheduler, with a subclass of its class that has these methods."""
    cls = type(scheduler)
    scheduler.__class__ = type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})
    return scheduler


def _noise_methods(cls: type, with_noise: Callable[[Any, Tensor], Tensor]) -> dict[str, Callable[..., Tensor]]:
    """The methods of a scheduler's class by which pipelines add noise to clean latents."""

    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return with_noise(self, original_samples)

    def scale_noise(self: Any, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        return with_noise(self, sample)

    return {method.__name__: method for method in (add_noise, scale_noise) if hasattr(cls, method.__name__)}


def start_arguments(pipe: Any, start: Tensor, packed: Tensor) -> dict[str, Any]:
    """The arguments of the pipeline's call by which it starts from these latents, once its scheduler is an `entering_scheduler`.

    Args:
        pipe: The pipeline.
        start: `[B, C, Y, X]`.
        packed: The same in the form of the pipeline's argument `latents`.
    """
    if not changes_picture(type(pipe)):
        return {"latents": packed}
    prepare: Any = getattr(original_class(type(pipe)), "prepare_latents", None)
    from_noise = prepare is not None and "is_strength_max" in inspect.signature(prepare).parameters
    # At full strength the inpainting pipelines of SD, SDXL and SD3 do not ask the scheduler, and take their `latents` as the start.
    return {"strength": 1.0, **({"latents": start} if from_noise else {})}


def strength_steps(pipe: Any, steps: int, strength: float | None) -> int:
    """Number of steps that the pipeline's call runs at a strength, by its own rule; all of them for None."""
    if strength is None:
        return steps
    scheduler = pipe.scheduler
    pipe.scheduler = copy.copy(scheduler)
    try:
        pipe.scheduler.timesteps = torch.arange(scheduler.order * steps)
        return len(pipe.get_timesteps(steps, strength, "cpu")[0]) // int(scheduler.order)
    finally:
        pipe.scheduler = scheduler
