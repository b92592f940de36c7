"""Given pictures and masks at the size of a stage.

Legend: B batch, Y x X latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def picture_at(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures `[B, 3, y, x]` at (height, width) = `size`, by bicubic interpolation that is antialiased where it shrinks."""
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return F.interpolate(picture, size=tuple(size), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def mask_at(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks `[B, 1, y, x]` of zeros and ones at (height, width) = `size`: one where a half or more of the area is one."""
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    return (F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=False, antialias=True) >= 0.5).to(mask)


def mask_of_latents(mask: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Boolean `[B, 1, Y, X]` of a latent grid `(Y, X)`, from a mask at `size`, by the rule of diffusers' inpainting: the nearest pixel."""
    return F.interpolate(mask_at(mask, size), size=tuple(grid)) >= 0.5


def pictures_at(arguments: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The picture and mask among the arguments of a call that changes a picture, at the size of a stage.

    The cascade holds pictures as `[B, 3, y, x]` in [-1, 1]; the pipelines take [0, 1].
    """
    found = {"image": picture_at(arguments["image"], size) / 2 + 0.5}
    if arguments.get("mask_image") is not None:
        found["mask_image"] = mask_at(arguments["mask_image"], size)
    return found
