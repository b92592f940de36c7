"""DemoFusion, arXiv:2311.16973: phases of 1, 2, 3 ... times the native side, each from the noise-inverted latent of the one before.

    for each phase after the first:
        z' = bicubic(z);  zeta_t = add_noise(z', n, t) with one noise n;  x = zeta_T
        at every step:  x <- (1 - c1) x + c1 zeta_t            skip residual
                        x <- (1 - c2) local + c2 dilated       both stepped to from that x
        z = x, with the mean and standard deviation of the first phase's latent

Legend: B batch, C channels, Y x X latent grid; s the phase's number, T the steps of training; f = (1 + cos(pi (T - t) / T)) / 2.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.generators import Generators
from scalediff.cascade.pipeline import native_size, stage_sizes
from scalediff.cascade.stage import Stage
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.views import Denoise, average, check_options, corners, stride_of
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings

_NAME = "DemoFusion"
SCHEDULERS = frozenset({"DDIMScheduler", "EulerDiscreteScheduler"})  # a step is linear and knows no other: views lie elsewhere in each


@dataclass(frozen=True)
class DemoFusion:
    """Options of DemoFusion, with the defaults of its authors' pipeline. A view is a window of the model's native latent size.

    Attributes:
        stride: Latents from view to view; half a window where None: 64 of SDXL's 128.
        view_batch: Views, or dilated samples, in one forward pass.
        cosine_scale: The exponents of f in c1, the weight of the skip residual, in c2, that of dilated sampling, and in
            c3 = 0.99 f^k + 0.01, which narrows the blur.
        blur_std: Standard deviation of the blur before dilated sampling where c3 is 1, in latents; the authors' examples have 0.8.
        jitter: Move every view at random, by up to a quarter of what it shares with the next.

    Raises:
        ValueError: a value is out of range.
    """

    stride: int | None = None
    view_batch: int = 16
    cosine_scale: tuple[float, float, float] = (3.0, 1.0, 1.0)
    blur_std: float = 1.0
    jitter: bool = True

    def __post_init__(self) -> None:
        check_options(self.stride, self.view_batch)
        if len(self.cosine_scale) != 3 or min(self.cosine_scale) < 0:
            raise ValueError(f"cosine_scale must be three exponents that are not negative, got cosine_scale={self.cosine_scale}")
        if not self.blur_std > 0:
            raise ValueError(f"blur_std must be positive, got blur_std={self.blur_std}")


class Factors(NamedTuple):
    """What weighs the skip residual, dilated sampling and the blur at one timestep."""

    skip: float
    dilated: float
    blur: float


def factors(timestep: float, *, of: int, cosine_scale: tuple[float, float, float]) -> Factors:
    """c1, c2 and c3 at a timestep of `of` training steps: 1 in pure noise, and 0, 0 and 0.01 at its end."""
    f = (1 + math.cos(math.pi * (of - timestep) / of)) / 2
    return Factors(f ** cosine_scale[0], f ** cosine_scale[1], 0.99 * f ** cosine_scale[2] + 0.01)


def phase_sizes(pipe: Any, height: int, width: int) -> list[Grid]:
    """The sizes of all phases in pixels: one, two, three ... times a base of native area and the target's shape, up to the target.

    Raises:
        ValueError: as `stage_sizes`.
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

    Every phase is a call of the pipeline's own, with all its steps. A scheduler that is a subclass of the pipeline's adds the skip
    residual to the sample, where the denoiser is given it and where it steps from it; the denoiser is answered for by the mix of
    its outputs on local views and on dilated samples. Guidance and a step are linear in them, so that is the mix of the steps.

    The blur has 2 s - 1 taps and takes zeros beyond the border; mean and standard deviation are those of a sample over all its
    channels. SDXL is told the size of the phase's picture, in a view the corner of it on the canvas with its margin as the coordinates
    of a crop, and in dilated samples those of the pipeline's call: none, where the caller names none. The autoencoder is the
    pipeline's, in diffusers' tiles where one piece would not fit; the authors' own tiled decoder is not here.

    For any U-Net, where the authors' is for SDXL. The paper knows whole multiples of the native size; a base of the target's shape and
    a last phase cut to the target are ours. Steps and guidance are the preset's, all the steps in every phase.

    Args:
        pipe: A text-to-image pipeline around a U-Net, with DDIM or Euler; it is given back as it was.
        arguments: Of the pipeline's call, the same for every method: prompt, generator and the like. What they do not name of
            steps and guidance is taken from `settings`.
        size: Height and width in pixels.
        settings: What the stages are drawn with and say that they were: steps and guidance.
        options: Views, dilated sampling and the weights of the parts.
        on_stage: Called with every phase as it ends.
        progress: Show the pipeline's progress bar, or hide it; as it is where None.

    Returns:
        A stage for every phase.

    Raises:
        ValueError: the size is below native or no multiple of the model's; the stride does not fit the window; the call names a
            schedule of its own.
        NotImplementedError: no U-Net, another scheduler or one that draws noise or clips, rescaled guidance.
    """
    sizes = phase_sizes(pipe, *size)
    arguments = running.complete(pipe, arguments, settings)
    if len(sizes) > 1:
        _check(pipe, arguments)
    steps, stages = arguments["num_inference_steps"], list[Stage]()
    jitter: torch.Generator | None = None
    latents = base = torch.empty(0)
    with running.borrowed(pipe):
        scheduler = pipe.scheduler
        for phase, pixels in enumerate(sizes, start=1):
            since = time.perf_counter()
            running.show_progress(pipe, progress, index=phase, of=len(sizes), size=pixels)
            if phase == 1:
                latents = base = running.generate_latents(pipe, arguments, pixels)
                jitter = _own_generator(arguments["generator"]) if options.jitter else None  # now: the first phase is the pipeline's own
            else:
                canvas = Canvas.of(pipe, pixels, phase, options, jitter)
                pipe.scheduler = _skipping(scheduler, _enlarged(latents, canvas.size), arguments, options)
                pipe.scheduler.set_timesteps(steps)
                start = {"latents": pipe.scheduler.trajectory(pipe.scheduler.timesteps[0])}
                with running.replace_denoiser(pipe, canvas.denoise, size=canvas.size, view_batch=options.view_batch, method=_NAME):
                    latents = standardised(running.generate_latents(pipe, {**arguments, **start}, pixels), base)
            stages.append(running.finished(pipe, arguments, latents, pixels, settings, index=phase, of=len(sizes), since=since))
            if on_stage is not None:
                on_stage(stages[-1])
            if getattr(pipe, "interrupt", False):  # diffusers' flag, set by a callback: this phase is the last
                break
    return stages


def _check(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse before anything is drawn what a phase would refuse."""
    if running.inputs_of(pipe, _NAME).latents != "sample":
        raise NotImplementedError(f"{_NAME} is a method for U-Nets, got {type(denoiser_of(pipe)).__name__}")
    running.check_linear(pipe, arguments, SCHEDULERS, _NAME)
    for name in ("timesteps", "sigmas", "denoising_end"):
        if arguments.get(name) is not None:
            raise ValueError(f"phases lay out their own schedule, got {name}={arguments[name]}")


