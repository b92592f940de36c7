"""Z-Image: a list of latents, text after the image, both padded to multiples of 32 with tokens that are attended to."""

from __future__ import annotations

from typing import Any

from torch import nn

from scalediff.families.base import Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, UnknownLayout
from scalediff.families.rotation import TextRotation
from scalediff.settings import derived_presets

_MULTIPLE = 32


def _round_up(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _layout(denoiser: nn.Module, arguments: Arguments, read: Reader) -> Layout:
    pictures, captions = arguments["x"], arguments["cap_feats"]
    if isinstance(pictures[0], list):
        raise UnknownLayout("several pictures in one sequence are not supported")
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) != 1 or next(iter(sizes))[0] != 1:
        raise UnknownLayout(f"x must hold one picture [C, 1, H, W] per sample, all of one size, got {sorted(sizes)}")
    size, (_, height, width) = arguments.get("patch_size", 2), next(iter(sizes))
    grid = height // size, width // size
    padding = _round_up(grid[0] * grid[1]) - grid[0] * grid[1]
    text = tuple(_round_up(len(caption)) for caption in captions)
    real = tuple(padding + n for n in text)
    joint = Sequence(grid, side="suffix", text=max(real), real=real)
    # The captions alone attend to themselves in the text refiner.
    return Layout(grid, (joint, Sequence(grid, side="suffix", text=padding)), (max(text),), masked=True)


def _native(denoiser: nn.Module) -> Grid:
    return 64, 64  # 1024 pixels; not in the config


def _rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dims), float(denoiser.config.rope_theta))


# Not in the paper: restart and cutoffs of FLUX, the pipeline's default steps and guidance.
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
