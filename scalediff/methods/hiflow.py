"""HiFlow, arXiv:2504.06232: stages of a flow model that follow the trajectory of the stage before, step by step.

    for each stage above the base, at every step i of n, with the x0 that the stage before predicted at that timestep as x0_ref:
        x0 <- x0 + a_i LP(bicubic(x0_ref) - x0)                     direction
        v = (x - x0) / sigma,  v_ref = (x - x0_ref) / sigma
        v <- v + b_i (v_prev + v_ref - v_ref_prev - v)              acceleration, from the second step on
    a_i = alpha (n - i) / n,  b_i = beta (n - i) / n

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalediff.arguments import check_boolean, check_callable, check_number, optional
from scalediff.cascade.latents import unpacked
from scalediff.cascade.pictures import upsampled
from scalediff.cascade.pipeline import cascade_of, latent_size, native_size, pixels_per_latent, stage_sizes
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import Change
from scalediff.cascade.stage import encode_finite
from scalediff.cascade.upsampling import Upsampler, upsampled_picture
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.flux_extrapolation import Extrapolation, is_flux
from scalediff.methods.frequencies import butterworth, drawn_stds, sharpened
from scalediff.methods.restarts import Restarts, tail_steps
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings

PerStage = float | tuple[float, ...]

_GUIDANCE = (4.5, 6.0)  # of the stages above the base, for FLUX.1-dev
_ROPE_SCALE = 10.0


@dataclass(frozen=True)
class HiFlow:
    """Options of HiFlow, with the defaults of its authors' pipeline for FLUX.1-dev.

    Where a tuple has a number for each stage above the base, its last number counts for all further stages too.

    Attributes:
        restart: Share of the steps that a stage runs: the last 16 of 30, then the last 10.
        alpha: Weight of the direction at a stage's first step.
        beta: Weight of the acceleration at a stage's first step.
        cutoff: Cutoff of the low-pass filter as a fraction of the Nyquist frequency.
        sharpness: Weight of the difference between the picture and its blur that sharpens it; 0 turns sharpening off.
        guidance_scale: Guidance scale of a stage. None means 4.5 and then 6 for FLUX.1-dev, as published, and the run's own for others.
        rope_scale: Factor of the base of FLUX.1's rotary positions. None means 10, as published, and no change for other models.
        proportional: Sharpen FLUX.1's attention for the longer sequence. None means on, as published, and off for other models.
        shift_patches: Move FLUX.1's token grid by one latent in every other step. None means on, as published, and off for others.
        dynamic_shifting: Shift the schedule by the size of the base, as FLUX.1's pipeline does. The authors turn this off.
        upsampler: Function that enlarges the picture, as in `generate`; None is bicubic interpolation, as published.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    restart: PerStage = (16 / 30, 10 / 30)
    alpha: PerStage = (1.0, 0.25)
    beta: PerStage = 0.5
    cutoff: PerStage = 0.2
    sharpness: float = 1.0
    guidance_scale: PerStage | None = None
    rope_scale: float | None = None
    proportional: bool | None = None
    shift_patches: bool | None = None
    dynamic_shifting: bool = False
    upsampler: Upsampler | None = None

    def __post_init__(self) -> None:
        for name in ("restart", "alpha", "beta", "cutoff", "guidance_scale"):
            value = getattr(self, name)
            values = () if value is None else value if isinstance(value, tuple) else (value,)
            if value == ():
                raise ValueError(f"{name} must be a number, or one number for each stage, got {name}=()")
            for one in values:
                check_number(name, one)
                if name == "restart" and not 0 < one <= 1:
                    raise ValueError(f"restart must lie in (0, 1], got restart={one}")
                if name == "cutoff" and not one > 0:
                    raise ValueError(f"cutoff must be positive, got cutoff={one}")
        check_number("sharpness", self.sharpness)
        optional(check_number)("rope_scale", self.rope_scale)
        for name in ("proportional", "shift_patches"):
            optional(check_boolean)(name, getattr(self, name))
        check_boolean("dynamic_shifting", self.dynamic_shifting)
        optional(check_callable)("upsampler", self.upsampler)
        if self.sharpness < 0:
            raise ValueError(f"sharpness must not be negative, got sharpness={self.sharpness}")
        if self.rope_scale is not None and not self.rope_scale > 0:
            raise ValueError(f"rope_scale must be positive, got rope_scale={self.rope_scale}")


def _of_stage(value: PerStage, number: int) -> float:
    """The value of stage `number` above the base, from 0."""
    return value[min(number, len(value) - 1)] if isinstance(value, tuple) else value


