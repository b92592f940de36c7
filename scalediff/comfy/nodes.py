"""The nodes: what they are called, which inputs they have, and the checks of these inputs.

ComfyUI shows an exception's message at the node that raised it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.changing import has_aspect_ratio
from scalediff.comfy.inputs import LARGEST_SEED, Inputs, change_inputs, method_inputs, sampling_inputs, window_inputs
from scalediff.comfy.models import attention_of, latents_per_token, native_window, patched, preset, unpatched
from scalediff.comfy.stage import Progress, Sampling, as_noise_mask, as_picture, encoded_at, run_stage, stage_steps
from scalediff.families.grid import Grid
from scalediff.settings import Jitter, Settings, plan_sizes
from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.neighborhood.api import TextQueries

_CATEGORY = "scalediff"
_SMALLEST = 0.75  # of the native area: base pictures of other aspect ratios have about the native area


class PatchModel:
    """Compute image self-attention in windows above the model's native size."""

    CATEGORY, FUNCTION = _CATEGORY, "patch"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The inputs of the node."""
        otherwise = "Above the native size, when no attention call can be computed in windows."
        return {
            "required": {
                "model": ("MODEL",), **window_inputs(), "if_not_windowed": (["error", "warning"], {"tooltip": otherwise}),
            }
        }  # fmt: skip

    def patch(
        self,
        model: Any,
        window_height: int,
        window_width: int,
        text_queries: TextQueries,
        text_rope: bool,
        jitter: Jitter,
        jitter_seed: int,
        if_not_windowed: str,
    ) -> tuple[Any]:
        """Run the node; raises as `scalediff.comfy.models.patched`."""
        window, strict = (window_height, window_width), if_not_windowed == "error"
        options: Inputs = {"text_queries": text_queries, "text_rope": text_rope, "jitter": jitter, "seed": jitter_seed}
        return (patched(model, window, **options, strict=strict),)


class UpscaleStage:
    """Enlarge a finished picture by up to twice its size: upsample, add noise, denoise with structure guidance."""

    CATEGORY, FUNCTION = _CATEGORY, "upscale"
    RETURN_TYPES = ("LATENT",)
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The inputs of the node."""
        scale = {"default": 2.0, "min": 1.0, "max": 2.0, "step": 0.0625, "tooltip": "Factor of both sides, up to 2."}
        required = {
            "model": ("MODEL",), "vae": ("VAE",), "latent": ("LATENT",), "scale": ("FLOAT", scale),
            **sampling_inputs(), **method_inputs(),
        }  # fmt: skip
        return {"required": required, "optional": change_inputs()}

    def upscale(
        self,
        model: Any,
        vae: Any,
        latent: Inputs,
        scale: float,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        preset: str,
        restart: float,
        lfm_cutoff: float,
        sg_cutoff: float,
        lfm: bool,
        sg: bool,
        filter: Kind,
        mask: Tensor | None = None,
        picture: Tensor | None = None,
    ) -> tuple[Inputs]:
        """Run the node.

        Args:
            mask: `[B, height, width]`, in place of the latent's own.
            picture: `[B, height, width, 3]` in [0, 1]. What the mask keeps comes from it, or else from the latent.

        Raises:
            NotImplementedError: The network has no known layout, or the latents are a video.
            ValueError: There is no VAE; the latents are smaller than native; the scale gives no whole number of tokens, or leaves the size
                without a mask; mask or picture have another aspect ratio than the latent, or there is a picture without a mask.
        """
        _check_vae(vae)
        if mask is not None:
            latent = {**latent, "noise_mask": as_noise_mask(mask)}
        if picture is not None and "noise_mask" not in latent:
            raise ValueError("the picture is for what a mask keeps, got no mask: connect one, or a latent that has one")
        grid = as_picture(latent["samples"]).shape[-2:]
        _check_ratios((grid[0], grid[1]), mask=mask, picture=picture)
        if attention_of(model) is None:
            logging.warning("ScaleDiff: Upscale Stage: the model is not patched, so this stage runs full attention")
        size = _scaled(model, (grid[0], grid[1]), scale, masked="noise_mask" in latent)
        settings = _settings(model, steps, cfg, preset, restart, lfm_cutoff, sg_cutoff, lfm=lfm, sg=sg, kind=filter)
        sampling = Sampling(steps, cfg, sampler_name, scheduler, positive, negative, seed)
        count = stage_steps(sampling.sigmas(model), settings)
        callback = Progress(model, count).run(count)
        return (run_stage(model, vae, latent, size, settings, sampling, callback=callback, picture=picture),)


