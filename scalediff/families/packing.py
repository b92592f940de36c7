"""The forms in which pipelines hold latents: as a grid, with the latents of a token as channels, or as a sequence of tokens.

Legend: B batch, C channels, Y x X latent grid, p latents per token along an axis.
"""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor

from scalediff_kernels import packed_view

# "grid" [B, C, Y, X]; "patches" [B, p^2 C, Y / p, X / p]; "tokens" [B, Y X / p^2, p^2 C].
Form = Literal["grid", "patches", "tokens"]

_AXES = {"grid": "b c (y i) (x j)", "patches": "b (c i j) y x", "tokens": "b (y x) (c i j)"}


def arrange(latents: Tensor, form: Form, patch: int = 2) -> Tensor:
    """Latents `[B, C, Y, X]` in another form."""
    arranged: Tensor = rearrange(latents, f"{_AXES['grid']} -> {_AXES[form]}", i=patch, j=patch)
    return arranged


def restore(arranged: Tensor, form: Form, grid: tuple[int, int], patch: int = 2) -> Tensor:
    """The inverse of `arrange`, for a latent grid `(Y, X)`."""
    sizes = {"y": grid[0] // patch, "x": grid[1] // patch, "i": patch, "j": patch}
    latents: Tensor = rearrange(arranged, f"{_AXES[form]} -> {_AXES['grid']}", **sizes)
    return latents


def as_picture(arranged: Tensor, form: Form, grid: tuple[int, int], patch: int = 2) -> Tensor:
    """A view of latents that the filters accept as a picture: `[B, C, Y, X]`, or `[B, C, Y / p, p, X / p, p]` of the other forms."""
    if form == "grid":
        return arranged
    if form == "tokens":
        return packed_view(arranged, grid=(grid[0] // patch, grid[1] // patch), patch=patch)
    view: Tensor = arranged.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 2, 5, 3)
    return view


def from_picture(picture: Tensor, form: Form) -> Tensor:
    """The inverse of `as_picture`."""
    if form == "grid":
        return picture
    arranged: Tensor = rearrange(picture, f"b c y i x j -> {_AXES[form]}")
    return arranged
