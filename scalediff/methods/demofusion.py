"""DemoFusion, arXiv:2311.16973: phases of 1, 2, 3 ... times the native side, each starting from the noised latents of the previous one.

    for each phase after the first:
        z' = bicubic(z);  zeta_t = add_noise(z', n, t) with one noise n;  x = zeta_T
        at every step:  x <- (1 - c1) x + c1 zeta_t            skip residual
                        x <- (1 - c2) local + c2 dilated       both are steps from that x
        z = x, with the mean and standard deviation of the first phase's latent

Legend: B batch, C channels, Y x X latent grid; s number of the phase, T training steps; f = (1 + cos(pi (T - t) / T)) / 2.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.arguments import check_boolean, check_number, wrong_type
from scalediff.cascade.generators import Generators
from scalediff.cascade.pipeline import latent_size, native_size, pixels_per_latent, stage_sizes
from scalediff.cascade.results import Stage
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.frequencies import blur, standardised
from scalediff.methods.views import Denoise, average, check_options, corners, stride_of
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings

_NAME = "DemoFusion"
# Their steps are linear and need no history, which matters because views move from step to step.
SCHEDULERS = frozenset({"DDIMScheduler", "EulerDiscreteScheduler"})


@dataclass(frozen=True)
class DemoFusion:
    """Options of DemoFusion, with the defaults of its authors' pipeline. A view is a window of the model's native latent size.

    Attributes:
        stride: Latents between adjacent views. None means half a window, 64 for SDXL's 128.
        view_batch: Number of views, or of dilated samples, in one forward pass.
        cosine_scale: Three exponents of f: in c1, the weight of the skip residual; in c2, the weight of dilated sampling; and k in
            c3 = 0.99 f^k + 0.01, the factor of the blur's standard deviation.
        blur_std: Standard deviation, in latents, of the blur before dilated sampling when c3 is 1. The authors' examples use 0.8.
        jitter: Move every view at random, by up to a quarter of its overlap with the next one.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    stride: int | None = None
    view_batch: int = 16
    cosine_scale: tuple[float, float, float] = (3.0, 1.0, 1.0)
    blur_std: float = 1.0
    jitter: bool = True

    def __post_init__(self) -> None:
        check_options(self.stride, self.view_batch)
        check_number("blur_std", self.blur_std)
        check_boolean("jitter", self.jitter)
        if not isinstance(self.cosine_scale, tuple | list) or not all(isinstance(one, Real) for one in self.cosine_scale):
            raise wrong_type("cosine_scale", "three non-negative exponents", self.cosine_scale)
        if len(self.cosine_scale) != 3 or not all(0 <= one < math.inf for one in self.cosine_scale):
            raise ValueError(f"cosine_scale must be three non-negative exponents, got cosine_scale={self.cosine_scale}")
        if not self.blur_std > 0:
            raise ValueError(f"blur_std must be positive, got blur_std={self.blur_std}")


class Factors(NamedTuple):
    """The factors at one timestep: c1 of the skip residual, c2 of dilated sampling, c3 of the blur."""

    skip: float
    dilated: float
    blur: float


def factors(timestep: float, *, of: int, cosine_scale: tuple[float, float, float]) -> Factors:
    """c1, c2 and c3 at a timestep, of `of` training steps: all 1 in pure noise; 0, 0 and 0.01 without noise."""
    f = (1 + math.cos(math.pi * (of - timestep) / of)) / 2
    return Factors(f ** cosine_scale[0], f ** cosine_scale[1], 0.99 * f ** cosine_scale[2] + 0.01)


def phase_sizes(pipe: Any, height: int, width: int) -> list[Grid]:
    """(height, width) of all phases in pixels: 1, 2, 3 ... times a base with the native area and the target's aspect ratio.

    The last phase is cut to the target.

    Raises:
        ValueError: As `stage_sizes`.
    """
    y, x = stage_sizes(pipe, height, width)[0]
    return [(min(height, k * y), min(width, k * x)) for k in range(1, max(math.ceil(height / y), math.ceil(width / x)) + 1)]


