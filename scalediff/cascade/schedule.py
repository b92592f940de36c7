"""The guided scheduler: a copy of a pipeline's scheduler that starts at the restart point and applies structure guidance at every step.

Every scheduler represents its sample as `x = a x0 + s eps`. Structure guidance changes the predicted x0. Because this is linear, it can be
applied to the model output, which keeps the history of multi-step schedulers consistent.

Legend: B batch, C channels, Y x X latent grid; abar = a^2 / (a^2 + s^2).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.pictures import upsampled
from scalediff.families.packing import Form, as_picture, from_picture
from scalediff_kernels import GuidedStep, NoiseLevel
from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.steps.geometry import Prediction, x0_weights

# Called after a model call with its number, from 0, and a function that computes the predicted clean sample.
Watch = Callable[[int, Callable[[], Tensor]], None]
# Replaces the predicted clean sample of a model call: number of the call, from 0, noise level, sample, prediction -> prediction.
Change = Callable[[int, NoiseLevel, Tensor, Tensor], Tensor]

# How a scheduler scales its sample: a^2 + s^2 = 1 ("variance preserving"), a = 1 ("noise added"), or a + s = 1 ("flow").
_PRESERVING = {
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "LCMScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
_ADDED = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"}
_FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}
# Flows too, by their option use_flow_sigmas. DEIS has it as well, but its last step ends where it began, with noise.
_FLOW_SIGMAS = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
_PREDICTIONS = {"epsilon", "v_prediction", "sample"}


@dataclass(frozen=True)
class Guidance:
    """Structure guidance of one stage.

    Attributes:
        reference: Latents `[B, C, Y, X]` to guide to; None turns guidance off.
        cutoff: Kept fraction of the Nyquist frequency at the last step.
        start: Kept fraction at the first step; the same as `cutoff` when None.
        kind: The low-pass filter.
        trajectory: Latents `[B, C, y, x]` of any size for each model call of the stage, which replace the reference.
        form: Form of the latents that the scheduler receives.
        patch: Latents per token along an axis.
        wrap: Whether the latents continue on the other side, per axis `(Y, X)`.
    """

    reference: Tensor | None
    cutoff: float
    start: float | None = None
    kind: Kind = "resize"
    trajectory: Sequence[Tensor] | None = None
    form: Form = "grid"
    patch: int = 2
    wrap: tuple[bool, bool] = (False, False)

    @property
    def changes(self) -> bool:
        """Whether guidance differs from one model call to the next."""
        return self.start is not None or self.trajectory is not None

    def step(self, call: int, calls: int, prediction: Prediction) -> GuidedStep:
        """The guided step of one model call, from 0, of the stage's `calls`."""
        assert self.reference is not None
        cutoff, reference = self.cutoff, self.reference
        if self.start is not None and calls > 1:
            cutoff = self.start + (self.cutoff - self.start) * call / (calls - 1)
        if self.trajectory is not None:
            reference = upsampled(self.trajectory[call].to(reference), reference.shape[-2:], wrap=self.wrap)
        return GuidedStep(reference, cutoff=cutoff, prediction=prediction, kind=self.kind, wrap=self.wrap)


def guided_scheduler(
    scheduler: Any,
    *,
    steps: int,
    last_steps: int,
    guidance: Guidance,
    base_schedule_arguments: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    change: Change | None = None,
) -> Any:
    """A copy of a diffusers scheduler that runs the last steps of a schedule with structure guidance.

    Its class is a subclass of the scheduler's class, because pipelines check types and signatures.

    Args:
        scheduler: The pipeline's scheduler; not changed.
        steps: Number of steps of the whole schedule.
        last_steps: Number of steps to run, at the end of the schedule. The pipeline must ask for this number.
        guidance: Structure guidance of the stage.
        base_schedule_arguments: Arguments of `set_timesteps` in the base stage, from a `recording_scheduler`. They give every stage the
            schedule of the base stage, even if the pipeline shifts the schedule by picture size. When None, the arguments of the
            pipeline are used with `steps` steps.
        watch: Called after every model call.
        change: Replaces the predicted clean sample of every model call, by another method than structure guidance. It is called in fp32,
            and with packed latents if the scheduler's are.

    Raises:
        NotImplementedError: The scheduler or its prediction type is not supported.

    ScaleDiff, arXiv:2510.25818: gamma_t = (1 - abar_t) / (1 - abar_restart); gamma_t = sigma_t of a flow.
    """
    check_scheduler(scheduler)
    cls, reference = type(scheduler), guidance.reference
    flow = _is_flow(scheduler)
    constant = guidance.step(0, 1, _prediction(scheduler)) if reference is not None and not guidance.changes else None

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(_parameters(cls), args, strict=False)) | kwargs
        _set_last_timesteps(
            self, functools.partial(cls.set_timesteps, self), named, base_schedule_arguments, steps=steps, last_steps=last_steps
        )

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        done, level, restart = self.calls_done, self.levels[self.calls_done], self.levels[0]
        self.calls_done += 1
        if reference is not None:
            gamma = level.noise if flow else (1 - level.alpha_bar) / (1 - restart.alpha_bar)
            guide = constant or guidance.step(done, len(self.levels), _prediction(self))
            model_output = _guided(guide, guidance, sample, model_output, level, gamma)
        if change is not None:
            model_output = _changed(change, self, done, sample, model_output)
        if watch is not None:
            watch(done, functools.partial(_denoised, self, level, sample, model_output))
        result = cls.step(self, model_output, timestep, sample, *args, **kwargs)
        if isinstance(result, tuple) and len(self.levels) == 1:  # PixArt-Alpha takes x0, the second, of a single step, which ends there
            return result[0], result[0]
        return result

    guided = copy.deepcopy(scheduler)
    guided.__dict__.pop("init_noise_sigma", None)
    guided.__class__ = _subclass(cls, {"set_timesteps": set_timesteps, "step": step, "init_noise_sigma": 1.0})
    return guided


