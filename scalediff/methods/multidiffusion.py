"""MultiDiffusion, arXiv:2302.08113: one stage at the target size, every step the average of what native views step to.

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
from scalediff.cascade.pipeline import cascade_of, native_size, stage_sizes
from scalediff.cascade.schedule import Guidance, guided_scheduler, recording_scheduler
from scalediff.cascade.stage import Stage
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.views import Denoise, average, check_options, corners, stride_of
from scalediff.patching.networks import original_call
from scalediff.settings import Settings

_NAME = "MultiDiffusion"
# Their step is linear in the sample and in the model outputs, this step's and those before, and draws no noise.
SCHEDULERS = frozenset({
    "DDIMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler",
})  # fmt: skip


@dataclass(frozen=True)
class MultiDiffusion:
    """Options of MultiDiffusion. A view is a window of the model's native latent size.

    Attributes:
        stride: Latents from view to view; half a window where None, which makes the 49 views of a picture of four times the native
            side that ScaleDiff (arXiv:2510.25818) compares with. The authors' panorama script has 8 of a window's 64.
        view_batch: Views in one forward pass; the authors' script has 1.

    Raises:
        ValueError: a value is not positive.
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
    """MultiDiffusion, arXiv:2302.08113, with uniform weights: x_{t-1} is the mean of what the views of x_t step to.

    The pipeline's own call runs, from noise of the target size; only its denoiser is answered for. A view is denoised alone, its
    positions those of a native picture, and the outputs are averaged where views overlap. Guidance and the schedulers' steps are
    linear in them and in the sample, so the average of outputs steps to the average of steps. That holds for DDIM, Euler, Heun,
    DPM-Solver, DEIS, UniPC, PNDM and the flow-matching Euler and Heun, history included, for views lie at the same places in
    every step; not where a step draws noise or clips.

    The schedule is that of a window, also where the pipeline shifts it by size. SDXL is told the size of the whole picture and no crop
    in every view, as its pipeline tells it. A picture of one view is the pipeline's own.

    One prompt for all views; region masks and their bootstrapping are not here.

    Args:
        pipe: A text-to-image pipeline around a U-Net, FLUX.1, SD3, Lumina-Next or Lumina 2; it is given back as it was.
        arguments: Of the pipeline's call, the same for every method: prompt, generator and the like. What they do not name of
            steps and guidance is taken from `settings`.
        size: Height and width in pixels.
        settings: What the stage is drawn with and says that it was: steps and guidance.
        options: Stride and batch of the views.
        on_stage: Called with the stage.
        progress: Show the pipeline's progress bar, or hide it; as it is where None.

    Returns:
        The one stage.

    Raises:
        ValueError: the size is below native or no multiple of the model's; the stride does not fit the window or the tokens.
        NotImplementedError: a denoiser whose arguments cannot be cut into views, a scheduler whose step draws noise or is not
            linear, rescaled guidance.
    """
    stage_sizes(pipe, *size)  # it refuses sizes
    cascade = cascade_of(pipe)
    arguments = running.complete(pipe, arguments, settings)
    whole, native = running.latent_size(pipe, size), running.latent_size(pipe, native_size(pipe))
    window = min(whole[0], native[0]), min(whole[1], native[1])
    where = corners(whole, window=window, stride=stride_of(window, options.stride, patch=cascade.patch))
    since = time.perf_counter()
    with running.borrowed(pipe):
        running.show_progress(pipe, progress, index=1, of=1, size=size)
        if len(where) == 1:
            latents = running.generate_latents(pipe, arguments, size)
        else:
            running.inputs_of(pipe, _NAME)
            running.check_linear(pipe, arguments, SCHEDULERS, _NAME)
            if pipe.scheduler.config.get("use_dynamic_shifting", False):
                pipe.scheduler = _shifted_for(pipe, arguments, window)
            if cascade.trained_size:  # beyond it the pipeline stretches positions; views are no larger
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
    """A copy of the pipeline's scheduler with the schedule of a picture of one window: it is asked for one, with no step run."""
    scheduler, steps, factor = pipe.scheduler, arguments["num_inference_steps"], pipe.vae_scale_factor
    pipe.scheduler = recording = recording_scheduler(scheduler, runs=False)
    changes = {"height": window[0] * factor, "width": window[1] * factor, "latents": None, "generator": fresh_generator()}
    original_call(pipe)(pipe, **{**arguments, **changes, "output_type": "latent"})
    return guided_scheduler(scheduler, steps=steps, kept=steps, guidance=Guidance(None, 1.0), asked=recording.asked)
