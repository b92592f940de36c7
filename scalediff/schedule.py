"""The guided scheduler: a pipeline's own scheduler, started part of the way down and drawn to a reference at every step.

Every scheduler writes its sample as `x = a x0 + s eps`. Structure guidance moves the estimate x0; because all of it is linear, that is
a change of the model output, so multi-step schedulers keep a consistent history.

Legend: B batch, C channels, Y x X latent grid; abar = a^2 / (a^2 + s^2).
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scalediff_kernels import GuidedStep, NoiseLevel

# How a scheduler scales its sample: a^2 + s^2 = 1 ("variance preserving"), or a = 1 ("noise added").
_PRESERVING = {"DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
_ADDED = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"}
_PREDICTIONS = {"epsilon", "v_prediction", "sample"}


@dataclass(frozen=True)
class Guidance:
    """Structure guidance of one stage: `reference` is `[B, C, Y, X]`; None switches it off."""

    reference: Tensor | None
    cutoff: float


def guided_scheduler(scheduler: Any, *, steps: int, kept: int, guidance: Guidance) -> Any:
    """A copy of a diffusers scheduler that runs the last `kept` of `steps` steps with structure guidance.

    It is a subclass of the scheduler's own class, made here, so that pipelines which look at types and signatures see what
    they know. The pipeline asks it for `kept` steps; it lays out `steps` and starts at the restart point.

    Raises:
        NotImplementedError: a scheduler or prediction type whose sample scale is not known here.

    ScaleDiff, arXiv:2510.25818.4: gamma_t = (1 - abar_t) / (1 - abar_restart).
    """
    check_scheduler(scheduler)
    cls, reference = type(scheduler), guidance.reference
    guide = None
    if reference is not None:
        guide = GuidedStep(reference, cutoff=guidance.cutoff, prediction=scheduler.config.prediction_type)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        _lay_out(self, functools.partial(cls.set_timesteps, self), args, kwargs, steps=steps, kept=kept)

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        level, restart = self.levels[self.calls_done], self.levels[0]
        self.calls_done += 1
        if guide is not None:
            gamma = (1 - level.alpha_bar) / (1 - restart.alpha_bar)
            model_output = guide(sample, model_output, level=level, gamma=gamma)
        return cls.step(self, model_output, timestep, sample, *args, **kwargs)

    members = {"set_timesteps": set_timesteps, "step": step, "init_noise_sigma": 1.0, "__module__": cls.__module__}
    guided = copy.deepcopy(scheduler)
    guided.__dict__.pop("init_noise_sigma", None)
    guided.__class__ = type(cls.__name__, (cls,), members)
    return guided


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler before anything is drawn.

    Raises:
        NotImplementedError: a scheduler or prediction type whose sample scale is not known here.
    """
    name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name not in _PRESERVING | _ADDED:
        known = ", ".join(sorted(_PRESERVING | _ADDED))
        raise NotImplementedError(f"high-resolution stages know the schedulers {known}, got {name}")
    known_predictions = _PREDICTIONS - ({"sample"} if name in _ADDED else set())
    if prediction not in known_predictions or scheduler.config.get("use_flow_sigmas", False):
        raise NotImplementedError(f"structure guidance knows {', '.join(sorted(known_predictions))} with {name}, got {prediction=}")


def _lay_out(scheduler: Any, set_timesteps: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, steps: int, kept: int) -> None:
    """Set the whole schedule, then keep its tail; afterwards `.levels` holds the noise at each call of the model.

    A scheduler of order 2 (Heun) calls the model twice a step, but for the last: at sigma_0, then at sigma_1, sigma_1, sigma_2, ...
    """
    asked = args[0] if args else kwargs.pop("num_inference_steps", None)
    if asked != kept:
        raise ValueError(f"this stage runs {kept} of {steps} steps; custom timesteps are not supported above the native size, got {asked=}")
    set_timesteps(steps, *args[1:], **kwargs)
    order = scheduler.order
    if len(scheduler.timesteps) != order * (steps - 1) + 1:
        raise NotImplementedError(f"expected {order} model calls a step but for the last, got {len(scheduler.timesteps)} for {steps=}")
    scheduler.timesteps = scheduler.timesteps[order * (steps - kept) :]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas[order * (steps - kept) :]
    scheduler.levels = [_level(scheduler, i) for i in range(len(scheduler.timesteps))]
    scheduler.calls_done = 0


def _level(scheduler: Any, index: int) -> NoiseLevel:
    if hasattr(scheduler, "sigmas"):
        sigma = float(scheduler.sigmas[index])
        if type(scheduler).__name__ in _ADDED:
            return NoiseLevel.of_sigma(sigma)
        return NoiseLevel(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2))
    return NoiseLevel.of_alpha_bar(float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])]))
