"""AccDiffusion, arXiv:2407.10738: DemoFusion whose views have prompts of their own, and whose dilated samples exchange latents.

    in the first phase:    M_j = mean cross-attention of token j;  mask_j = opening(M_j > mean(M_j))
    in every later phase:  token j stays in the prompt of a view if mask_j covers at least c of its area
    at every step:         dilated samples are permuted among each other at every channel and place before the denoiser, and back after it

With a ControlNet it is AccDiffusion v2, arXiv:2412.02099, whose views also see the edges of the previous phase's picture.

Legend: B batch, C channels, Y x X latent grid; s number of the phase, k latents per token of the coarsest level along an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.arguments import check_number, optional
from scalediff.cascade.pipeline import cascade_of, latent_size, pixels_per_latent, takes_size_conditioning
from scalediff.cascade.results import Stage
from scalediff.families.grid import Grid
from scalediff.methods import running
from scalediff.methods.attention_maps import recorded_maps, token_masks
from scalediff.methods.demofusion import Canvas, DemoFusion, phase_sizes, run_phases
from scalediff.methods.edges import EdgeControl, resolve_controlnet
from scalediff.methods.views import Denoise, Text
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings

_NAME = "AccDiffusion"
_LOCAL_GUIDANCE = 7.5  # for SDXL


@dataclass(frozen=True)
class AccDiffusion(DemoFusion):
    """Options of AccDiffusion: those of DemoFusion, with its defaults, and more.

    Attributes:
        threshold: Share c of a view that a token's mask must cover, for the token to stay in the view's prompt. The authors choose it by
            prompt and seed; 0.3 is their default.
        local_guidance_scale: Scale of classifier-free guidance on the views. None means 7.5 for SDXL, as published, and the run's own scale
            for other models.
        controlnet: ControlNet for Canny edges, or the folder of one, which makes it AccDiffusion v2. The paper's is
            `diffusers/controlnet-canny-sdxl-1.0`. Without one it is the first version.
        controlnet_scale: Factor on the ControlNet's residuals; 0.6 in the authors' instructions, 0.3 in their script without options.
        edge_spread: Thresholds of the edges as shares of the picture's median: `1 - edge_spread` and `1 + edge_spread`.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is of the wrong type.
    """

    threshold: float = 0.3
    local_guidance_scale: float | None = None
    controlnet: Any = None
    controlnet_scale: float = 0.6
    edge_spread: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold)
        optional(check_number)("local_guidance_scale", self.local_guidance_scale)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got threshold={self.threshold}")
        check_number("controlnet_scale", self.controlnet_scale)
        check_number("edge_spread", self.edge_spread)
        if not 0 <= self.edge_spread <= 1:
            raise ValueError(f"edge_spread must lie in [0, 1], got edge_spread={self.edge_spread}")


@torch.no_grad()
def accdiffusion(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    options: AccDiffusion,
    *,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool | None = None,
) -> list[Stage]:
    """AccDiffusion, arXiv:2407.10738: patch-content-aware prompts, and dilated sampling with window interaction.

    Phases, views, skip residuals and blur are DemoFusion's. The maps are recorded in the first phase, at the U-Net's coarsest level; the
    mask of a token is enlarged to the phase's grid by nearest neighbours and is zero on the margin. Views lie on that coarse grid and are
    moved once for each phase. The kept tokens of a view are decoded one by one and joined by spaces; a view may keep none. The negative
    prompt is the same everywhere. Window interaction permutes among the dilated samples of one batch, s x s of them at most `view_batch`.

    With `options.controlnet` the views of the phases after the first also get the edges of the previous phase's picture, at all steps, as
    in the second version; the dilated samples do not. All views cover the picture, as in DemoFusion here, so no latent has to be taken from
    elsewhere.

    Args:
        pipe: A text-to-image pipeline with a U-Net, a DDIM or Euler scheduler, and a tokenizer. Its state is restored afterwards.
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
        ValueError: As `demofusion`; also if a phase or the stride is no multiple of a coarse token, or the ControlNet is for another U-Net.
        TypeError: `options.controlnet` is neither a ControlNet nor a folder.
        ImportError: There is a ControlNet, and OpenCV is not installed.
        NotImplementedError: As `demofusion`; also without classifier-free guidance, for several pictures at once, for prompts given as
            embeddings, and for U-Nets without cross-attention at their coarsest level.
    """
    arguments = running.complete_arguments(pipe, arguments, settings)
    if len(phase_sizes(pipe, *size)) == 1:  # without views
        return run_phases(pipe, arguments, size, settings, options, Canvas.of, name=_NAME, on_stage=on_stage, progress=progress)
    _check(pipe, arguments)
    unet: Any = denoiser_of(pipe)
    k = 2 ** (len(unet.down_blocks) - 1)
    base, *above = (latent_size(pipe, pixels) for pixels in phase_sizes(pipe, *size))
    for grid in (base, *above):
        if grid[0] % k or grid[1] % k:
            factor = k * pixels_per_latent(pipe)
            raise ValueError(f"phases must be multiples of {factor} pixels, one token of the coarsest level, got {grid=} in latents")
    for phase, pixels in enumerate(phase_sizes(pipe, *size)[1:], 2):
        plain = Canvas.of(pipe, pixels, phase, options, None)
        if any(side % k for side in (*plain.window, *plain.stride)):
            raise ValueError(f"stride must be a multiple of {k} latents, one token of the coarsest level, got stride={plain.stride[0]}")
    controlnet = None if options.controlnet is None else resolve_controlnet(pipe, options.controlnet)
    last: list[Stage] = []  # the phase before

    def finished(stage: Stage) -> None:
        last[:] = [stage]
        if on_stage is not None:
            on_stage(stage)

    with recorded_maps(unet, (base[0] // k, base[1] // k)) as maps:

        def canvas_of(pipe: Any, pixels: Grid, phase: int, options: Any, jitter: torch.Generator | None) -> Canvas:
            maps.stop()
            plain = Canvas.of(pipe, pixels, phase, options, jitter)
            canvas = PromptedCanvas.on(plain, pipe, arguments, token_masks(maps.mean()), coarse=k)
            return canvas if controlnet is None else canvas.with_edges(controlnet, last[0].images[0])

        return run_phases(pipe, arguments, size, settings, options, canvas_of, name=_NAME, on_stage=finished, progress=progress)


def _check(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise the errors of this method alone before anything is computed."""
    if not hasattr(denoiser_of(pipe), "down_blocks"):
        raise NotImplementedError(f"{_NAME} needs a U-Net, got {type(denoiser_of(pipe)).__name__}")
    if not isinstance(arguments.get("prompt"), str) or (arguments.get("num_images_per_prompt") or 1) != 1:
        raise NotImplementedError(f"{_NAME} draws one picture at a time, from a prompt as text")
    if arguments.get("prompt_2") is not None:
        raise NotImplementedError(f"{_NAME} has the same prompt for all text encoders, got prompt_2={arguments['prompt_2']!r}")
    scale = arguments[cascade_of(pipe).guidance]
    if not scale > 1:
        raise NotImplementedError(f"{_NAME} needs classifier-free guidance, got {cascade_of(pipe).guidance}={scale}")


