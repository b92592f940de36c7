"""Rotary angles by which text is rotated for each window.

A model with rotary positions has learnt the distances from its text to the tokens of a picture of native size. In a window further out,
the distances would be larger than any seen in training. So text keys, and text queries under the rule `"window"`, are rotated such that
text is as far from its window as it is from a whole native picture.

ScaleDiff, arXiv:2510.25818, released code: the angle of the window's top-left token, for text at position zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from scalediff.arguments import check_callable, check_integer, check_number, wrong_type
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

    Raises:
        ValueError: An axis is not an even number of channels, `y` or `x` is not the index of an axis or they are equal, `theta` is
            not positive, or `dim` is less than the sum of `axes` or odd.
        TypeError: A number is of the wrong type, or `shift` is not a function.
    """

    axes: tuple[int, ...]
    theta: float
    y: int = 1
    x: int = 2
    dim: int | None = None
    shift: Callable[[Grid, Grid], tuple[int, int]] = _no_shift

    def __post_init__(self) -> None:
        if not isinstance(self.axes, tuple | list) or not all(isinstance(channels, Integral) for channels in self.axes):
            raise wrong_type("axes", "a tuple of integers", self.axes)
        object.__setattr__(self, "axes", tuple(int(channels) for channels in self.axes))
        if any(channels < 0 or channels % 2 for channels in self.axes):
            raise ValueError(f"axes must be even numbers of channels, got axes={self.axes}")
        for name in ("y", "x"):
            check_integer(name, getattr(self, name))
        if not all(0 <= index < len(self.axes) for index in (self.y, self.x)) or self.y == self.x:
            raise ValueError(
                f"y and x must be the indices of two of the {len(self.axes)} axes, those of rows and columns, got y={self.y}, x={self.x}"
            )
        check_number("theta", self.theta)
        if not self.theta > 0:
            raise ValueError(f"theta must be positive, got theta={self.theta}")
        if self.dim is not None:
            check_integer("dim", self.dim)
            if self.dim < sum(self.axes) or self.dim % 2:
                raise ValueError(f"dim must be even and at least the sum of axes, {sum(self.axes)}, got dim={self.dim}")
        check_callable("shift", self.shift)

    @property
    def channels(self) -> int:
        """Channels per head, D."""
        return sum(self.axes) if self.dim is None else self.dim

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
