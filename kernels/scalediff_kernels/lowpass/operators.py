"""The filters as data: one axis is `A = up @ down`, down to a small grid and up again.

`"resize"`: antialiased bilinear down, bilinear up; a row holds a few pixels. `"gaussian"` and `"butterworth"`: the cosine
modes (DCT-II) that the response keeps, weighted by it; exact at every mode, reflecting at the border.

Built in fp64. What computes gets a factor in tiles of rows, each with the columns it reads, kept per device and dtype.

Legend: n pixels, m coarse samples of one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from scalediff_kernels.lowpass.geometry import Kind, coarse_length, response

Side = Literal["down", "up"]


@dataclass(frozen=True)
class LowPass:
    """The filter of one axis, `A = up @ down`; raises as `coarse_length`.

    Args:
        length: Pixels, n.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1].
        kind: As in `low_pass`.
    """

    length: int
    cutoff: float
    kind: Kind = "resize"

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length must be a positive integer, got {self.length=}")
        coarse_length(self.length, self.cutoff, self.kind)

    @property
    def coarse(self) -> int:
        """Coarse samples, m."""
        return coarse_length(self.length, self.cutoff, self.kind)

    @property
    def down(self) -> Tensor:
        """`[m, n]`, fp64, built anew."""
        return _factor(self, "down")

    @property
    def up(self) -> Tensor:
        """`[n, m]`, fp64, built anew."""
        return _factor(self, "up")


@dataclass(frozen=True)
class Band:
    """A factor in tiles of rows: tile i reads columns from `starts[i]` on; what lies outside its span is zero.

    starts: `[tiles]`, int32; may be such that the last columns of a span lie beyond the factor.
    weights: `[tiles, rows, span]`.
    ranges: First column and end of what each tile reads inside the factor.
    """

    starts: Tensor
    weights: Tensor
    ranges: tuple[tuple[int, int], ...]

    @property
    def span(self) -> int:
        return self.weights.shape[2]


@lru_cache(maxsize=256)
def band(axis: LowPass, side: Side, device: torch.device, dtype: torch.dtype, *, rows: int, block: int = 1, align: int = 1) -> Band:
    """A factor in tiles of `rows`, kept; starts are multiples of `align`, the span is a multiple of `block`."""
    full = _factor(axis, side)
    with torch.inference_mode(False), torch.device("cpu"):
        tiles, length = -(-full.shape[0] // rows), full.shape[1]
        full = torch.nn.functional.pad(full, (0, 0, 0, tiles * rows - full.shape[0])).unflatten(0, (tiles, rows))
        used = full.ne(0).any(dim=1)  # [tiles, columns]
        starts = used.int().argmax(dim=1) // align * align
        stops = length - used.flip(1).int().argmax(dim=1)
        span = -(-int((stops - starts).max()) // block) * block
        columns = starts[:, None] + torch.arange(span)
        full = torch.nn.functional.pad(full, (0, max(0, int(columns.max()) + 1 - length)))
        weights = full.gather(2, columns[:, None, :].expand(-1, rows, -1))
        ranges = tuple((start, min(start + span, length)) for start in starts.tolist())
        return Band(starts.to(device, torch.int32), weights.to(device, dtype).contiguous(), ranges)


def _factor(axis: LowPass, side: Side) -> Tensor:
    """In fp64 on the CPU, whatever modes and default devices the caller is in."""
    with torch.inference_mode(False), torch.device("cpu"):
        return _resize(axis, side) if axis.kind == "resize" else _modes(axis, side)


def _resize(axis: LowPass, side: Side) -> Tensor:
    """Rows of triangles around each sample's centre: as wide as the scale on the way down, two pixels on the way up."""
    n, m = axis.length, axis.coarse
    if side == "down":
        scale = n / m
        distance = (torch.arange(n, dtype=torch.float64) - ((torch.arange(m, dtype=torch.float64) + 0.5) * scale - 0.5)[:, None]).abs()
        weights = (1 - distance / scale).clamp(min=0)
    else:
        centers = ((torch.arange(n, dtype=torch.float64) + 0.5) * (m / n) - 0.5).clamp(0, m - 1)
        weights = (1 - (torch.arange(m, dtype=torch.float64) - centers[:, None]).abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _modes(axis: LowPass, side: Side) -> Tensor:
    """Cosine modes, orthonormal; those of `down` carry the response."""
    n, m = axis.length, axis.coarse
    modes = torch.arange(m, dtype=torch.float64)[:, None]
    cosines: Tensor = torch.cos(torch.pi / n * modes * (torch.arange(n, dtype=torch.float64) + 0.5)) * (2 / n) ** 0.5
    cosines[0] /= 2**0.5
    if side == "up":
        return cosines.T.contiguous()
    gains = [response(k / n, axis.cutoff, axis.kind) for k in range(m)]
    return torch.tensor(gains, dtype=torch.float64)[:, None] * cosines
