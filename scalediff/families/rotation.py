"""Rotary angles by which text is rotated for each window.

A model with rotary positions has learnt the distances from its text to the tokens of a picture of native size. In a window further out,
the distances would be larger than any seen in training. So text keys, and text queries under the rule `"window"`, are rotated such that
text is as far from its window as it is from a whole native picture.

ScaleDiff, arXiv:2510.25818, released code: the angle of the window's top-left token, for text at position zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scalediff.families.grid import Grid
from scalediff_kernels.neighborhood.geometry import windows


def _no_shift(grid: Grid, native: Grid) -> Grid:
    return 0, 0


@dataclass(frozen=True)
class TextRotation:
    """Rotary positions of a model: channels 2c and 2c + 1 are rotated by position x theta^(-2c / axis), axis after axis.

    Attributes:
        axes: Number of channels of each position axis, in order.
        theta: Base of the frequencies.
        y, x: Indices of the axes for the picture's rows and columns.
        dim: Channels per head, if those after the axes are not rotated; the sum of `axes` when None.
        shift: Function from the token grid and the native grid to the number of tokens, per axis, to add to a window's top-left token.
            It is zero unless the position of text depends on the picture's size.
    """

    axes: tuple[int, ...]
    theta: float
    y: int = 1
    x: int = 2
    dim: int | None = None
    shift: Callable[[Grid, Grid], tuple[int, int]] = _no_shift

    @property
    def channels(self) -> int:
        """Channels per head, D."""
        return self.dim or sum(self.axes)

    def tables(self, grid: Grid, native: Grid, window: Grid, patch: Grid, offset: Grid) -> tuple[Tensor, Tensor]:
        """(cos, sin) of every window, each fp64 `[patches_y, patches_x, D / 2]`, on the CPU."""
        starts = [
            torch.tensor([span.key_start for span in windows(n, w, p, o)], dtype=torch.float64, device="cpu")
            for n, w, p, o in zip(grid, window, patch, offset, strict=True)
        ]
        y, x = (start + move for start, move in zip(starts, self.shift(grid, native), strict=True))
        angles = torch.zeros(len(y), len(x), self.channels // 2, dtype=torch.float64, device="cpu")
        first = 0
        for index, channels in enumerate(self.axes):
            part = slice(first // 2, (first + channels) // 2)
            frequencies = self.theta ** -(torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels)
            if index == self.y:
                angles[:, :, part] = (y[:, None] * frequencies)[:, None, :]
            elif index == self.x:
                angles[:, :, part] = (x[:, None] * frequencies)[None, :, :]
            first += channels
        return angles.cos(), angles.sin()