@torch.no_grad()
def demofusion(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: DemoFusion,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """DemoFusion, arXiv:2311.16973: progressive upscaling with skip residuals and dilated sampling.

    Every phase is one call of the pipeline with all its steps. A subclass of the pipeline's scheduler adds the skip residual to the
    sample, both for the denoiser and for the step. The denoiser's output is replaced by the mix of its outputs on local views and on
    dilated samples. Because guidance and the step are linear in the outputs, this equals the mix of the steps.

    The blur has 2 s - 1 taps and zero padding. Mean and standard deviation are taken per sample over all channels. SDXL's size
    conditioning has the final size in every phase, the first included, as the authors' code has; the crop of a view is its corner on the
    canvas with margin, and the crop of dilated samples is that of the pipeline's call. The pipeline's autoencoder decodes, with diffusers'
    tiling if the picture would not fit; the authors' tiled decoder is not implemented.

    Differences from the authors' code: it works with any U-Net, not only SDXL. The size need not be a whole multiple of the native one:
    the base has the target's aspect ratio, and the last phase is cut to the target. Steps and guidance come from the preset. With an Euler
    scheduler their code scales the views after the first batch by the next step's sigma, because the first batch's step has already
    advanced the scheduler; here all views are scaled by the step's own.

    Args:
        pipe: A text-to-image pipeline with a U-Net and a DDIM or Euler scheduler. Its state is restored afterwards.
        arguments: Arguments of the pipeline's call: prompt, generator and so on. Steps and guidance are taken from `settings` if
            missing.
        size: (height, width) in pixels.
        settings: Settings that give steps and guidance scale, and that the stages report.
        options: Options of the method.
        on_stage: Called with every phase when it is finished.
        progress: Show or hide the pipeline's progress bar; unchanged when None.

    Returns:
        One stage for every phase.

    Raises:
        ValueError: The size is below the native one or not a multiple of the model's, the stride does not fit the window, or the call
            has a custom schedule.
        NotImplementedError: The denoiser is not a U-Net, the scheduler is another one, adds noise or clips, or guidance is rescaled.
    """
    return run_phases(pipe, arguments, size, settings, options, Canvas.of, name=_NAME, on_stage=on_stage, progress=progress)


# Makes the canvas of a phase after the first: pipeline, size in pixels, number of the phase, options, generator of the jitter.
CanvasOf = Callable[[Any, Grid, int, DemoFusion, torch.Generator | None], "Canvas"]


def run_phases(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: DemoFusion,
    canvas_of: CanvasOf,
    *,
    name: str,
    on_stage: Callable[[Stage], None] | None,
    progress: bool | None,
) -> list[Stage]:
    """The phases of DemoFusion, or of a method called `name` that has another `Canvas`; otherwise as `demofusion`."""
    sizes = phase_sizes(pipe, *size)
    arguments = running.complete_arguments(pipe, arguments, settings)
    if len(sizes) > 1:
        _check(pipe, arguments, name)
        for phase, pixels in enumerate(sizes[1:], start=2):
            Canvas.of(pipe, pixels, phase, options, None)  # for its checks
    steps, stages, conditioning = arguments["num_inference_steps"], list[Stage](), running.size_conditioning(pipe, arguments, size)
    jitter: torch.Generator | None = None
    latents = base = torch.empty(0)
    with running.with_full_attention(pipe):
        scheduler = pipe.scheduler
        for phase, pixels in enumerate(sizes, start=1):
            since = time.perf_counter()
            running.show_progress(pipe, progress, index=phase, of=len(sizes), size=pixels)
            if phase == 1:
                latents = base = running.generate_latents(pipe, {**arguments, **conditioning}, pixels)
                # Only now, so that the first phase starts from the noise of the pipeline.
                jitter = _jitter_generator(arguments["generator"]) if options.jitter else None
            else:
                canvas = canvas_of(pipe, pixels, phase, options, jitter)
                pipe.scheduler = _scheduler_with_skip(scheduler, _enlarged(latents, canvas.size), arguments, options)
                pipe.scheduler.set_timesteps(steps)
                start = {"latents": pipe.scheduler.trajectory(pipe.scheduler.timesteps[0])}
                with running.replace_denoiser(pipe, canvas.denoise, size=canvas.size, view_batch=options.view_batch, method=name):
                    latents = standardised(running.generate_latents(pipe, {**arguments, **conditioning, **start}, pixels), base)
            stages.append(running.finished(pipe, arguments, latents, pixels, settings, index=phase, of=len(sizes), since=since))
            if on_stage is not None:
                on_stage(stages[-1])
            if getattr(pipe, "interrupt", False):  # diffusers' flag, set by a callback: this phase is the last
                break
    return stages


def _check(pipe: Any, arguments: Mapping[str, Any], name: str) -> None:
    """Raise the errors of later phases before anything is computed."""
    if running.inputs_of(pipe, name).latents != "sample":
        raise NotImplementedError(f"{name} needs a U-Net, got {type(denoiser_of(pipe)).__name__}")
    running.check_linear(pipe, arguments, SCHEDULERS, name)
    running.check_own_schedule(arguments)


def _jitter_generator(generator: Generators) -> torch.Generator:
    """A separate generator for the jitter, seeded from that of the run."""
    first = generator[0] if isinstance(generator, list) else generator
    return torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=first, device=first.device)))


