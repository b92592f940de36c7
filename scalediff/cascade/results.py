"""`Stage`, the result of one stage, and `RunOptions`, the options of a run that are not settings of the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from scalediff.arguments import check_arguments, check_boolean, check_callable, choice, optional
from scalediff.cascade.progress import Step
from scalediff.cascade.upsampling import Upsampler
from scalediff.cascade.workdir import Workdir
from scalediff.settings import Attention, Settings


@dataclass(frozen=True)
class Stage:
    """One finished stage.

    Attributes:
        index, of: Number of the stage, from 1, and number of stages.
        height, width: Size in pixels.
        images: PIL pictures, one per prompt.
        latents: `[B, C, Y, X]`, scaled as the denoiser takes them.
        steps: Number of denoising steps run.
        seconds: Wall-clock time, including decoding.
        settings: Settings of the run.
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
    """Options of a run that are not settings of the method.

    Attributes:
        on_stage: Called with every stage when it is finished, or when it is loaded from the workdir.
        on_step: Called after every step.
        progress: Show one bar over all stages, or a line for each where stderr is no terminal; None keeps the pipeline's bar, False shows
            none.
        workdir: Folder in which finished stages are saved and from which they are loaded.
        vae_tiling: Run the autoencoder in parts; None means only if it would not fit into the device's memory.
        vae_attention: `"npa"` uses neighborhood patch attention in the autoencoder.
        split_guidance: Run the two passes of classifier-free guidance one after the other.
        upsampler: Function that enlarges the picture of a stage for the next; bicubic when None.
        mesh: Ranks over which pictures above the native size are split, as in `patch_model`; the model is not split when None.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: `vae_attention` is not one of its values.
    """

    on_stage: Callable[[Stage], None] | None = None
    on_step: Callable[[Step], None] | None = None
    progress: bool | None = None
    workdir: Workdir | None = None
    vae_tiling: bool | None = None
    vae_attention: Attention = "full"
    split_guidance: bool = False
    upsampler: Upsampler | None = None
    mesh: Any = None

    def __post_init__(self) -> None:
        check_arguments(_OPTION_CHECKS, vars(self))


_OPTION_CHECKS = {
    "on_stage": optional(check_callable),
    "on_step": optional(check_callable),
    "progress": optional(check_boolean),
    "vae_tiling": optional(check_boolean),
    "vae_attention": choice(get_args(Attention)),
    "split_guidance": check_boolean,
    "upsampler": optional(check_callable),
}
