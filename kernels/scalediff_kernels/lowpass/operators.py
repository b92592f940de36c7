"""The filters as matrices: along one axis, `A = up @ down`, a reduction to a small grid and an expansion.

`"resize"`: antialiased bilinear down and bilinear up; each row has a few non-zero weights. `"gaussian"` and `"butterworth"`: the cosine
modes (DCT-II) with non-zero response, weighted by it; exact at every mode, with reflecting borders. On an axis that wraps, weights continue
on the other side, and the modes are those of the Fourier series: a cyclic shift of the picture shifts the result, for `"resize"` by whole
coarse pixels.

Matrices are built in fp64. The implementations use a factor as tiles of rows, each with the columns that it reads, cached per device and
dtype.

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
    """The filter along one axis, `A = up @ down`; raises as `coarse_length`.

    Args:
        length: Number of pixels, n.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1].
        kind: As in `low_pass`.
        wrap: Whether the axis continues on the other side.
    """

    length: int
    cutoff: float
    kind: Kind = "resize"
    wrap: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length must be a positive integer, got {self.length=}")
        coarse_length(self.length, self.cutoff, self.kind, wrap=self.wrap)

    @property
    def coarse(self) -> int:
        """Number of coarse samples, m."""
        return coarse_length(self.length, self.cutoff, self.kind, wrap=self.wrap)

    @property
    def down(self) -> Tensor:
        """The reduction, `[m, n]` in fp64; computed at every access."""
        return _factor(self, "down")

    @property
    def up(self) -> Tensor:
        """The expansion, `[n, m]` in fp64; computed at every access."""
        return _factor(self, "up")


@dataclass(frozen=True)
class Band:
    """A factor as tiles of rows: tile i reads `span` columns from `starts[i]` on; its weights for all other columns are zero.

    Attributes:
        starts: First column of each tile, `[tiles]`, int32. The span of a tile may reach past the last column.
        weights: `[tiles, rows, span]`.
        ranges: First column and end of the columns that each tile reads.
    """

    starts: Tensor
    weights: Tensor
    ranges: tuple[tuple[int, int], ...]

    @property
    def span(self) -> int:
        """Number of columns of a tile."""
        return self.weights.shape[2]


@lru_cache(maxsize=256)
def band(axis: LowPass, side: Side, device: torch.device, dtype: torch.dtype, *, rows: int, block: int = 1, align: int = 1) -> Band:
    """A factor as tiles of `rows` rows, cached; starts are multiples of `align`, and the span is a multiple of `block`."""
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
    """A factor in fp64 on the CPU, whatever inference mode and default device are set."""
    with torch.inference_mode(False), torch.device("cpu"):
        if axis.kind == "resize":
            return _resize(axis, side)
        return _periodic_modes(axis, side) if axis.wrap else _modes(axis, side)


def _resize(axis: LowPass, side: Side) -> Tensor:
    """Triangular weights around the centre of each sample: as wide as the scale for the reduction, two pixels for the expansion."""
    n, m = axis.length, axis.coarse
    pixels, samples = torch.arange(n, dtype=torch.float64), torch.arange(m, dtype=torch.float64)
    if side == "down":
        scale = n / m
        distance = pixels - ((samples + 0.5) * scale - 0.5)[:, None]
    else:
        scale, centers = 1.0, (pixels + 0.5) * (m / n) - 0.5
        distance = samples - (centers if axis.wrap else centers.clamp(0, m - 1))[:, None]
    laps = (-2, -1, 0, 1, 2) if axis.wrap else (0,)  # a triangle is at most two axes wide
    length = n if side == "down" else m
    weights = torch.stack([(1 - (distance + lap * length).abs() / scale).clamp(min=0) for lap in laps]).sum(0)
    return weights / weights.sum(1, keepdim=True)


def _modes(axis: LowPass, side: Side) -> Tensor:
    """Orthonormal cosine modes; for the reduction, multiplied by the response."""
    n, m = axis.length, axis.coarse
    modes = torch.arange(m, dtype=torch.float64)[:, None]
    cosines: Tensor = torch.cos(torch.pi / n * modes * (torch.arange(n, dtype=torch.float64) + 0.5)) * (2 / n) ** 0.5
    cosines[0] /= 2**0.5
    if side == "up":
        return cosines.T.contiguous()
    gains = [response(k / n, axis.cutoff, axis.kind) for k in range(m)]
    return torch.tensor(gains, dtype=torch.float64)[:, None] * cosines


def _periodic_modes(axis: LowPass, side: Side) -> Tensor:
    """Orthonormal modes of the Fourier series: constant, cosine and sine of one period, of two ...; as in `_modes`, with the response."""
    n, m = axis.length, axis.coarse
    periods = (torch.arange(m) + 1) // 2  # the last is the cosine alone where it alternates from pixel to pixel
    phases = 2 * torch.pi / n * periods[:, None].double() * torch.arange(n, dtype=torch.float64)
    modes = torch.where((torch.arange(m) % 2 == 1)[:, None], phases.cos(), phases.sin())
    modes[0] = 1
    modes /= modes.norm(dim=1, keepdim=True)
    if side == "up":
        return modes.T.contiguous()
    gains = [response(2 * k / n, axis.cutoff, axis.kind) for k in periods.tolist()]
    return torch.tensor(gains, dtype=torch.float64)[:, None] * modes
