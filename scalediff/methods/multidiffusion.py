"""MultiDiffusion, arXiv:2302.08113: one stage at the target size; every step averages views of native size.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.generators import fresh_generator
from scalediff.cascade.pipeline import cascade_of, latent_size, native_size, pixels_per_latent, stage_sizes
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import Guidance, guided_scheduler, recording_scheduler
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.views import Denoise, average, check_options, corners, stride_of
from scalediff.patching.networks import original_call
from scalediff.settings import Settings

_NAME = "MultiDiffusion"
# Their step is linear in the sample and in the current and earlier model outputs, and adds no noise.
SCHEDULERS = frozenset({
    "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler",
})  # fmt: skip


@dataclass(frozen=True)
class MultiDiffusion:
    """Options of MultiDiffusion. A view is a window of the model's native latent size.

    Attributes:
        stride: Latents between adjacent views. None means half a window, which gives 49 views at four times the native side, as in the
            comparison of ScaleDiff (arXiv:2510.25818). The authors' panorama script uses 8, for a window of 64.
        view_batch: Number of views in one forward pass. The authors' script uses 1.

    Raises:
        ValueError: A value is not positive.
        TypeError: A value is not an integer.
    """

    stride: int | None = None
    view_batch: int = 1

    def __post_init__(self) -> None:
        check_options(self.stride, self.view_batch)


@torch.no_grad()
def multidiffusion(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: MultiDiffusion,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """MultiDiffusion, arXiv:2302.08113, with uniform weights: x_{t-1} is the mean of the views of x_t after one step each.

    The pipeline runs from noise of the target size, and only the output of its denoiser is replaced. Each view is denoised separately,
    with the positions of a native picture, and the outputs are averaged where views overlap. Because guidance and the scheduler's step
    are linear in the outputs and the sample, averaging outputs equals averaging steps. This holds for DDIM, Euler, Heun, DPM-Solver,
    DEIS, UniPC, PNDM and the flow-matching Euler and Heun, including multi-step history, because views have the same positions at every
    step. It does not hold if a step adds noise or clips.

    The schedule is the one of a picture of window size, even if the pipeline shifts the schedule by size. SDXL's size conditioning has
    the size of the whole picture and no crop in every view. If one view covers the picture, the result is that of the pipeline.

    All views have the same prompt; region masks and their bootstrapping are not implemented.

    Args:
        pipe: A text-to-image pipeline with a U-Net, FLUX.1, SD3, Lumina-Next or Lumina 2. Its state is restored afterwards.
        arguments: Arguments of the pipeline's call: prompt, generator and so on. Steps and guidance are taken from `settings` if
            missing.
        size: (height, width) in pixels.
        settings: Settings that give steps and guidance scale, and that the stage reports.
        options: Options of the method.
        on_stage: Called with the stage when it is finished.
        progress: Show or hide the pipeline's progress bar; unchanged when None.

    Returns:
        A list with the one stage.

    Raises:
        ValueError: The size is below the native one or not a multiple of the model's; the stride does not fit the window or the tokens.
        NotImplementedError: The denoiser's arguments cannot be cut into views, the scheduler's step adds noise or is not linear, or
            guidance is rescaled.
    """
    stage_sizes(pipe, *size)  # for its checks
    cascade = cascade_of(pipe)
    arguments = running.complete_arguments(pipe, arguments, settings)
    whole, native = latent_size(pipe, size), latent_size(pipe, native_size(pipe))
    window = min(whole[0], native[0]), min(whole[1], native[1])
    where = corners(whole, window=window, stride=stride_of(window, options.stride, patch=cascade.patch))
    since = time.perf_counter()
    with running.with_full_attention(pipe):
        running.show_progress(pipe, progress, index=1, of=1, size=size)
        if len(where) == 1:
            latents = running.generate_latents(pipe, arguments, size)
        else:
            running.inputs_of(pipe, _NAME)
            running.check_linear(pipe, arguments, SCHEDULERS, _NAME)
            if pipe.scheduler.config.get("use_dynamic_shifting", False):
                pipe.scheduler = _shifted_for(pipe, arguments, window)
            if cascade.trained_size:  # above it the pipeline rescales positions, but views are of native size
                setattr(pipe, cascade.trained_size, round(math.sqrt(size[0] * size[1])))

            def mean_of_views(denoise: Denoise) -> Tensor:
                views = [denoise.latents[..., y : y + window[0], x : x + window[1]] for y, x in where]
                return average(denoise(views), where, whole)

            with running.replace_denoiser(pipe, mean_of_views, size=whole, view_batch=options.view_batch, method=_NAME):
                latents = running.generate_latents(pipe, arguments, size)
        stage = running.finished(pipe, arguments, latents, size, settings, index=1, of=1, since=since)
    if on_stage is not None:
        on_stage(stage)
    return [stage]


def _shifted_for(pipe: Any, arguments: Mapping[str, Any], window: Grid) -> Any:
    """A copy of the pipeline's scheduler with the schedule of a picture of window size, from a pipeline call that runs no step."""
    scheduler, steps, factor = pipe.scheduler, arguments["num_inference_steps"], pixels_per_latent(pipe)
    pipe.scheduler = recording = recording_scheduler(scheduler, runs=False)
    changes = {"height": window[0] * factor, "width": window[1] * factor, "latents": None, "generator": fresh_generator()}
    original_call(pipe)(pipe, **{**arguments, **changes, "output_type": "latent"})
    return guided_scheduler(
        scheduler, steps=steps, last_steps=steps, guidance=Guidance(None, 1.0), base_schedule_arguments=recording.schedule_arguments
    )
