"""The guided scheduler: a pipeline's own scheduler, started part of the way down and drawn to a reference at every step.

Every scheduler writes its sample as `x = a x0 + s eps`. Structure guidance moves the estimate x0; because all of it is linear, that is
a change of the model output, so multi-step schedulers keep a consistent history.

Legend: B batch, C channels, Y x X latent grid; abar = a^2 / (a^2 + s^2).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scalediff_kernels import GuidedStep, NoiseLevel, packed_view

# How a scheduler scales its sample: a^2 + s^2 = 1 ("variance preserving"), a = 1 ("noise added"), or a + s = 1 ("flow").
_PRESERVING = {
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "LCMScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
_ADDED = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
_PREDICTIONS = {"epsilon", "v_prediction", "sample"}


@dataclass(frozen=True)
class Guidance:
    """Structure guidance of one stage.

    Attributes:
        reference: `[B, C, Y, X]`; None switches it off.
        cutoff: Kept fraction of the Nyquist frequency.
        packed: The scheduler is handed packed latents `[B, Y X / 4, 4 C]`.
    """

    reference: Tensor | None
    cutoff: float
    packed: bool = False


def guided_scheduler(scheduler: Any, *, steps: int, kept: int, guidance: Guidance, asked: Mapping[str, Any] | None = None) -> Any:
    """A copy of a diffusers scheduler that runs the last `kept` of `steps` steps with structure guidance.

    It is a subclass of the scheduler's own class, made here, so that pipelines which look at types and signatures see what
    they know. The pipeline asks it for `kept` steps; it lays out `steps` and starts at the restart point. `asked` is what the base
    stage asked of `set_timesteps` (`recording_scheduler`): every stage has its schedule, also where the pipeline shifts it by size.
    Without it the pipeline's own arguments count, with another number of steps.

    Raises:
        NotImplementedError: a scheduler or prediction type whose sample scale is not known here.

    ScaleDiff, arXiv:2510.25818: gamma_t = (1 - abar_t) / (1 - abar_restart); gamma_t = sigma_t of a flow.
    """
    check_scheduler(scheduler)
    cls, reference = type(scheduler), guidance.reference
    flow = cls.__name__ in _FLOW
    guide = grid = None
    if reference is not None:
        grid = (reference.shape[2] // 2, reference.shape[3] // 2) if guidance.packed else None
        guide = GuidedStep(reference, cutoff=guidance.cutoff, prediction="flow_prediction" if flow else scheduler.config.prediction_type)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(_parameters(cls), args, strict=False)) | kwargs
        _lay_out(self, functools.partial(cls.set_timesteps, self), named, asked, steps=steps, kept=kept)

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        level, restart = self.levels[self.calls_done], self.levels[0]
        self.calls_done += 1
        if guide is not None:
            gamma = level.noise if flow else (1 - level.alpha_bar) / (1 - restart.alpha_bar)
            model_output = _guided(guide, sample, model_output, level, gamma, grid)
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
    name, config = type(scheduler).__name__, scheduler.config
    if name not in _PRESERVING | _ADDED | _FLOW:
        known = ", ".join(sorted(_PRESERVING | _ADDED | _FLOW))
        raise NotImplementedError(f"high-resolution stages know the schedulers {known}, got {name}")
    if name in _FLOW:
        for option in ("stochastic_sampling", "invert_sigmas"):
            if config.get(option, False):
                raise NotImplementedError(f"structure guidance knows {name} without {option}, got {option}={config[option]}")
        return
    prediction = config.get("prediction_type")
    known_predictions = _PREDICTIONS - ({"sample"} if name in _ADDED else set())
    if prediction not in known_predictions or config.get("use_flow_sigmas", False):
        raise NotImplementedError(f"structure guidance knows {', '.join(sorted(known_predictions))} with {name}, got {prediction=}")


def _guided(guide: GuidedStep, sample: Tensor, output: Tensor, level: NoiseLevel, gamma: float, grid: tuple[int, int] | None) -> Tensor:
    if grid is None:
        return guide(sample, output, level=level, gamma=gamma)
    guided = guide(packed_view(sample, grid=grid), packed_view(output, grid=grid), level=level, gamma=gamma)
    return guided.permute(0, 2, 4, 1, 3, 5).reshape(output.shape)  # tokens again: [B, y, x, C, 2, 2]


def _parameters(cls: type) -> Sequence[str]:
    return list(inspect.signature(cls.set_timesteps).parameters)[1:]  # type: ignore[attr-defined]


def recording_scheduler(scheduler: Any, *, runs: bool = True) -> Any:
    """A copy of a diffusers scheduler whose `.asked` holds, by name, the arguments that `set_timesteps` was last called with.

    One that does not run has no timesteps.
    """
    cls = type(scheduler)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self.asked = dict(zip(_parameters(cls), args, strict=False)) | kwargs
        cls.set_timesteps(self, *args, **kwargs)
        if not runs:
            self.timesteps = self.timesteps[:0]

    recording = copy.deepcopy(scheduler)
    recording.__class__ = type(cls.__name__, (cls,), {"set_timesteps": set_timesteps, "__module__": cls.__module__})
    return recording


def _lay_out(
    scheduler: Any, set_timesteps: Any, named: Mapping[str, Any], asked: Mapping[str, Any] | None, *, steps: int, kept: int
) -> None:
    """Set the whole schedule, then keep its tail; afterwards `.levels` holds the noise at each call of the model. A tail of no steps
    is asked for as one of one step, for no pipeline asks for none.

    A scheduler of order 2 (Heun) calls the model twice a step, but for the last: at sigma_0, then at sigma_1, sigma_1, sigma_2, ...
    """
    count = len(named["sigmas"]) if named.get("sigmas") is not None else named.get("num_inference_steps")
    if count != max(kept, 1) or named.get("timesteps") is not None:
        raise ValueError(f"this stage runs {kept} of {steps} steps; custom timesteps are not supported above the native size, got {count=}")
    if asked is None:
        asked = named if count == steps else {**named, "num_inference_steps": steps}
    set_timesteps(**{**asked, "device": named.get("device")})
    order = scheduler.order
    if len(scheduler.timesteps) != order * (steps - 1) + 1:
        raise NotImplementedError(f"expected {order} model calls a step but for the last, got {len(scheduler.timesteps)} for {steps=}")
    dropped = order * (steps - kept)
    scheduler.timesteps = scheduler.timesteps[dropped:]
    if getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = scheduler.sigmas[dropped:]
    if hasattr(scheduler, "order_list"):  # of the single-step DPM-Solver: the order of every step
        scheduler.order_list = scheduler.order_list[dropped:]
    if type(scheduler).__name__ == "LCMScheduler":  # it draws noise after every step but the last, which it counts
        scheduler.num_inference_steps = kept
    scheduler.levels = [_level(scheduler, i) for i in range(len(scheduler.timesteps))]
    scheduler.calls_done = 0


def _level(scheduler: Any, index: int) -> NoiseLevel:
    name = type(scheduler).__name__
    if getattr(scheduler, "sigmas", None) is not None:
        sigma = float(scheduler.sigmas[index])
        if name in _FLOW:
            return NoiseLevel.of_flow(sigma)
        if name in _ADDED:
            return NoiseLevel.of_sigma(sigma)
        return NoiseLevel(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2))
    return NoiseLevel.of_alpha_bar(float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])]))
