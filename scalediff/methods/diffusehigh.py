"""DiffuseHigh, arXiv:2406.18459: stages that restart from the sharpened picture and keep its low wavelet band in their first steps.

    for each stage above the base:
        g = sharpen(bicubic(picture));  x = add_noise(encode(g))
        in the first steps:  x0 <- encode(replace the approximation band of decode(x0) by that of g)
        picture = decode(x)

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalediff.arguments import check_callable, check_number, optional
from scalediff.cascade.latents import decode, encode
from scalediff.cascade.pipeline import cascade_of, size_multiple, stage_sizes, takes_size_conditioning
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import Change, first_calls
from scalediff.cascade.stage import encode_finite
from scalediff.cascade.upsampling import Upsampler, upsampled_picture
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.frequencies import approximation, drawn_stds, sharpened, with_approximation
from scalediff.methods.restarts import Restarts, tail_steps
from scalediff.settings import Settings

_GUIDANCE = 10.0  # of the stages above the base, for SDXL


@dataclass(frozen=True)
class DiffuseHigh:
    """Options of DiffuseHigh, with the defaults of its authors' pipeline for SDXL.

    Attributes:
        restart: Share of the steps that a stage above the base runs: the last 15 of 50.
        guided: Share of these steps, from the first on, whose low wavelet band is replaced: 5 of 15.
        sharpness: Weight of the difference between the picture and its blur that sharpens it; 0 turns sharpening off.
        guidance_scale: Scale of classifier-free guidance above the base. None means 10 for SDXL, as published, and the run's own scale
            for other models, or where that is without guidance.
        upsampler: Function that enlarges the picture, as in `generate`; None is bicubic interpolation, as published.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    restart: float = 0.3
    guided: float = 1 / 3
    sharpness: float = 1.0
    guidance_scale: float | None = None
    upsampler: Upsampler | None = None

    def __post_init__(self) -> None:
        for name in ("restart", "guided", "sharpness"):
            check_number(name, getattr(self, name))
        optional(check_number)("guidance_scale", self.guidance_scale)
        optional(check_callable)("upsampler", self.upsampler)
        if not 0 < self.restart <= 1:
            raise ValueError(f"restart must lie in (0, 1], got restart={self.restart}")
        if not 0 <= self.guided <= 1:
            raise ValueError(f"guided must lie in [0, 1], got guided={self.guided}")
        if self.sharpness < 0:
            raise ValueError(f"sharpness must not be negative, got sharpness={self.sharpness}")


def plan(pipe: Any, height: int, width: int) -> list[Grid]:
    """(height, width) of all stages in pixels: 1, 2, 3, 4 ... times the base; 1, 1.5 and 2 times it up to a target of twice its side.

    The last stage is cut to the target. These are the authors' lists for 4096 and 2048 pixels.

    Raises:
        ValueError: As `stage_sizes`.
    """
    (y, x), multiple = stage_sizes(pipe, height, width)[0], size_multiple(pipe)
    factor = max(height / y, width / x)
    factors = [1.0, *([1.5, 2.0] if factor <= 2 else map(float, range(2, math.ceil(factor) + 1)))]
    sizes = [tuple(min(side, round(k * base / multiple) * multiple) for side, base in ((height, y), (width, x))) for k in factors]
    return [size for size, after in itertools.pairwise([*sizes, None]) if size != after]  # type: ignore[misc]


@torch.no_grad()
def diffusehigh(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: DiffuseHigh,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """DiffuseHigh, arXiv:2406.18459: progressive upscaling with structure guidance by a wavelet transform of the picture.

    Pictures are clamped before they are enlarged. The blur of the sharpening has 3 x 3 taps and a standard deviation drawn uniformly from
    (0.1, 2) pixels, once for each stage and generator. The transform is db4 with symmetric extension, one level, in fp32. The encoder gives
    its mode. SDXL's size conditioning has the size of the base in every stage.

    Differences from the authors' code: it works with any known pipeline and with every scheduler that the cascade supports, of which the
    authors have Euler; the base has the target's aspect ratio, and the last stage is cut to the target. Steps and the base's guidance come
    from the preset. The autoencoder runs in parts only where it would not fit; the authors turn tiles on in every stage above the base.

    Args:
        pipe: A text-to-image pipeline of a known family. Its state is restored afterwards.
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
        NotImplementedError: The scheduler cannot start in the middle of a schedule.
    """
    sizes = plan(pipe, *size)
    arguments = running.complete_arguments(pipe, arguments, settings)
    conditioning = running.size_conditioning(pipe, arguments, sizes[0])
    with running.with_full_attention(pipe):
        run = Restarts(pipe, arguments, sizes, settings, on_stage=on_stage, progress=progress)
        run.draw_base(changes=conditioning)
        last_steps = tail_steps(run.steps, options.restart)
        guided = first_calls(pipe.scheduler, round(last_steps * options.guided))
        for _ in sizes[1:]:
            if run.interrupted:
                break
            with run.stage() as pixels:
                picture = upsampled_picture(run.decoded.clamp(-1, 1), pixels, options.upsampler).float()
                picture = sharpened(picture, std=drawn_stds(arguments["generator"]), amount=options.sharpness)
                change = _keep_approximation(pipe, approximation(picture), guided=guided)
                reference = encode_finite(pipe, picture).to(run.latents.dtype)
                scale = _guidance_scale(pipe, arguments, options)
                run.restart(reference, last_steps=last_steps, change=change, guidance_scale=scale, changes=conditioning)
    return run.stages


def _keep_approximation(pipe: Any, band: Tensor, *, guided: int) -> Change:
    """The change of the first `guided` model calls: the picture of the prediction gets this approximation band."""

    def change(call: int, level: Any, x: Tensor, denoised: Tensor) -> Tensor:
        if call >= guided:
            return denoised
        picture = decode(pipe, denoised.to(pipe.vae.dtype)).clamp(-1, 1).float()
        return encode(pipe, with_approximation(picture, band)).to(denoised)

    return change


def _guidance_scale(pipe: Any, arguments: Mapping[str, Any], options: DiffuseHigh) -> float | None:
    if options.guidance_scale is not None or not takes_size_conditioning(pipe):
        return options.guidance_scale
    return _GUIDANCE if arguments[cascade_of(pipe).guidance] > 1 else None
