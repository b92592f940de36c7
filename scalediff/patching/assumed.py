"""The cascade of a pipeline whose denoiser belongs to no known family, from what its classes say; every guess is told to the user."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.families import family_of
from scalediff.families.base import Cascade, Family
from scalediff.families.unlisted import patch_size_of
from scalediff.patching.networks import is_text_to_image, may_edit_picture, original_call
from scalediff.settings import derived_presets

_GUIDANCE = ("guidance_scale", "true_cfg_scale")  # the usual names, in this order


def with_assumed_cascade(pipe: Any, denoiser: nn.Module, family: Family, patch_size: int | None) -> Family:
    """The family with a cascade from assumptions, if the denoiser is unknown and the pipeline draws from text through an autoencoder.

    Args:
        pipe: A pipeline, or a module, whose family is returned as it is.
        denoiser: Its denoiser.
        family: The family of this one denoiser, from what the user says about its tokens.
        patch_size: Latents per token along an axis, if the user says so.
    """
    known = family_of(denoiser) is not None or isinstance(pipe, nn.Module)
    if known or not is_text_to_image(type(pipe)) or may_edit_picture(type(pipe)):
        return family
    if not all(hasattr(pipe, name) for name in ("vae", "vae_scale_factor", "image_processor", "scheduler")):
        return family
    return replace(family, cascade=_assumed_cascade(pipe, denoiser, patch_size))


def _assumed_cascade(pipe: Any, denoiser: nn.Module, patch_size: int | None) -> Cascade:
    parameters = inspect.signature(original_call(pipe)).parameters
    defaults = {name: one.default for name, one in parameters.items()}
    packed = hasattr(type(pipe), "_pack_latents")
    patch = patch_size or (2 if packed else patch_size_of(denoiser) or 1)
    guidance = next((name for name in _GUIDANCE if name in parameters), _GUIDANCE[0])
    steps, scale = defaults.get("num_inference_steps"), defaults.get(guidance)
    presets = derived_presets(steps=steps if isinstance(steps, int) else 50, guidance_scale=float(scale or 1.0))
    chosen = presets["default"].settings
    form = "as packed tokens" if packed else "[B, C, Y, X]"
    assumed = (
        f"{type(denoiser).__name__} belongs to no known family: the cascade assumes that {type(pipe).__name__} has latents {form}, "
        f"{patch} x {patch} of them in a token, scaled as the autoencoder's config says, and takes {guidance}; "
        f"default: {chosen.steps} steps with {guidance}={chosen.guidance_scale}"
    )
    return Cascade(
        lambda denoiser: presets,
        patch=patch,
        form="tokens" if packed else "grid",
        guidance=guidance,
        tested="nothing: its family is not known",
        assumed=assumed,
    )