class CascadeSampler:
    """Draw a picture above the native size: a base picture with full attention, then stages of twice the size up to the target."""

    CATEGORY, FUNCTION = _CATEGORY, "draw"
    RETURN_TYPES = ("LATENT", "MODEL")
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The inputs of the node."""
        pixels = {"default": 2048, "min": 16, "max": 16384, "step": 8, "tooltip": "In pixels, of the last stage."}
        required = {
            "model": ("MODEL",), "vae": ("VAE",), "width": ("INT", pixels), "height": ("INT", pixels),
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}), **sampling_inputs(), **method_inputs(), **window_inputs(),
        }  # fmt: skip
        share = {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01, "tooltip": "Share of the schedule that redraws the picture."}
        return {"required": required, "optional": {**change_inputs(), "strength": ("FLOAT", share)}}

    def draw(
        self,
        model: Any,
        vae: Any,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        preset: str,
        restart: float,
        lfm_cutoff: float,
        sg_cutoff: float,
        lfm: bool,
        sg: bool,
        filter: Kind,
        window_height: int,
        window_width: int,
        text_queries: TextQueries,
        text_rope: bool,
        jitter: Jitter,
        jitter_seed: int,
        mask: Tensor | None = None,
        picture: Tensor | None = None,
        strength: float = 1.0,
    ) -> tuple[Inputs, Any]:
        """Run the node. It returns the latents, and the patched model for ScaleDiff: Report.

        Args:
            mask: `[B, height, width]`, one where the picture is drawn anew.
            picture: `[B, height, width, 3]` in [0, 1], which the base picture starts from.
            strength: Share of the schedule that is run on the picture at the native size.

        Raises:
            NotImplementedError: The network has no known layout.
            ValueError: There is no VAE; a side is no multiple of the pixels per token, or the target is smaller than native; mask or
                picture have another aspect ratio than the target, or there is a mask or a strength without a picture.
        """
        _check_vae(vae)
        if picture is None and (mask is not None or strength < 1):
            raise ValueError(
                f"mask and strength change a picture, got no picture beside {'a mask' if mask is not None else f'{strength=}'}"
            )
        _check_ratios((height, width), mask=mask, picture=picture)
        options: Inputs = {"text_queries": text_queries, "text_rope": text_rope, "jitter": jitter, "seed": jitter_seed}
        windowed = patched(model, (window_height, window_width), **options)
        settings = _settings(model, steps, cfg, preset, restart, lfm_cutoff, sg_cutoff, lfm=lfm, sg=sg, kind=filter)
        native, ratio = native_window(windowed), vae.spacial_compression_decode()
        assert native is not None  # of a patched model it is the window
        pixels = ratio * latents_per_token(model)
        sizes = plan_sizes((height, width), native=(native[0] * pixels, native[1] * pixels), multiple=pixels)
        sampling = Sampling(steps, cfg, sampler_name, scheduler, positive, negative, seed)
        schedule = sampling.sigmas(model)
        count = stage_steps(schedule, settings)
        of_base = stage_steps(schedule, replace(settings, restart=strength))
        progress = Progress(model, of_base + count * (len(sizes) - 1))
        base = sizes[0][0] // ratio, sizes[0][1] // ratio
        samples = _empty(model, batch_size, base) if picture is None else encoded_at(vae, picture, base, batch_size)
        latent = {"samples": samples} if mask is None else {"samples": samples, "noise_mask": as_noise_mask(mask)}
        start = len(schedule) - 1 - of_base
        latent |= {"samples": sampling.run(unpatched(model), latent, start=start, callback=progress.run(of_base))}
        kept = None if mask is None else picture
        for number, (y, x) in enumerate(sizes[1:], 1):
            stage = replace(sampling, seed=(seed + number) & LARGEST_SEED)
            size = y // ratio, x // ratio
            latent = run_stage(windowed, vae, latent, size, settings, stage, callback=progress.run(count), picture=kept)
        return latent, windowed


class Report:
    """Show what the last pass above the native size did. It runs after the node that the latent comes from."""

    CATEGORY, FUNCTION = _CATEGORY, "report"
    RETURN_TYPES = ("LATENT", "STRING")
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The inputs of the node."""
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, model: Any, latent: Any) -> float:
        """Different from itself, so that ComfyUI always runs the node."""
        return float("nan")

    def report(self, model: Any, latent: Inputs) -> Inputs:
        """Run the node.

        Raises:
            ValueError: The model is not patched.
        """
        attention = attention_of(model)
        if attention is None:
            raise ValueError("ScaleDiff: Report needs the model of ScaleDiff: Patch Model or ScaleDiff: Cascade Sampler")
        text = attention.report()
        return {"ui": {"text": [text]}, "result": (latent, text)}


