"""Direct inference: one call of the pipeline at the target size, without any method.

Models repeat their subjects there; every paper on larger pictures has it as its first baseline, such as ScaleDiff, arXiv:2510.25818.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scalediff.cascade.pipeline import stage_sizes
from scalediff.cascade.results import Stage
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.settings import Settings


@dataclass(frozen=True)
class Direct:
    """Direct inference has no options."""


@torch.no_grad()
def direct(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: Direct,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """Direct inference: the unpatched pipeline's own call at the target size, from noise, with full attention.

    Args:
        pipe: A text-to-image pipeline of a known family. Its state is restored afterwards.
        arguments: Arguments of the pipeline's call. Steps and guidance are taken from `settings` if missing.
        size: (height, width) in pixels.
        settings: Settings that give steps and guidance scale, and that the stage reports.
        options: Options of the method.
        on_stage: Called with the stage when it is finished.
        progress: Show or hide the pipeline's progress bar; unchanged when None.

    Returns:
        A list with the one stage.

    Raises:
        ValueError: The size is below the native one or not a multiple of the model's.
    """
    stage_sizes(pipe, *size)  # for its checks
    arguments = running.complete_arguments(pipe, arguments, settings)
    since = time.perf_counter()
    with running.with_full_attention(pipe):
        running.show_progress(pipe, progress, index=1, of=1, size=size)
        latents = running.generate_latents(pipe, arguments, size)
        stage = running.finished(pipe, arguments, latents, size, settings, index=1, of=1, since=since)
    if on_stage is not None:
        on_stage(stage)
    return [stage]
