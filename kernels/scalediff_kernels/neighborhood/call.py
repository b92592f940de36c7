"""One call of an attention kernel: its tensors with the geometry of their patches, from which the launch configuration follows.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

from scalediff_kernels.neighborhood.config import MIN_BLOCK, Problem, ceil_power_of_two
from scalediff_kernels.neighborhood.geometry import patch_count
from scalediff_kernels.neighborhood.strides import suits_descriptor


@dataclass(frozen=True)
class Call:
    """Arguments as in `api`, already checked."""

    queries: Literal["image", "text"]
    q: Tensor  # [B, Y, X, H, D], or text queries [B, T, H, D]
    keys: tuple[Tensor, Tensor]  # k and v, [B, Y, X, G, D]
    text: tuple[Tensor, Tensor] | None  # text_k and text_v, [B, T, G, D]
    rope: tuple[Tensor, Tensor] | None
    grid: tuple[int, int]  # of the patches: that of the image queries
    origin: tuple[int, int]  # its first token on the grid of the keys
    window: tuple[int, int]
    patch: tuple[int, int]
    offset: tuple[int, int]
    scale: float
    wrap: tuple[bool, bool] = (False, False)

    @property
    def key_grid(self) -> tuple[int, int]:
        return self.keys[0].shape[1], self.keys[0].shape[2]

    @property
    def is_part(self) -> bool:
        """Whether the queries are a part of the grid of the keys."""
        return self.grid != self.key_grid

    @property
    def cut_window(self) -> tuple[int, int]:
        """The window, cut to the grid of the keys."""
        return min(self.window[0], self.key_grid[0]), min(self.window[1], self.key_grid[1])

    @property
    def patches(self) -> tuple[int, int]:
        axes = zip(self.grid, self.patch, self.offset, self.wrap, strict=True)
        rows, columns = (patch_count(n, p, o, wrap=on) for n, p, o, on in axes)
        return rows, columns

    @property
    def tokens(self) -> int:
        """Text tokens."""
        return 0 if self.text is None else self.text[0].shape[1]

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.q.shape[-2] // self.keys[0].shape[-2]

    @property
    def block_d(self) -> int:
        """The head dim, padded to a power of two."""
        return max(MIN_BLOCK, ceil_power_of_two(self.q.shape[-1]))

    @property
    def log2_scale(self) -> float:
        """The factor of scores whose power of two is taken; not negative, since the kernels negate queries or scores."""
        return abs(self.scale) * math.log2(math.e)

    @property
    def query_numbers(self) -> dict[str, int]:
        """Arguments that say which image queries a patch has."""
        offset_y, offset_x = self._shifts
        return {"grid_y": self.grid[0], "grid_x": self.grid[1], "offset_y": offset_y, "offset_x": offset_x}

    @property
    def window_numbers(self) -> dict[str, int]:
        """Arguments that say which keys a patch attends to. `base`: the first token of patch 0 on the grid of the keys."""
        offset_y, offset_x = self._shifts
        return {
            "keys_y": self.key_grid[0],
            "keys_x": self.key_grid[1],
            "base_y": self.origin[0] - offset_y,
            "base_x": self.origin[1] - offset_x,
            "patches_x": self.patches[1],
            "heads": self.q.shape[-2],
            "text": self.tokens,
        }

    @property
    def _shifts(self) -> tuple[int, int]:
        """The offset, on an axis that wraps modulo its length: a patch may be larger than the grid."""
        axes = zip(self.grid, self.offset, self.wrap, strict=True)
        shift_y, shift_x = (o % n if on else o for n, o, on in axes)
        return shift_y, shift_x

    @property
    def problem(self) -> Problem:
        q = self.q
        descriptors = all(suits_descriptor(x) for x in (q, *self.keys, *(self.text or ())))
        heads, windows = (q.shape[0] * q.shape[-2], prod(self.patches)) if self.queries == "text" else (1, 1)
        grid = self.key_grid if self.queries == "text" else self.grid
        sizes = grid, self.cut_window, self.patch, q.shape[-1], q.element_size(), self.tokens
        return Problem(*sizes, self.queries, descriptors, self.rope is not None, heads, windows, any(self.wrap))
