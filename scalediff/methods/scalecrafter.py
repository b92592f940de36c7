"""ScaleCrafter, arXiv:2310.07702: one stage at the target size, in whose first steps convolutions of the U-Net are dilated.

    re-dilation:            a convolution with factor d has dilation D = ceil(d); for a fractional d its input is resized by D / d
    noise-damped guidance:  eps = eps_weak(uncond) + w (eps_strong(cond) - eps_strong(uncond))

Legend: B batch, C channels, Y x X latent grid; tau number of steps with re-dilation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.arguments import check_boolean, check_number, optional
from scalediff.cascade.borrowing import intercept_denoiser, run_samples
from scalediff.cascade.pipeline import native_size, stage_sizes
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import recording_scheduler
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings

_LEAST = 2.0  # dilation of the weak list, and the smallest one of a progressive schedule
_DILATED = (0.6, 0.7)  # shares of the steps: 30 of 50 up to twice the side, 35 of 50 above
Dilations = Mapping[str, float]  # by the name of a convolution


@dataclass(frozen=True)
class ScaleCrafter:
    """Options of ScaleCrafter. The defaults are those of its authors' configurations for SDXL, up to twice the native side and above.

    Attributes:
        dilation: Factor d of the coarsest convolutions. None means the target's side over the native one.
        dilated: Share of the steps with re-dilation. None means 0.6 up to twice the native side, and 0.7 above.
        damped: Share of the steps with noise-damped guidance. None means none up to twice the native side, and 0.7 above.
        progressive: Let the factors fall from step to step, d_i = max(2, ceil(d (tau - i) / tau)). None means above twice the native side.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    dilation: float | None = None
    dilated: float | None = None
    damped: float | None = None
    progressive: bool | None = None

    def __post_init__(self) -> None:
        for name in ("dilation", "dilated", "damped"):
            optional(check_number)(name, getattr(self, name))
        optional(check_boolean)("progressive", self.progressive)
        if self.dilation is not None and not self.dilation >= 1:
            raise ValueError(f"dilation must be at least 1, got dilation={self.dilation}")
        for name in ("dilated", "damped"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {name}={value}")


@torch.no_grad()
def scalecrafter(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: ScaleCrafter,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """ScaleCrafter, arXiv:2310.07702: re-dilation and noise-damped classifier-free guidance, without dispersion.

    Up to twice the native side, the mid block and the first up block are dilated: the convolutions of their resnets and of the upsampler.
    Above, the coarsest down block is too, and the second and third up blocks by factors one and two smaller, but at least 2. The weak list
    of noise-damped guidance is the first of these with factor 2. The authors publish these lists for SDXL at 2048 and 4096 pixels; for
    other U-Nets and sizes they are our reading of them.

    Differences from the authors' code: dispersion, which their configurations for SDXL have off, is not implemented, and nor is FreeU,
    which their scripts turn on; the weak pass computes only the unconditional half, which is all that is used of it. Without classifier-
    free guidance nothing is damped. Steps and guidance, 5 in their scripts, come from the preset. The autoencoder runs in parts where it
    would not fit.

    Args:
        pipe: A text-to-image pipeline with a U-Net. Its state is restored afterwards.
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
        ValueError: The size is below the native one or not a multiple of the model's.
        NotImplementedError: The denoiser is not a U-Net with down, mid and up blocks, or guidance is rescaled while it is damped.
    """
    stage_sizes(pipe, *size)  # for its checks
    arguments = running.complete_arguments(pipe, arguments, settings)
    native = native_size(pipe)
    factor = math.sqrt(size[0] * size[1] / (native[0] * native[1]))
    dilating = Dilating.of(denoiser_of(pipe), factor, arguments["num_inference_steps"], options)
    if dilating.damped_steps and arguments.get("guidance_rescale"):
        raise NotImplementedError(f"noise-damped guidance cannot be rescaled, got guidance_rescale={arguments['guidance_rescale']}")
    since = time.perf_counter()
    with running.with_full_attention(pipe):
        running.show_progress(pipe, progress, index=1, of=1, size=size)
        pipe.scheduler = recording_scheduler(pipe.scheduler)

        def run(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            step = pipe.scheduler.calls_done // pipe.scheduler.order
            return dilating.run(forward, args, kwargs, step=step, guided=pipe.do_classifier_free_guidance)

        with intercept_denoiser(pipe, run):
            latents = running.generate_latents(pipe, arguments, size)
        stage = running.finished(pipe, arguments, latents, size, settings, index=1, of=1, since=since)
    if on_stage is not None:
        on_stage(stage)
    return [stage]


@dataclass(frozen=True)
class Dilating:
    """The dilations of a run.

    Attributes:
        unet: The U-Net.
        strong, weak: Factors of the convolutions at the first step; weak ones are for the unconditional pass of noise-damped guidance.
        steps: Number of steps with re-dilation.
        damped_steps: Number of steps with noise-damped guidance.
        progressive: Whether the factors fall from step to step.
    """

    unet: nn.Module
    strong: Dilations
    weak: Dilations
    steps: int
    damped_steps: int
    progressive: bool

    @classmethod
    def of(cls, unet: nn.Module, factor: float, steps: int, options: ScaleCrafter) -> Dilating:
        """The dilations of a picture whose side is `factor` times the native one, in a run of this number of steps.

        Raises:
            NotImplementedError: The network is not a U-Net with down, mid and up blocks.
        """
        if not all(hasattr(unet, name) for name in ("down_blocks", "mid_block", "up_blocks")):
            raise NotImplementedError(f"ScaleCrafter needs a U-Net, whose convolutions it dilates, got {type(unet).__name__}")
        above = factor > 2
        d = factor if options.dilation is None else options.dilation
        weak = dict.fromkeys([*convolutions(unet, "mid_block"), *convolutions(unet, "up_blocks.0")], _LEAST)
        strong = dict.fromkeys(weak, d)
        if above:
            blocks: Any = unet.down_blocks
            strong |= dict.fromkeys(convolutions(unet, f"down_blocks.{len(blocks) - 1}"), d)
            for number in (1, 2):
                strong |= dict.fromkeys(convolutions(unet, f"up_blocks.{number}"), max(_LEAST, d - number))
        dilated = _DILATED[above] if options.dilated is None else options.dilated
        damped = (_DILATED[1] if above else 0.0) if options.damped is None else options.damped
        progressive = above if options.progressive is None else options.progressive
        if factor == 1:  # the native size
            dilated = damped = 0.0
        return cls(unet, strong, weak, round(steps * dilated), round(steps * damped), progressive)

    def at(self, dilations: Dilations, step: int) -> Dilations:
        """The factors at a step, from 0; empty after the last one with re-dilation."""
        if step >= self.steps:
            return {}
        if not self.progressive:
            return dilations
        return {name: max(_LEAST, math.ceil(d * (self.steps - step) / self.steps)) for name, d in dilations.items()}

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, step: int, guided: bool) -> Any:
        """Run the U-Net at a step, from 0. `guided` says whether its batch holds the unconditional and then the conditional half."""
        with redilated(self.unet, self.at(self.strong, step)):
            output = forward(*args, **kwargs)
        if not guided or step >= self.damped_steps:
            return output
        unconditional, conditional = output[0].chunk(2)
        with redilated(self.unet, self.at(self.weak, step)):
            weak = run_samples(forward, args, kwargs, slice(0, len(unconditional)))[0]
        # The pipeline adds w times the difference of the halves to the first one.
        halves = torch.cat([weak, weak + conditional - unconditional])
        return (halves,) if isinstance(output, tuple) else type(output)(sample=halves)


def convolutions(unet: nn.Module, block: str) -> list[str]:
    """The names of the 3 x 3 convolutions in the resnets, upsamplers and downsamplers of a block; none if the U-Net lacks the block."""
    found = []
    for name, module in unet.named_modules():
        inside = name.startswith(f"{block}.") and any(part in name for part in (".resnets.", ".upsamplers.", ".downsamplers."))
        if inside and isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and ".lora_" not in name:
            found.append(name)
    return found


@contextmanager
def redilated(unet: nn.Module, dilations: Dilations) -> Iterator[None]:
    """Dilate convolutions of a U-Net by these factors, and restore them on exit."""
    with ExitStack() as undo:
        for name, d in dilations.items():
            convolution: Any = unet.get_submodule(name)
            whole = math.ceil(d)
            for attribute in ("dilation", "padding"):
                before = getattr(convolution, attribute)
                undo.callback(setattr, convolution, attribute, before)
                setattr(convolution, attribute, tuple(whole * one for one in before))
            if whole != d:
                resizing = _Resizing(whole / d, convolution.stride)
                undo.callback(convolution.register_forward_pre_hook(resizing.before).remove)
                undo.callback(convolution.register_forward_hook(resizing.after).remove)
        yield


class _Resizing:
    """Hooks that enlarge the input of a convolution bilinearly by a factor, and bring its output back to the size it would have had."""

    def __init__(self, factor: float, stride: Grid) -> None:
        self._factor, self._stride, self._size = factor, stride, (0, 0)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        y, x = args[0].shape[-2:]
        self._size = -(-y // self._stride[0]), -(-x // self._stride[1])
        enlarged = round(y * self._factor), round(x * self._factor)
        return (F.interpolate(args[0], size=enlarged, mode="bilinear"), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return F.interpolate(output, size=self._size, mode="bilinear")
