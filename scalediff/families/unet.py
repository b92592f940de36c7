"""diffusers' U-Nets and their ControlNets: Stable Diffusion 1.x, 2.x, XL, the embedded model, and unconditional ones.

They have self-attention at several levels of the latent grid, and separate cross-attention to text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.families.base import BESIDE, Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, level_grid
from scalediff.settings import Preset, Settings

_PAPER = Settings(steps=50, restart=0.4, guidance_scale=7.5, lfm_cutoff=0.125, sg_cutoff=0.125)
_PUBLISHED = "arXiv:2510.25818 and its authors' scripts, for SDXL"
_NEGATIVE = {"negative_prompt": "blurry, ugly, duplicate, poorly drawn, deformed, mosaic"}
# Checkpoints distilled for few steps without guidance. The model cards recommend 4 steps and trailing timesteps; the cutoffs are the
# paper's, and the restart (the last two steps) is our choice.
_FEW = Preset(replace(_PAPER, steps=4, restart=0.5, guidance_scale=0.0), "4 steps, then 2 and 2; not measured yet", spacing="trailing")
_XL = {"default": Preset(_PAPER, _PUBLISHED), "paper": Preset(_PAPER, _PUBLISHED, call=_NEGATIVE), "turbo": _FEW, "lightning": _FEW}
_KOLORS = {
    "default": Preset(replace(_PAPER, guidance_scale=5.0), "the pipeline's own steps and guidance, restart and cutoffs of the paper's SDXL")
}
_OTHERS = {"default": Preset(_PAPER, f"{_PUBLISHED}; the paper has none for this model")}
# The embedded model, with a latent grid of 16 x 16 tokens.
_SMALL = {
    "default": Preset(
        replace(_PAPER, steps=30, restart=0.3, guidance_scale=1.5),
        "steps of the embedded model; of the restarts and cutoffs in docs/evidence/quality.md (8 pictures a row) the one with the power of "
        "true pictures above the native Nyquist frequency, and an SWD within its error of the lowest; guidance of the weights before",
    ),
    "paper": Preset(_PAPER, _PUBLISHED),
}


def _level(unet: nn.Module, name: str) -> int:
    deepest = _deepest(unet)
    if down := re.match(r"down_blocks\.(\d+)\.", name):
        return int(down[1])
    if up := re.match(r"up_blocks\.(\d+)\.", name):
        return deepest - int(up[1])
    return deepest


def _native_grid(unet: nn.Module) -> Grid:
    size: Any = unet.config.sample_size  # type: ignore[union-attr]
    if size is None:
        raise ValueError("the U-Net's config must have its native latent size, got sample_size=None")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _layout(unet: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    y, x = arguments["sample"].shape[-2:]
    text = arguments.get("encoder_hidden_states")
    levels = (Sequence(level_grid((y, x), level), level) for level in range(_deepest(unet) + 1))
    return Layout((y, x), tuple(levels), () if text is None else (text.shape[1],))


def _union_layout(unet: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    """The conditions also attend to each other, with one token for each and one for the picture."""
    layout = _layout(unet, arguments, read)
    return replace(layout, others=(*layout.others, len(arguments["controlnet_cond"]) + 1))


def _deepest(unet: nn.Module) -> int:
    return len(unet.config.block_out_channels) - 1  # type: ignore[union-attr, arg-type]


def _presets(unet: nn.Module) -> Mapping[str, Preset]:
    if unet.config.encoder_hid_dim_type == "text_proj":  # type: ignore[union-attr]
        return _KOLORS
    if min(_native_grid(unet)) < 32:
        return _SMALL
    return _XL if unet.config.addition_embed_type == "text_time" else _OTHERS  # type: ignore[union-attr]


_UNET = Family(
    denoiser="UNet2DConditionModel",
    grid_source="sample.shape[-2:], halved per level",
    text="cross-attention",
    native_grid=_native_grid,
    layout=_layout,
    roles=((r"\.attn2$", "cross"),),
    level=_level,
    wraps=True,
    bands=True,
    cascade=Cascade(
        _presets,
        patch=1,
        size_multiple=8,
        conditional="last",
        tested="the embedded model; small models with random weights",
    ),
)


def _no_grid(denoiser: nn.Module) -> None:
    return None


_CONTROL = replace(_UNET, denoiser="ControlNetModel", native_grid=_no_grid, bands=False, cascade=None, no_cascade=BESIDE)  # U-Net's size
_UNCONDITIONAL = replace(_UNET, denoiser="UNet2DModel", text="none", cascade=None, no_cascade="it draws without a prompt")
UNETS = (_UNET, _UNCONDITIONAL, _CONTROL, replace(_CONTROL, denoiser="ControlNetUnionModel", layout=_union_layout))
