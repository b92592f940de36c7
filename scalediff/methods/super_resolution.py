"""Super-resolution: the picture of native size, enlarged by an upsampler; the floor that any method must beat.

The paper of ScaleDiff, arXiv:2510.25818, has it with FLUX and BSRGAN (arXiv:2103.14006).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scalediff.arguments import check_callable, optional
from scalediff.cascade.latents import decode_finite
from scalediff.cascade.pipeline import stage_sizes
from scalediff.cascade.results import Stage
from scalediff.cascade.upsampling import Upsampler, upsampled_picture
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.settings import Settings


@dataclass(frozen=True)
class SuperResolution:
    """Options of super-resolution.

    Attributes:
        upsampler: Function from pictures `[B, 3, y, x]` in [0, 1] to larger ones, such as `load_upsampler` in
            `scalediff.cascade.upsampling` returns. None is bicubic interpolation.

    Raises:
        TypeError: The upsampler is not a function.
    """

    upsampler: Upsampler | None = None

    def __post_init__(self) -> None:
        optional(check_callable)("upsampler", self.upsampler)


@torch.no_grad()
def super_resolution(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: SuperResolution,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """Super-resolution: draw the base stage as the cascade does, decode it, and enlarge the picture to the target.

    Args:
        pipe: A text-to-image pipeline of a known family. Its state is restored afterwards.
        arguments: Arguments of the pipeline's call. Steps and guidance are taken from `settings` if missing.
        size: (height, width) in pixels.
        settings: Settings that give steps and guidance scale, and that the stages report.
        options: Options of the method.
        on_stage: Called with every stage when it is finished.
        progress: Show or hide the pipeline's progress bar; unchanged when None.

    Returns:
        The base stage and, above the native size, a stage without denoising steps, which has the base stage's latents.

    Raises:
        ValueError: The size is below the native one or not a multiple of the model's; the upsampler does not return larger pictures.
        TypeError: The upsampler does not return a tensor.
    """
    base, *above = stage_sizes(pipe, *size)
    arguments, of = running.complete_arguments(pipe, arguments, settings), 2 if above else 1
    stages = list[Stage]()

    def finish(decoded: torch.Tensor, at: Grid, since: float, steps: int) -> None:
        made = {**arguments, "num_inference_steps": steps}
        index = len(stages) + 1
        stages.append(running.finished(pipe, made, latents, at, settings, index=index, of=of, since=since, decoded=decoded))
        if on_stage is not None:
            on_stage(stages[-1])

    since = time.perf_counter()
    with running.with_full_attention(pipe):
        running.show_progress(pipe, progress, index=1, of=of, size=base)
        latents = running.generate_latents(pipe, arguments, base)
        with running.in_tiles_if_needed(pipe, arguments, base, f"stage 1 of {of}"):
            picture = decode_finite(pipe, latents)
        finish(picture, base, since, arguments["num_inference_steps"])
        if above and not getattr(pipe, "interrupt", False):  # diffusers' flag, set by a callback
            since = time.perf_counter()
            with running.in_tiles_if_needed(pipe, arguments, size, f"stage 2 of {of}"):
                picture = upsampled_picture(picture, size, options.upsampler)
            finish(picture, size, since, 0)
    return stages