def _check_vae(vae: Any) -> None:
    if vae is None:
        raise ValueError("ScaleDiff needs a VAE to enlarge the picture: this checkpoint has none, add a Load VAE node")


def _settings(
    model: Any,
    steps: int,
    cfg: float,
    chosen: str,
    restart: float,
    lfm_cutoff: float,
    sg_cutoff: float,
    *,
    lfm: bool,
    sg: bool,
    kind: Kind,
) -> Settings:
    """The settings of a stage, with the numbers of the model's preset or those of the node."""
    custom = {"restart": restart, "lfm_cutoff": lfm_cutoff, "sg_cutoff": sg_cutoff}
    base = preset(model)
    return replace(base, steps=steps, guidance_scale=cfg, lfm=lfm, sg=sg, filter=kind, **(custom if chosen == "custom" else {}))  # type: ignore[arg-type]


def _check_ratios(size: Grid, *, mask: Tensor | None, picture: Tensor | None) -> None:
    """Check that mask and picture have the aspect ratio of a (height, width)."""
    given = {"mask": None if mask is None else mask.shape[-2:], "picture": None if picture is None else picture.shape[1:3]}
    for name, found in given.items():
        if found is not None and not has_aspect_ratio((found[0], found[1]), size):
            raise ValueError(f"the {name} must have the aspect ratio of {size[0]} x {size[1]}, got {found[0]} x {found[1]}")


def _scaled(model: Any, grid: Grid, scale: float, *, masked: bool) -> Grid:
    """The size of a stage in latents, `(Y, X)`; with a mask it may be that of the stage before."""
    patch, (y, x) = latents_per_token(model), grid
    native = native_window(model)
    if native is not None and y * x < _SMALLEST * native[0] * native[1] * patch**2:
        raise ValueError(
            f"the latent is smaller than the model's native size of {native[0] * patch} x {native[1] * patch} latents: draw a picture "
            f"of the native size first, got {y} x {x}"
        )
    size = round(y * scale), round(x * scale)
    if abs(y * scale - size[0]) > 1e-6 or abs(x * scale - size[1]) > 1e-6 or size[0] % patch or size[1] % patch:
        raise ValueError(f"scale must make both sides of the latent multiples of {patch}, got {scale=} for {y} x {x} latents")
    if size[0] * size[1] <= y * x and not masked:
        raise ValueError(f"scale must be larger than 1 without a mask, got {scale=}")
    return size


def _empty(model: Any, batch: int, size: Grid) -> Tensor:
    """Zeros in the shape of the model's latents."""
    latent_format = model.get_model_object("latent_format")
    frames = (1,) * (latent_format.latent_dimensions - 2)
    return torch.zeros(batch, latent_format.latent_channels, *frames, *size)


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "ScaleDiffPatchModel": PatchModel,
    "ScaleDiffUpscaleStage": UpscaleStage,
    "ScaleDiffCascadeSampler": CascadeSampler,
    "ScaleDiffReport": Report,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ScaleDiffPatchModel": "ScaleDiff: Patch Model",
    "ScaleDiffUpscaleStage": "ScaleDiff: Upscale Stage",
    "ScaleDiffCascadeSampler": "ScaleDiff: Cascade Sampler",
    "ScaleDiffReport": "ScaleDiff: Report",
}
