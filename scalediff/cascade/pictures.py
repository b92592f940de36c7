"""Pictures and latents in another size; given pictures and masks at the size of a stage.

Legend: B batch, Y x X latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BEHIND_MASK = "black"  # what is transparent in a mask is kept, whatever colour the file hides there


def upsampled(x: Tensor, size: Sequence[int], *, wrap: tuple[bool, bool] = (False, False), antialias: bool = False) -> Tensor:
    """Bicubic resizing of latents or pictures `[B, C, y, x]` to a size `(Y, X)`, which crosses the border along axes that wrap."""
    resized, cut = list(size), []
    for axis, (before, after, on) in enumerate(zip(x.shape[-2:], size, wrap, strict=True)):
        if on:  # resized with some of the other side on both sides, as far as the weights reach, in whole pixels before and after
            whole = before // math.gcd(before, after)
            margin = -(-(3 + 2 * before // after) // whole) * whole
            x = around(x, axis, margin)
            cut.append((axis - 2, margin * after // before, after))
            resized[axis] = after + 2 * (margin * after // before)
    out = F.interpolate(x, size=tuple(resized), mode="bicubic", align_corners=False, antialias=antialias)
    for dim, margin, length in cut:
        out = out.narrow(dim, margin, length)
    return out


def rgb(image: Any, *, behind: str = "white") -> Any:
    """A PIL picture as RGB of 8 bits, with a colour behind what is transparent.

    Pillow itself shows the colours that a transparent file hides, and cuts grey levels of more bits off at 255.

    Raises:
        ValueError: The picture has levels of 32 bits or fractions, of which it does not say what is white.
    """
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ValueError(f"a picture must have levels of 8 bits, or of 16 bits in mode I;16: convert it first, got {image.mode=!r}")
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # a level of 16 bits, which 8 do not tell from its neighbours
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image.convert("RGBA"))
    return image.convert("RGB")


def upright_rgb(image: Any, *, behind: str = "white") -> Any:
    """As `rgb`, rotated upright by the picture's EXIF data; the first one of an animation."""
    from PIL import ImageOps

    return rgb(ImageOps.exif_transpose(image), behind=behind)


def around(x: Tensor, axis: int, margin: int) -> Tensor:
    """A picture `[B, C, Y, X]` with `margin` pixels of the other side at both ends of an axis, 0 or 1."""
    places = torch.arange(-margin, x.shape[axis - 2] + margin, device=x.device) % x.shape[axis - 2]
    return x.index_select(axis - 2, places)


def picture_at(picture: Tensor, size: tuple[int, int], *, wrap: tuple[bool, bool] = (False, False)) -> Tensor:
    """Pictures `[B, 3, y, x]` at (height, width) = `size`, by bicubic interpolation that is antialiased where it shrinks.

    Along axes that wrap, pixels at the border are also made of those at the other side.
    """
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return upsampled(picture, size, wrap=wrap, antialias=True).clamp(-1, 1)


def mask_at(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks `[B, 1, y, x]` of zeros and ones at (height, width) = `size`: one where a half or more of the area is one."""
    if tuple(mask.shape[-2:]) == tuple(size):
        return mask
    return (F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=False, antialias=True) >= 0.5).to(mask)


def mask_of_latents(mask: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Boolean `[B, 1, Y, X]` of a latent grid `(Y, X)`, from a mask at `size`, by the rule of diffusers' inpainting: the nearest pixel."""
    return F.interpolate(mask_at(mask, size), size=tuple(grid)) >= 0.5


def pictures_at(arguments: Mapping[str, Any], size: tuple[int, int], *, wrap: tuple[bool, bool] = (False, False)) -> dict[str, Any]:
    """The picture and mask among the arguments of a call that changes a picture, at the size of a stage.

    The cascade holds pictures as `[B, 3, y, x]` in [-1, 1]; the pipelines take [0, 1].
    """
    found = {"image": picture_at(arguments["image"], size, wrap=wrap) / 2 + 0.5}
    if arguments.get("mask_image") is not None:
        found["mask_image"] = mask_at(arguments["mask_image"], size)
    return found
