"""What a run hands out, and what goes on beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scalediff.cascade.progress import Step
from scalediff.cascade.workdir import Workdir
from scalediff.settings import Attention, Settings


@dataclass(frozen=True)
class Stage:
    """One finished stage.

    Attributes:
        index, of: Its number from 1, and how many there are.
        height, width: Pixels.
        images: PIL pictures, one per prompt.
        latents: `[B, C, Y, X]`, scaled as the pipeline hands them out.
        steps: Denoising steps run.
        seconds: Wall-clock time, its decoding included.
        settings: What the run was asked for.
    """

    index: int
    of: int
    height: int
    width: int
    images: list[Any]
    latents: Tensor
    steps: int
    seconds: float
    settings: Settings


@dataclass(frozen=True)
class RunOptions:
    """What goes on beside a run.

    Attributes:
        on_stage: Called with every stage as it ends, or as it is found in the workdir.
        on_step: Called with every step.
        progress: One bar over all stages; None leaves the pipeline's own bar, False shows none.
        workdir: Keeps every finished stage; those that it holds are taken from there.
        vae_tiling: The autoencoder works in tiles; None: where it would not fit into what is free.
        vae_attention: `"npa"` gives the autoencoder neighborhood patch attention.
        split_guidance: The two passes of classifier-free guidance run one after the other.
    """

    on_stage: Callable[[Stage], None] | None = None
    on_step: Callable[[Step], None] | None = None
    progress: bool | None = None
    workdir: Workdir | None = None
    vae_tiling: bool | None = None
    vae_attention: Attention = "full"
    split_guidance: bool = False
