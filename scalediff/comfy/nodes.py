"""The nodes: what they are called, which inputs they have, and the checks of these inputs.

ComfyUI shows an exception's message at the node that raised it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, get_args

import torch

from scalediff.comfy.models import attention_of, latents_per_token, native_window, patched, preset, unpatched
from scalediff.comfy.stage import Progress, Sampling, as_picture, run_stage, stage_steps
from scalediff.families.grid import Grid
from scalediff.settings import Jitter, Settings, plan_sizes
from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.neighborhood.api import TextQueries

Inputs = dict[str, Any]

_CATEGORY = "scalediff"
_SMALLEST = 0.75  # of the native area: base pictures of other aspect ratios have about the native area
_LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


def _window_inputs() -> Inputs:
    tokens = "in tokens; 0 for the size that the model was trained on"
    return {
        "window_height": ("INT", {"default": 0, "min": 0, "max": 1024, "tooltip": f"Height of the windows {tokens}."}),
        "window_width": ("INT", {"default": 0, "min": 0, "max": 1024, "tooltip": f"Width of the windows {tokens}."}),
        "text_queries": (list(get_args(TextQueries)), {"tooltip": "What text attends to: text and window, averaged over windows; or all."}),
        "text_rope": ("BOOLEAN", {"default": True, "tooltip": "Keep text as far from every window as from a native picture."}),
        "jitter": (list(get_args(Jitter)), {"tooltip": "Move the patches from step to step."}),
        "jitter_seed": ("INT", {"default": 0, "min": 0, "max": _LARGEST_SEED, "tooltip": "Seed of random jitter."}),
    }  # fmt: skip


def _sampling_inputs() -> Inputs:
    import comfy.samplers

    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": _LARGEST_SEED, "control_after_generate": True}),
        "steps": ("INT", {"default": 50, "min": 1, "max": 10000, "tooltip": "Steps of the whole schedule."}),
        "cfg": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 100.0, "step": 0.1}),
        "sampler_name": (comfy.samplers.KSampler.SAMPLERS,),
        "scheduler": (comfy.samplers.KSampler.SCHEDULERS,),
        "positive": ("CONDITIONING",),
        "negative": ("CONDITIONING",),
    }


def _method_inputs() -> Inputs:
    share = {"min": 0.01, "max": 1.0, "step": 0.005}
    return {
        "preset": (["model", "custom"], {"tooltip": "model: restart and cutoffs of the paper for this model. custom: the three numbers."}),
        "restart": ("FLOAT", {"default": 0.4, **share, "tooltip": "Share of the schedule's steps that a stage runs, the last ones."}),
        "lfm_cutoff": ("FLOAT", {"default": 0.125, **share, "tooltip": "Cutoff of latent frequency mixing, of the Nyquist frequency."}),
        "sg_cutoff": ("FLOAT", {"default": 0.125, **share, "tooltip": "Cutoff of structure guidance, of the Nyquist frequency."}),
        "lfm": ("BOOLEAN", {"default": True, "tooltip": "Latent frequency mixing."}),
        "sg": ("BOOLEAN", {"default": True, "tooltip": "Structure guidance."}),
        "filter": (list(get_args(Kind)), {"tooltip": "Low-pass filter of both."}),
    }


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
                "model": ("MODEL",), **_window_inputs(), "if_not_windowed": (["error", "warning"], {"tooltip": otherwise}),
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
            **_sampling_inputs(), **_method_inputs(),
        }  # fmt: skip
        return {"required": required}

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
    ) -> tuple[Inputs]:
        """Run the node.

        Raises:
            NotImplementedError: The network has no known layout, or the latents are a video.
            ValueError: There is no VAE; the latents are smaller than native; the scale gives no whole number of tokens.
        """
        _check_vae(vae)
        if attention_of(model) is None:
            logging.warning("ScaleDiff: Upscale Stage: the model is not patched, so this stage runs full attention")
        size = _scaled(model, latent["samples"], scale)
        settings = _settings(model, steps, cfg, preset, restart, lfm_cutoff, sg_cutoff, lfm=lfm, sg=sg, kind=filter)
        sampling = Sampling(steps, cfg, sampler_name, scheduler, positive, negative, seed)
        count = stage_steps(sampling.sigmas(model), settings)
        callback = Progress(model, count).run(count)
        return (run_stage(model, vae, latent, size, settings, sampling, callback=callback),)


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
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}), **_sampling_inputs(), **_method_inputs(), **_window_inputs(),
        }  # fmt: skip
        return {"required": required}

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
    ) -> tuple[Inputs, Any]:
        """Run the node. It returns the latents, and the patched model for ScaleDiff: Report.

        Raises:
            NotImplementedError: The network has no known layout.
            ValueError: There is no VAE; a side is no multiple of the pixels per token, or the target is smaller than native.
        """
        _check_vae(vae)
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
        progress = Progress(model, len(schedule) - 1 + count * (len(sizes) - 1))
        latent = {"samples": _empty(model, batch_size, (sizes[0][0] // ratio, sizes[0][1] // ratio))}
        latent = {"samples": sampling.run(unpatched(model), latent, start=0, callback=progress.run(len(schedule) - 1))}
        for number, (y, x) in enumerate(sizes[1:], 1):
            stage = replace(sampling, seed=(seed + number) & _LARGEST_SEED)
            size = y // ratio, x // ratio
            latent = run_stage(windowed, vae, latent, size, settings, stage, callback=progress.run(count))
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


def _scaled(model: Any, latents: torch.Tensor, scale: float) -> Grid:
    """The size of a stage in latents, `(Y, X)`."""
    patch, (y, x) = latents_per_token(model), as_picture(latents).shape[-2:]
    native = native_window(model)
    if native is not None and y * x < _SMALLEST * native[0] * native[1] * patch**2:
        raise ValueError(
            f"the latent is smaller than the model's native size of {native[0] * patch} x {native[1] * patch} latents: draw a picture "
            f"of the native size first, got {y} x {x}"
        )
    size = round(y * scale), round(x * scale)
    if abs(y * scale - size[0]) > 1e-6 or abs(x * scale - size[1]) > 1e-6 or size[0] % patch or size[1] % patch:
        raise ValueError(f"scale must make both sides of the latent multiples of {patch}, got {scale=} for {y} x {x} latents")
    if size[0] * size[1] <= y * x:
        raise ValueError(f"scale must be larger than 1, got {scale=}")
    return size


def _empty(model: Any, batch: int, size: Grid) -> torch.Tensor:
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