@torch.no_grad()
def hiflow(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: HiFlow,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """HiFlow, arXiv:2504.06232: flow-aligned guidance of initialisation, direction and acceleration.

    A stage starts from the sharpened, enlarged and encoded picture of the one before. LP is a radial Butterworth filter of order 4 by FFT,
    in fp32. v and v_ref are remembered after their change. The trajectory that a stage leaves to the next consists of the x0 that its steps
    are taken from, after direction and acceleration; it is not known which x0 the authors keep. At timesteps that the stage before did not
    run, the trajectory is that of the stage before it. The blur of the sharpening is drawn as in DiffuseHigh.

    Differences from the authors' code: it works with any flow model that has an Euler scheduler, without the changes of positions and
    attention, which are FLUX.1's; the base has the target's aspect ratio, and sizes double up to the target. Steps and the base's guidance
    come from the preset. The encoder gives its mode.

    Args:
        pipe: A text-to-image pipeline of a known family with a flow-matching Euler scheduler. Its state is restored afterwards.
        arguments: Arguments of the pipeline's call: prompt, generator and so on. Steps and guidance are taken from `settings` if
            missing.
        size: (height, width) in pixels.
        settings: Settings that give steps and guidance scale, and that the stages report.
        options: Options of the method.
        on_stage: Called with every stage when it is finished.
        progress: Show or hide the pipeline's progress bar; unchanged when None.

    Returns:
        One stage for every size.

    Raises:
        ValueError: The size is below the native one or not a multiple of the model's, the call has a custom schedule, or the autoencoder
            overflows.
        NotImplementedError: The scheduler is another one, or an option needs FLUX.1.
    """
    sizes = stage_sizes(pipe, *size)
    arguments = running.complete_arguments(pipe, arguments, settings)
    if len(sizes) > 1:
        _check(pipe, options)
    with running.with_full_attention(pipe):
        if len(sizes) > 1 and not options.dynamic_shifting and pipe.scheduler.config.get("use_dynamic_shifting", False):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=False)
        run = Restarts(pipe, arguments, sizes, settings, on_stage=on_stage, progress=progress)
        trajectory: dict[int, Tensor] = {}  # by number of the step in the whole schedule

        def keep(call: int, denoised: Callable[[], Tensor]) -> None:
            if len(sizes) > 1:
                trajectory[call] = unpacked(pipe, denoised(), sizes[0])

        run.draw_base(watch=keep)
        for number in range(len(sizes) - 1):
            if run.interrupted:
                break
            with run.stage() as pixels, _extrapolated(pipe, pixels, options):
                picture = upsampled_picture(run.decoded.clamp(-1, 1), pixels, options.upsampler)
                picture = sharpened(picture, std=drawn_stds(arguments["generator"]), amount=options.sharpness)
                reference = encode_finite(pipe, picture).to(run.latents.dtype)
                last_steps = tail_steps(run.steps, _of_stage(options.restart, number))
                change = _follow(trajectory, options, number, first=run.steps - last_steps, steps=last_steps)
                run.restart(reference, last_steps=last_steps, change=change, guidance_scale=_guidance_scale(pipe, options, number))
    return run.stages


def _check(pipe: Any, options: HiFlow) -> None:
    """Raise the errors of later stages before anything is computed."""
    name = type(pipe.scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler":
        raise NotImplementedError(f"HiFlow needs a flow model with FlowMatchEulerDiscreteScheduler, got {name}")
    for option in ("rope_scale", "proportional", "shift_patches"):
        if getattr(options, option) and not is_flux(pipe):
            raise NotImplementedError(f"{option} changes the positions or attention of FLUX.1, got {type(denoiser_of(pipe)).__name__}")


def _extrapolated(pipe: Any, pixels: Grid, options: HiFlow) -> Any:
    """The context that changes FLUX.1's positions and attention for a stage."""
    if not is_flux(pipe):
        return nullcontext()
    factor = cascade_of(pipe).patch * pixels_per_latent(pipe)
    height, width = native_size(pipe)
    return Extrapolation(
        latent_size(pipe, pixels),
        rope_scale=_ROPE_SCALE if options.rope_scale is None else options.rope_scale,
        native_tokens=None if options.proportional is False else height * width // factor**2,
        shift_patches=options.shift_patches is not False,
    ).applied(pipe)


def _guidance_scale(pipe: Any, options: HiFlow, number: int) -> float | None:
    if options.guidance_scale is not None:
        return _of_stage(options.guidance_scale, number)
    return _of_stage(_GUIDANCE, number) if is_flux(pipe) and denoiser_of(pipe).config.guidance_embeds else None  # type: ignore[union-attr]


def _follow(trajectory: dict[int, Tensor], options: HiFlow, number: int, *, first: int, steps: int) -> Change:
    """The change of every step of a stage by the trajectory of the one before; the stage's own x0 replace those of the trajectory.

    Args:
        trajectory: `[B, C, y, x]` by number of the step in the whole schedule.
        options: Options of the method.
        number: Number of the stage above the base, from 0.
        first: Number of the stage's first step in the whole schedule.
        steps: Number of the stage's steps.
    """
    alpha, beta, cutoff = (_of_stage(value, number) for value in (options.alpha, options.beta, options.cutoff))
    before: tuple[Tensor, Tensor] | None = None

    def change(call: int, level: Any, x: Tensor, denoised: Tensor) -> Tensor:
        nonlocal before
        fade, sigma = (steps - call) / steps, level.noise
        target = upsampled(trajectory[first + call].to(x), x.shape[-2:])
        denoised = denoised + alpha * fade * butterworth(target - denoised, cutoff=cutoff)
        v, v_ref = (x - denoised) / sigma, (x - target) / sigma
        if before is not None:
            v = v + beta * fade * (before[0] + v_ref - before[1] - v)
        before = v, v_ref
        trajectory[first + call] = x - sigma * v
        return trajectory[first + call]

    return change
