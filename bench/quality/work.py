"""Useful work of one picture by each row of `bench.quality`, counted as in `scalediff.cost.flops` on networks without weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.quality.rows import CASCADES, METHODS
from scalediff.cascade.pipeline import native_size, preset, stage_sizes
from scalediff.cost.flops import FACTOR, autoencoder_work, forward_work
from scalediff.families.grid import Grid
from scalediff.methods.demofusion import phase_sizes
from scalediff.methods.views import corners
from scalediff.patching.networks import denoiser_of
from scalediff.patching.subclass import original_class
from scalediff.settings import Attention


class Work(NamedTuple):
    """GFLOPs of one square picture: of self-attention, and of the denoiser and the autoencoder as a whole."""

    attention: float
    whole: float


def work(pipe: Any, size: int, row: str) -> Work:
    """All stages, and both passes of guidance."""
    with torch.device("meta"):
        denoiser, vae = _without_weights(denoiser_of(pipe)), _without_weights(pipe.vae)
    config, tokens = denoiser.config, pipe.tokenizer.model_max_length
    attention = whole = 0.0
    for latent, kind, passes in _passes(pipe, size, row):
        sample = torch.empty(1, config.in_channels, *latent, device="meta")
        text = torch.empty(1, tokens, config.cross_attention_dim, device="meta")
        one = forward_work(denoiser, {"sample": sample, "timestep": torch.tensor(1.0), "encoder_hidden_states": text}, attention=kind)
        attention += passes * one.attention
        whole += passes * sum(one)
    sizes = _sizes(pipe, size, row)  # every one is decoded, and the next one of a cascade encoded
    for here, after in zip(sizes, [*sizes[1:], None], strict=True):
        y, x = (FACTOR * side // pipe.vae_scale_factor for side in here)  # `autoencoder_work` divides by FACTOR
        whole += autoencoder_work(vae, (y, x), after if row in CASCADES else None)
    return Work(1e3 * attention, 1e3 * whole)


def native_grid(pipe: Any) -> Grid:
    """Latents of a picture of native size."""
    height, width = native_size(pipe)
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def _without_weights(network: nn.Module) -> Any:
    cls: Any = original_class(type(network))
    return cls.from_config(network.config).eval()


def _sizes(pipe: Any, size: int, row: str) -> list[Grid]:
    """Sizes in pixels of everything that is drawn on the way."""
    if row in CASCADES:
        return stage_sizes(pipe, size, size)
    return phase_sizes(pipe, size, size) if row == "demofusion" else [(size, size)]


def _passes(pipe: Any, size: int, row: str) -> list[tuple[Grid, Attention, int]]:
    """Latent grid, attention and number of a row's forward passes, both of guidance counted."""
    settings = replace(preset(pipe), **CASCADES.get(row, {}))
    both = 2 if settings.guidance_scale > 1 else 1
    steps, native = both * settings.steps, native_grid(pipe)
    latents = [(y // pipe.vae_scale_factor, x // pipe.vae_scale_factor) for y, x in _sizes(pipe, size, row)]
    if row in METHODS:
        views = [len(corners(grid, window=native, stride=(native[0] // 2, native[1] // 2))) for grid in latents]
        if row == "demofusion":  # and k^2 dilated samples in phase k
            views = [1, *(count + k**2 for k, count in enumerate(views[1:], start=2))]
        return [(native, "full", steps * sum(views))]
    assert isinstance(settings.guidance_until, float)
    guided = math.ceil(settings.guidance_until * settings.stage_steps)
    above = both * guided + settings.stage_steps - guided
    return [(latents[0], "full", steps), *((grid, settings.attention, above) for grid in latents[1:])]
