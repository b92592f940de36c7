"""Z-Image: a list of latents, text after the image, both filled up to multiples of 32 with tokens that take part."""

from __future__ import annotations

from typing import Any

from torch import nn

from scalediff.families.base import Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, Unreadable
from scalediff.families.rotation import TextRotation
from scalediff.settings import derived_presets

_MULTIPLE = 32


def _up(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    pictures, captions = arguments["x"], arguments["cap_feats"]
    if isinstance(pictures[0], list):
        raise Unreadable("several pictures in a sequence have no common grid")
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) != 1 or next(iter(sizes))[0] != 1:
        raise Unreadable(f"x must be one picture [C, 1, H, W] of one size for all samples, got {sorted(sizes)}")
    size, (_, height, width) = arguments.get("patch_size", 2), next(iter(sizes))
    grid = height // size, width // size
    filling = _up(grid[0] * grid[1]) - grid[0] * grid[1]
    text = tuple(_up(len(caption)) for caption in captions)
    real = tuple(filling + n for n in text)
    joint = Sequence(grid, side="suffix", text=max(real), real=real)
    # The captions' own calls are those of the refiner, whose text attends to itself.
    return Layout(grid, (joint, Sequence(grid, side="suffix", text=filling)), (max(text),), masked=True)


def _native(denoiser: nn.Module) -> Grid:
    return 64, 64  # 1024 pixels; the config does not say


def _rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dims), float(denoiser.config.rope_theta))


# The paper has none: FLUX's restart and cutoffs, and the steps and guidance that the pipeline defaults to.
_PRESETS = derived_presets(steps=50, guidance_scale=5.0)

Z_IMAGE = (
    Family(
        denoiser="ZImageTransformer2DModel",
        grid_source="x[0].shape[-2:] // patch_size",
        text="joint, after the image",
        native_grid=_native,
        layout=_layout,
        role="joint",
        roles=((r"^noise_refiner\.", "self"), (r"^context_refiner\.", "text"), (r"^siglip_refiner\.", "text")),
        rotation=_rotation,
        cascade=Cascade(lambda denoiser: _PRESETS),
    ),
)
