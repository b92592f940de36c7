"""The rotary angles by which text is turned for each window.

A model with rotary positions has learnt the distance from its text to the tokens of a picture of native size. In a window further
out that distance has never been seen. So text keys, and text queries under the rule `"window"`, are turned by the angle that
gives them the distance to their window that they have to a whole native picture.

ScaleDiff, arXiv:2510.25818, released code: the angle of the window's top-left token, for text at position zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scalediff.families.grid import Grid
from scalediff_kernels.neighborhood.geometry import windows


def _none(grid: Grid, native: Grid) -> Grid:
    return 0, 0


@dataclass(frozen=True)
class TextRotation:
    """How a model rotates: channels 2c and 2c + 1 by position x theta^(-2c / axis), axis after axis.

    Attributes:
        axes: Channels of each position axis, in order.
        theta: Base of the frequencies.
        y, x: Which of the axes are the picture's rows and columns.
        dim: Channels of a head, where those after the axes are not rotated; the sum of the axes when None.
        shift: From the token grid and the native grid, what is added to a window's top-left token, per axis, where text moves
            with the picture's size; nothing where text stands at zero.
    """

    axes: tuple[int, ...]
    theta: float
    y: int = 1
    x: int = 2
    dim: int | None = None
    shift: Callable[[Grid, Grid], tuple[int, int]] = _none

    @property
    def channels(self) -> int:
        """D, channels of a head."""
        return self.dim or sum(self.axes)

    def tables(self, grid: Grid, native: Grid, window: Grid, patch: Grid, offset: Grid) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp64 `[patches_y, patches_x, D / 2]`, on the CPU."""
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
