"""Where the token grid of an attention call comes from.

A call to scaled_dot_product_attention says how many tokens there are, never how they lie. What is missing comes from two
places: the denoiser's input gives the latent grid of this forward pass, and the attention module gives the level it works at.

Legend: B batch, H heads, Y x X token grid, D head dim, S = Y * X tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor

Grid = tuple[int, int]
Role = Literal["self", "cross"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a denoiser.

    Attributes:
        name: Its path in the denoiser.
        role: What it attends to.
        level: How often its grid has been halved.
        obstacle: Why its self-attention cannot be intercepted; empty where it can.
    """

    name: str
    role: Role
    level: int
    obstacle: str = ""


def level_grid(latent: Grid, level: int) -> Grid:
    """The token grid after `level` stride-2 convolutions with padding 1, each of which rounds up."""
    y, x = latent
    for _ in range(level):
        y, x = (y + 1) // 2, (x + 1) // 2
    return y, x


def window_of(native: Grid, level: int) -> Grid:
    """The key window in tokens: the model's native token grid at that level."""
    return level_grid(native, level)


def patch_of(native: Grid, level: int) -> Grid:
    """The query patch in tokens: half the window, as in the paper."""
    y, x = window_of(native, level)
    return max(1, y // 2), max(1, x // 2)


def to_grid(x: Tensor, grid: Grid) -> Tensor:
    """`[B, H, S, D]` as `[B, Y, X, H, D]`, a view whatever the strides."""
    return rearrange(x, "b h (y x) d -> b y x h d", y=grid[0], x=grid[1])


def from_grid(x: Tensor) -> Tensor:
    """`[B, Y, X, H, D]` as `[B, H, S, D]`."""
    return rearrange(x, "b y x h d -> b h (y x) d")