def _own_generator(generator: Generators) -> torch.Generator:
    """For the jitter, seeded by the run's."""
    first = generator[0] if isinstance(generator, list) else generator
    return torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=first, device=first.device)))


def _enlarged(latents: Tensor, size: Grid) -> Tensor:
    return F.interpolate(latents, size=size, mode="bicubic", align_corners=False)


def standardised(x: Tensor, like: Tensor) -> Tensor:
    """`[B, C, Y, X]` with the mean and standard deviation, over all but the batch, of another such tensor of any grid."""
    mean, std = (getattr(x, name)(dim=(1, 2, 3), keepdim=True) for name in ("mean", "std"))
    own_mean, own_std = (getattr(like, name)(dim=(1, 2, 3), keepdim=True) for name in ("mean", "std"))
    found: Tensor = (x - mean) / std * own_std + own_mean
    return found


def _skipping(scheduler: Any, reference: Tensor, arguments: Mapping[str, Any], options: DemoFusion) -> Any:
    """A copy of a diffusers scheduler that draws its samples to the noise-inverted trajectory of `reference`, `[B, C, Y, X]`.

    `.trajectory(t)` is the reference with the phase's one noise at a timestep. The sample is changed alike where the pipeline
    scales it for the denoiser and where it steps from it.
    """
    from diffusers.utils.torch_utils import randn_tensor

    cls = type(scheduler)
    noise = randn_tensor(reference.shape, generator=arguments["generator"], device=reference.device, dtype=reference.dtype)

    def trajectory(self: Any, timestep: Tensor) -> Tensor:
        noised: Tensor = self.add_noise(reference, noise, torch.as_tensor(timestep).reshape(1))
        return noised

    def skipped(self: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        c1 = factors(float(timestep), of=self.config.num_train_timesteps, cosine_scale=options.cosine_scale).skip
        zeta = self.trajectory(timestep).repeat(len(sample) // len(reference), 1, 1, 1)  # guidance doubles the batch
        blended: Tensor = (1 - c1) * sample + c1 * zeta
        return blended

    @functools.wraps(cls.scale_model_input)
    def scale_model_input(self: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        scaled: Tensor = cls.scale_model_input(self, skipped(self, sample, timestep), timestep)
        return scaled

    @functools.wraps(cls.step)
    def step(self: Any, model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return cls.step(self, model_output, timestep, skipped(self, sample, timestep), *args, **kwargs)

    members = {"trajectory": trajectory, "scale_model_input": scale_model_input, "step": step, "init_noise_sigma": 1.0}
    own = copy.deepcopy(scheduler)
    own.__dict__.pop("init_noise_sigma", None)
    own.__class__ = type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})
    return own


@dataclass(frozen=True)
class Canvas:
    """Where the denoiser looks in one phase.

    Attributes:
        size: Latents of the picture, `(Y, X)`.
        window: Those of a view.
        stride: From view to view.
        phase: The phase's number s, and the stride of dilated sampling.
        pixels: Pixels of a latent along an axis.
        training_steps: T.
        options: Of the method.
        jitter: Moves the views; None leaves them on their grid.
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
        size, native = running.latent_size(pipe, pixels), running.latent_size(pipe, native_size(pipe))
        window = min(size[0], native[0]), min(size[1], native[1])
        stride = stride_of(window, options.stride, patch=1)
        return cls(size, window, stride, phase, pipe.vae_scale_factor, pipe.scheduler.config.num_train_timesteps, options, jitter)

    def denoise(self, denoise: Denoise) -> Tensor:
        """The denoiser's answer for all latents: (1 - c2) local + c2 dilated."""
        _, c2, c3 = factors(float(denoise.timestep), of=self.training_steps, cosine_scale=self.options.cosine_scale)
        return (1 - c2) * self.local(denoise) + c2 * self.dilated(denoise, std=self.options.blur_std * c3)

    @property
    def margin(self) -> Grid:
        """Latents around the picture that jittered views may reach into, per axis: a quarter of what two views share."""
        return tuple((window - stride) // 4 for window, stride in zip(self.window, self.stride, strict=True))  # type: ignore[return-value]

    def local(self, denoise: Denoise) -> Tensor:
        """The average over jittered views of the picture in its margin of zeros."""
        (y, x), (rows, columns) = self.margin, self.size
        padded = F.pad(denoise.latents, (x, x, y, y))
        where = self.jittered()
        views = [padded[..., i : i + self.window[0], j : j + self.window[1]] for i, j in where]
        outputs = denoise(views, crops=[(i * self.pixels, j * self.pixels) for i, j in where])
        mean = average(outputs, where, (rows + 2 * y, columns + 2 * x))
        return mean[..., y : y + rows, x : x + columns]

    def jittered(self) -> list[Grid]:
        """The views' corners on the picture with its margin.

        A view at the border moves outward alone, for inward it would leave places that no other covers.
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
        """Every s-th latent is a sample of its own, taken from blurred latents that keep their mean and standard deviation."""
        s, (rows, columns) = self.phase, self.size
        padded = F.pad(denoise.latents, (-columns % s, 0, -rows % s, 0))
        blurred = standardised(blur(padded, taps=2 * s - 1, std=std), padded)
        where = [(i, j) for i in range(s) for j in range(s)]
        outputs = denoise([blurred[..., i::s, j::s] for i, j in where])
        whole = torch.empty_like(padded)
        for (i, j), output in zip(where, outputs, strict=True):
            whole[..., i::s, j::s] = output
        return whole[..., -rows:, -columns:]


def blur(x: Tensor, *, taps: int, std: float) -> Tensor:
    """`[B, C, Y, X]` through a Gaussian of an odd number of taps a side, with zeros beyond the border."""
    distance = torch.arange(taps, dtype=torch.float64) - taps // 2
    kernel = torch.softmax(-(distance**2) / (2 * std**2), dim=0).to(x)
    channels, half = x.shape[1], taps // 2
    along_y, along_x = kernel.view(1, 1, -1, 1), kernel.view(1, 1, 1, -1)
    x = F.conv2d(x, along_y.expand(channels, -1, -1, -1), padding=(half, 0), groups=channels)
    return F.conv2d(x, along_x.expand(channels, -1, -1, -1), padding=(0, half), groups=channels)