@dataclass(frozen=True)
class PromptedCanvas(Canvas):
    """A canvas whose views have texts of their own, and whose dilated samples exchange latents.

    Attributes:
        corners: Corners of the views on the padded picture, the same at all steps.
        padding: Margin in latents.
        texts: The text of each view.
        ratio: Guidance scale of the views over that of the pipeline's call.
        shuffle: Generator of the permutations.
        control: The ControlNet of the views.
    """

    corners: tuple[Grid, ...]
    padding: Grid
    texts: tuple[Text, ...]
    ratio: float
    shuffle: torch.Generator
    control: EdgeControl | None = None

    @classmethod
    def on(cls, plain: Canvas, pipe: Any, arguments: Mapping[str, Any], masks: Tensor, *, coarse: int) -> PromptedCanvas:
        """The canvas of a phase for the masks `[T, Y, X]` of tokens, with `coarse` latents per token of their level along an axis."""
        size, window, stride = ((y // coarse, x // coarse) for y, x in (plain.size, plain.window, plain.stride))
        grid = replace(plain, size=size, window=window, stride=stride)
        where, (y, x) = grid.jittered(), grid.margin
        enlarged = F.pad(F.interpolate(masks[None], size=size, mode="nearest")[0], (x, x, y, y))
        covered = [enlarged[:, i : i + window[0], j : j + window[1]].mean((1, 2)) for i, j in where]
        options: Any = plain.options
        prompts = [_remaining_prompt(pipe, arguments["prompt"], (share >= options.threshold).tolist()) for share in covered]
        known = {prompt: _encode(pipe, arguments, prompt) for prompt in dict.fromkeys(prompts)}
        scale, local = arguments[cascade_of(pipe).guidance], options.local_guidance_scale
        local = local if local is not None else _LOCAL_GUIDANCE if takes_size_conditioning(pipe) else scale
        first = arguments["generator"][0] if isinstance(arguments["generator"], list) else arguments["generator"]
        seed = int(torch.randint(1 << 62, (), generator=first, device=first.device))
        return cls(
            **{one.name: getattr(plain, one.name) for one in fields(plain)},
            corners=tuple((coarse * i, coarse * j) for i, j in where),
            padding=(coarse * y, coarse * x),
            texts=tuple(known[prompt] for prompt in prompts),
            ratio=local / scale,
            shuffle=torch.Generator().manual_seed(seed),
        )

    def with_edges(self, controlnet: Any, picture: Any) -> PromptedCanvas:
        """The canvas whose views get the edges of a PIL picture through a ControlNet."""
        options: Any = self.options
        control = EdgeControl.of(
            controlnet,
            picture,
            scale=options.controlnet_scale,
            spread=options.edge_spread,
            size=self.size,
            margin=self.padding,
            corners=self.corners,
            window=self.window,
            pixels=self.pixels,
        )
        return replace(self, control=control)

    @property
    def margin(self) -> Grid:
        return self.padding

    def jittered(self) -> list[Grid]:
        return list(self.corners)

    def denoise_views(self, denoise: Denoise, views: Sequence[Tensor], *, crops: Sequence[Grid]) -> Iterable[Tensor]:
        """The pipeline adds its scale times the difference of the halves to the first one; views have a scale of their own."""
        for output in denoise(views, crops=crops, texts=self.texts, control=self.control):
            unconditional, conditional = output.chunk(2)
            yield torch.cat([unconditional, unconditional + self.ratio * (conditional - unconditional)])

    def denoise_samples(self, denoise: Denoise, samples: Sequence[Tensor]) -> Iterable[Tensor]:
        """Both halves of guidance are permuted alike, so undoing it on the halves is undoing it on the guided output."""
        for first in range(0, len(samples), self.options.view_batch):
            given = torch.stack(list(samples[first : first + self.options.view_batch]))  # [S, B, C, y, x]
            order = torch.rand(len(given), *given.shape[2:], generator=self.shuffle).argsort(0).to(given.device)
            order = order[:, None].expand_as(given)
            outputs = torch.stack(list(denoise(list(given.gather(0, order)))))
            yield from torch.empty_like(outputs).scatter_(0, order, outputs)


def _remaining_prompt(pipe: Any, prompt: str, remains: Sequence[bool]) -> str:
    """The tokens of the prompt that remain, decoded one by one and joined by spaces."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    special = tokenizer.all_special_ids
    words = [tokenizer.decode([token]) for token, stays in zip(ids, remains, strict=True) if stays and token not in special]
    return " ".join(words)


def _encode(pipe: Any, arguments: Mapping[str, Any], prompt: str) -> Text:
    """The text of a prompt and of the run's negative prompt, as the pipeline gives it to its U-Net."""
    names = ("negative_prompt", "negative_prompt_2", "clip_skip")
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    device = pipe._execution_device
    found = pipe.encode_prompt(prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True, **given)
    tokens = torch.cat([found[1], found[0]]).to(pipe.unet.dtype)
    return Text(tokens, torch.cat([found[3], found[2]]).to(pipe.unet.dtype) if len(found) == 4 else None)