def _subclass(cls: type, members: Mapping[str, Any]) -> type:
    """A subclass of a scheduler's class with its name. Bria's pipeline asks a subclass for the scaling that a flow does not have."""
    unscaled = {} if hasattr(cls, "scale_model_input") else {"scale_model_input": lambda self, sample, timestep=None: sample}
    return type(cls.__name__, (cls,), {**members, **unscaled, "__module__": cls.__module__})


def check_scheduler(scheduler: Any) -> None:
    """Check that structure guidance supports a scheduler.

    Raises:
        NotImplementedError: The scheduler or its prediction type is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in _PRESERVING | _ADDED | _FLOW:
        known = ", ".join(sorted(_PRESERVING | _ADDED | _FLOW))
        raise NotImplementedError(f"high-resolution stages support the schedulers {known}, got {name}")
    if name in _FLOW:
        for option in ("stochastic_sampling", "invert_sigmas"):
            if config.get(option, False):
                raise NotImplementedError(f"structure guidance supports {name} without {option}, got {option}={config[option]}")
        return
    prediction = config.get("prediction_type")
    if name in _FLOW_SIGMAS and _is_flow(scheduler):
        return
    if name == "PNDMScheduler" and not config.skip_prk_steps:
        raise NotImplementedError(f"structure guidance supports {name} without Runge-Kutta steps, got skip_prk_steps=False")
    known_predictions = _PREDICTIONS - ({"sample"} if name in _ADDED or name == "PNDMScheduler" else set())
    if prediction not in known_predictions or config.get("use_flow_sigmas", False):
        raise NotImplementedError(f"structure guidance supports {', '.join(sorted(known_predictions))} with {name}, got {prediction=}")


def check_steps(scheduler: Any, steps: int) -> None:
    """Check that a schedule has a timestep for each of its steps. Above that some schedulers raise, and others repeat timesteps.

    Raises:
        ValueError: The model has fewer timesteps than `steps`, or LCM's own schedule has. A flow has one for any number of steps.
    """
    if _is_flow(scheduler):
        return
    most = min(scheduler.config.num_train_timesteps, scheduler.config.get("original_inference_steps", math.inf))
    if steps > most:
        raise ValueError(f"steps must be at most {most}, the number of timesteps of this {type(scheduler).__name__}, got {steps=}")


def _guided(guide: GuidedStep, guidance: Guidance, sample: Tensor, output: Tensor, level: NoiseLevel, gamma: float) -> Tensor:
    """The guided model output, in the form of the steps."""
    assert guidance.reference is not None
    form, patch, (height, width) = guidance.form, guidance.patch, guidance.reference.shape[-2:]
    x, model_output = (as_picture(one, form, (height, width), patch) for one in (sample, output))
    return from_picture(guide(x, model_output, level=level, gamma=gamma), form)


def repeats_first_step(scheduler: Any) -> bool:
    """Whether a schedule begins with two model calls for its first step, as that of PNDM does, whose other steps have one."""
    return type(scheduler).__name__ == "PNDMScheduler"


def first_calls(scheduler: Any, steps: int) -> int:
    """Number of model calls in the first steps of a schedule that has more."""
    return int(scheduler.order) * steps + (repeats_first_step(scheduler) and steps > 0)


def model_calls(scheduler: Any, steps: int) -> int:
    """Number of model calls of a schedule. A solver of order two makes two in each step except the last."""
    return first_calls(scheduler, steps - 1) + 1


def schedule_length(arguments: Mapping[str, Any]) -> int | None:
    """Number of steps of a custom schedule, by the arguments `timesteps` or `sigmas`; None if there is none."""
    custom = [values for name in ("timesteps", "sigmas") if (values := arguments.get(name)) is not None]
    return len(custom[0]) if custom else None


def _changed(change: Change, scheduler: Any, call: int, sample: Tensor, output: Tensor) -> Tensor:
    """The model output whose prediction of the clean sample is that of `change`."""
    level = scheduler.levels[call]
    dtype = torch.promote_types(torch.promote_types(sample.dtype, output.dtype), torch.float32)
    of_x, of_output = x0_weights(level, _prediction(scheduler))
    x, exact = sample.to(dtype), output.to(dtype)
    return ((change(call, level, x, of_x * x + of_output * exact) - of_x * x) / of_output).to(output.dtype)


def _parameters(cls: type) -> Sequence[str]:
    return list(inspect.signature(cls.set_timesteps).parameters)[1:]  # type: ignore[attr-defined]


def recording_scheduler(scheduler: Any, *, watch: Watch | None = None, skipped: int = 0, runs: bool = True) -> Any:
    """A copy of a diffusers scheduler that records the arguments of its last `set_timesteps` in `.schedule_arguments`, by name.

    Args:
        scheduler: The pipeline's scheduler; not changed.
        watch: Called after every model call.
        skipped: Number of model calls at the start of the schedule that the pipeline does not make, because of a strength.
        runs: Whether it has timesteps; False makes the pipeline run no step.
    """
    cls = type(scheduler)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self.schedule_arguments = dict(zip(_parameters(cls), args, strict=False)) | kwargs
        self.calls_done = 0
        cls.set_timesteps(self, *args, **kwargs)
        if not runs:
            self.timesteps = self.timesteps[:0]

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        done = self.calls_done
        self.calls_done += 1
        if watch is not None:
            watch(done, lambda: _denoised(self, _level(self, skipped + done), sample, model_output))
        return cls.step(self, model_output, timestep, sample, *args, **kwargs)

    recording = copy.deepcopy(scheduler)
    recording.__class__ = _subclass(cls, {"set_timesteps": set_timesteps, "step": step})
    return recording


def _is_flow(scheduler: Any) -> bool:
    name, config = type(scheduler).__name__, scheduler.config
    with_option = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    return name in _FLOW or (name in _FLOW_SIGMAS and with_option)


def _prediction(scheduler: Any) -> Prediction:
    return "flow_prediction" if _is_flow(scheduler) else scheduler.config.prediction_type


def _denoised(scheduler: Any, level: NoiseLevel, sample: Tensor, output: Tensor) -> Tensor:
    """The predicted clean sample, packed if the samples are."""
    of_x, of_output = x0_weights(level, _prediction(scheduler))
    return of_x * sample + of_output * output


def _set_last_timesteps(
    scheduler: Any,
    set_timesteps: Any,
    named: Mapping[str, Any],
    base_schedule_arguments: Mapping[str, Any] | None,
    *,
    steps: int,
    last_steps: int,
) -> None:
    """Set the whole schedule and drop all but its last steps; `.levels` then holds the noise level of each model call.

    With `last_steps=0` the pipeline asks for one step, because no pipeline can ask for none.

    A scheduler of order 2 (Heun) has two model calls per step except the last: at sigma_0, then at sigma_1, sigma_1, sigma_2, ...
    PNDM makes its first step twice, of the tail as of the whole schedule, because it has no history there: t_0, t_1, t_1, t_2, ... Other
    multi-step schedulers make it at first order.
    """
    count = schedule_length(named) or named.get("num_inference_steps")
    if count != max(last_steps, 1):
        raise ValueError(f"this stage runs {last_steps} of {steps} steps, got {count=}")
    if base_schedule_arguments is None:
        base_schedule_arguments = named if count == steps else {**named, "num_inference_steps": steps}
    set_timesteps(**{**base_schedule_arguments, "device": named.get("device")})
    order, times = scheduler.order, scheduler.timesteps
    if len(times) != model_calls(scheduler, steps):
        raise NotImplementedError(
            f"the scheduler must make {order} model calls in each step except the last, got {len(times)} for {steps=}"
        )
    dropped = order * (steps - last_steps)
    if repeats_first_step(scheduler):
        times = torch.cat([times[:1], times[2:]])[dropped:]
        scheduler.timesteps = torch.cat([times[:1], times[1:2], times[1:]])
    else:
        scheduler.timesteps = times[dropped:]
    if getattr(scheduler, "sigmas", None) is not None:
        scheduler.sigmas = scheduler.sigmas[dropped:]
    if hasattr(scheduler, "order_list"):  # single-step DPM-Solver: the order of each step
        scheduler.order_list = scheduler.order_list[dropped:]
    if type(scheduler).__name__ == "LCMScheduler":  # it adds noise after every step except the last, which it finds by this count
        scheduler.num_inference_steps = last_steps
    scheduler.levels = [_level(scheduler, i) for i in range(len(scheduler.timesteps))]
    scheduler.calls_done = 0


def _level(scheduler: Any, index: int) -> NoiseLevel:
    name = type(scheduler).__name__
    if getattr(scheduler, "sigmas", None) is not None:
        sigma = float(scheduler.sigmas[index])
        if _is_flow(scheduler):
            return NoiseLevel.of_flow(sigma)
        if name in _ADDED:
            return NoiseLevel.of_sigma(sigma)
        return NoiseLevel(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2))
    return NoiseLevel.of_alpha_bar(float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])]))
