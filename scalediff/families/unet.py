"""diffusers' UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and the embedded model.

Self-attention at several levels of the latent grid, text in cross-attention calls of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.families.base import Family
from scalediff.grid import AttentionSite, Grid
from scalediff.settings import Settings

# arXiv:2510.25818 and the authors' scripts: the setting for SDXL.
_PAPER = Settings(steps=50, restart=0.4, guidance_scale=7.5, lfm_cutoff=0.125, sg_cutoff=0.125)
# The embedded model, whose latent has 16 tokens a side: its own steps; guidance of 1.5, 2, 2.5 and 3 and restart and cutoff of the sweep
# in docs/quality.md (8 pictures a row) by the lowest SWD over all levels.
_SMALL = replace(_PAPER, steps=30, restart=0.3, guidance_scale=1.5)


def _sites(unet: nn.Module) -> tuple[AttentionSite, ...]:
    deepest = len(unet.config.block_out_channels) - 1  # type: ignore[union-attr, arg-type]
    return tuple(
        AttentionSite(name, "cross" if module.is_cross_attention else "self", _level(name, deepest), _obstacle(module))
        for name, module in unet.named_modules()
        if type(module).__name__ == "Attention"
    )


def _obstacle(attention: nn.Module) -> str:
    """diffusers marks the processors that call scaled_dot_product_attention, torch 2's, by their names."""
    processor = type(attention.processor).__name__
    return "" if "2_0" in processor else f"{processor} does not call scaled_dot_product_attention"


def _level(name: str, deepest: int) -> int:
    if down := re.match(r"down_blocks\.(\d+)\.", name):
        return int(down[1])
    if up := re.match(r"up_blocks\.(\d+)\.", name):
        return deepest - int(up[1])
    return deepest


def _native_grid(unet: nn.Module) -> Grid:
    size: Any = unet.config.sample_size  # type: ignore[union-attr]
    if size is None:
        raise ValueError("the U-Net's config must name its native latent size, got sample_size=None")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _latent_grid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    sample = args[0] if args else kwargs["sample"]
    return int(sample.shape[-2]), int(sample.shape[-1])


def _preset(unet: nn.Module) -> Settings:
    return _PAPER if min(_native_grid(unet)) >= 32 else _SMALL


UNET = Family(
    denoiser="UNet2DConditionModel",
    grid_source="sample.shape[-2:], halved per level",
    size_multiple=8,
    sites=_sites,
    native_grid=_native_grid,
    latent_grid=_latent_grid,
    preset=_preset,
)
