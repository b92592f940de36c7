"""The inputs that several nodes have, as ComfyUI asks for them."""

from __future__ import annotations

from typing import Any, get_args

from scalediff.settings import Jitter
from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.neighborhood.api import TextQueries

Inputs = dict[str, Any]

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


def window_inputs() -> Inputs:
    """Windows and patches."""
    tokens = "in tokens; 0 for the size that the model was trained on"
    return {
        "window_height": ("INT", {"default": 0, "min": 0, "max": 1024, "tooltip": f"Height of the windows {tokens}."}),
        "window_width": ("INT", {"default": 0, "min": 0, "max": 1024, "tooltip": f"Width of the windows {tokens}."}),
        "text_queries": (list(get_args(TextQueries)), {"tooltip": "What text attends to: text and window, averaged over windows; or all."}),
        "text_rope": ("BOOLEAN", {"default": True, "tooltip": "Keep text as far from every window as from a native picture."}),
        "jitter": (list(get_args(Jitter)), {"tooltip": "Move the patches from step to step."}),
        "jitter_seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "tooltip": "Seed of random jitter."}),
    }  # fmt: skip


def sampling_inputs() -> Inputs:
    """Those of ComfyUI's own sampler nodes."""
    import comfy.samplers

    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True}),
        "steps": ("INT", {"default": 50, "min": 1, "max": 10000, "tooltip": "Steps of the whole schedule."}),
        "cfg": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 100.0, "step": 0.1}),
        "sampler_name": (comfy.samplers.KSampler.SAMPLERS,),
        "scheduler": (comfy.samplers.KSampler.SCHEDULERS,),
        "positive": ("CONDITIONING",),
        "negative": ("CONDITIONING",),
    }


def method_inputs() -> Inputs:
    """The settings of a stage."""
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


def change_inputs() -> Inputs:
    """A picture of which a part is kept."""
    white = "One where the picture is drawn anew, of any size with its aspect ratio."
    kept = "Where what the mask keeps comes from, at the size of every stage."
    return {"mask": ("MASK", {"tooltip": white}), "picture": ("IMAGE", {"tooltip": kept})}