def _enlarged(latents: Tensor, size: Grid) -> Tensor:
    return F.interpolate(latents, size=size, mode="bicubic", align_corners=False)


def _scheduler_with_skip(scheduler: Any, reference: Tensor, arguments: Mapping[str, Any], options: DemoFusion) -> Any:
    """A copy of a diffusers scheduler that adds the skip residual to its samples.

    `.trajectory(t)` is the reference `[B, C, Y, X]` with noise at timestep t; the noise is the same at all timesteps. The residual is
    added both when the pipeline scales the sample for the denoiser and when it makes the step.
    """
    from diffusers.utils.torch_utils import randn_tensor

    cls = type(scheduler)
    noise = randn_tensor(reference.shape, generator=arguments["generator"], device=reference.device, dtype=reference.dtype)

    def trajectory(self: Any, timestep: Tensor) -> Tensor:
        noised: Tensor = self.add_noise(reference, noise, torch.as_tensor(timestep).reshape(1))
        return noised

    def add_skip_residual(self: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        c1 = factors(float(timestep), of=self.config.num_train_timesteps, cosine_scale=options.cosine_scale).skip
        zeta = self.trajectory(timestep).repeat(len(sample) // len(reference), 1, 1, 1)  # guidance doubles the batch
        blended: Tensor = (1 - c1) * sample + c1 * zeta
        return blended

    @functools.wraps(cls.scale_model_input)
    def scale_model_input(self: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        scaled: Tensor = cls.scale_model_input(self, add_skip_residual(self, sample, timestep), timestep)
        return scaled

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return cls.step(self, model_output, timestep, add_skip_residual(self, sample, timestep), *args, **kwargs)

    members = {"trajectory": trajectory, "scale_model_input": scale_model_input, "step": step, "init_noise_sigma": 1.0}
    with_skip = copy.deepcopy(scheduler)
    with_skip.__dict__.pop("init_noise_sigma", None)
    with_skip.__class__ = type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})
    return with_skip


@dataclass(frozen=True)
class Canvas:
    """Local views and dilated samples of one phase.

    Attributes:
        size: Latent grid `(Y, X)` of the picture.
        window: Latent grid of a view.
        stride: Latents between adjacent views, `(Y, X)`.
        phase: Number s of the phase, which is also the stride of dilated sampling.
        pixels: Pixels per latent along an axis.
        training_steps: Number T of training steps.
        options: Options of the method.
        jitter: Generator that moves the views; None leaves them on their grid.
    """

    size: Grid
    window: Grid
    stride: Grid
    phase: int
    pixels: int
    training_steps: int
    options: DemoFusion
    jitter: torch.Generator | None

    @classmethod
    def of(cls, pipe: Any, pixels: Grid, phase: int, options: DemoFusion, jitter: torch.Generator | None) -> Canvas:
        size, native = latent_size(pipe, pixels), latent_size(pipe, native_size(pipe))
        window = min(size[0], native[0]), min(size[1], native[1])
        stride = stride_of(window, options.stride, patch=1)
        return cls(size, window, stride, phase, pixels_per_latent(pipe), pipe.scheduler.config.num_train_timesteps, options, jitter)

    def denoise(self, denoise: Denoise) -> Tensor:
        """The denoiser's output for the whole picture: (1 - c2) local + c2 dilated."""
        _, c2, c3 = factors(float(denoise.timestep), of=self.training_steps, cosine_scale=self.options.cosine_scale)
        return (1 - c2) * self.local(denoise) + c2 * self.dilated(denoise, std=self.options.blur_std * c3)

    @property
    def margin(self) -> Grid:
        """Padding in latents per axis for jittered views: a quarter of the overlap of two views."""
        return tuple((window - stride) // 4 for window, stride in zip(self.window, self.stride, strict=True))  # type: ignore[return-value]

    def local(self, denoise: Denoise) -> Tensor:
        """The average over jittered views of the zero-padded picture."""
        (y, x), (rows, columns) = self.margin, self.size
        padded = F.pad(denoise.latents, (x, x, y, y))
        where = self.jittered()
        views = [padded[..., i : i + self.window[0], j : j + self.window[1]] for i, j in where]
        outputs = self.denoise_views(denoise, views, crops=[(i * self.pixels, j * self.pixels) for i, j in where])
        mean = average(outputs, where, (rows + 2 * y, columns + 2 * x))
        return mean[..., y : y + rows, x : x + columns]

    def denoise_views(self, denoise: Denoise, views: Sequence[Tensor], *, crops: Sequence[Grid]) -> Iterable[Tensor]:
        """The outputs for the views, in order."""
        return denoise(views, crops=crops)

    def jittered(self) -> list[Grid]:
        """Corners of the views on the padded picture.

        A view at the border only moves outward, because moving inward would leave latents that no view covers.
        """
        grid = corners(self.size, window=self.window, stride=self.stride)
        return [(self._moved(y, 0), self._moved(x, 1)) for y, x in grid]

    def _moved(self, start: int, axis: int) -> int:
        margin = self.margin[axis]
        if self.jitter is None:
            return margin + start
        first, last = start == 0, start + self.window[axis] == self.size[axis]
        low, high = (0 if last else -margin), (0 if first else margin)
        return margin + start + int(torch.randint(low, high + 1, (), generator=self.jitter))

    def dilated(self, denoise: Denoise, *, std: float) -> Tensor:
        """Denoise every s-th latent as a separate sample, after a blur that preserves mean and standard deviation."""
        s, (rows, columns) = self.phase, self.size
        padded = F.pad(denoise.latents, (-columns % s, 0, -rows % s, 0))
        blurred = standardised(blur(padded, taps=2 * s - 1, std=std), padded)
        where = [(i, j) for i in range(s) for j in range(s)]
        outputs = self.denoise_samples(denoise, [blurred[..., i::s, j::s] for i, j in where])
        whole = torch.empty_like(padded)
        for (i, j), output in zip(where, outputs, strict=True):
            whole[..., i::s, j::s] = output
        return whole[..., -rows:, -columns:]

    def denoise_samples(self, denoise: Denoise, samples: Sequence[Tensor]) -> Iterable[Tensor]:
        """The outputs for the dilated samples, in order."""
        return denoise(samples)
