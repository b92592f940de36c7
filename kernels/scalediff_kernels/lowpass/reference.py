"""Reference implementation of the low-pass filters, by `F.interpolate` and the Fourier transform; fp64 stays fp64; differentiable.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff_kernels.lowpass.geometry import Kind, coarse_length, response


def low_pass_reference(x: Tensor, *, cutoff: float, kind: Kind, wrap: tuple[bool, bool] = (False, False)) -> Tensor:
    """`LP(x)`, `[B, C, Y, X]` in at least fp32: ScaleDiff's filter (arXiv:2510.25818), or the named frequency response per axis."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    one_axis = _resize if kind == "resize" else _respond
    return one_axis(one_axis(x, cutoff, kind, wrap[1]).transpose(2, 3), cutoff, kind, wrap[0]).transpose(2, 3)


def _resize(x: Tensor, cutoff: float, kind: Kind, wrap: bool) -> Tensor:
    """Antialiased bilinear down and bilinear up along the last axis. Not both axes in one call: wrong on CPUs for one coarse column.

    An axis that wraps is the middle one of several copies; the filter reaches at most two axes far.
    """
    (height, width), copies = x.shape[2:], 5 if wrap else 1
    coarse = copies * coarse_length(width, cutoff, kind)
    down = F.interpolate(x.repeat(1, 1, 1, copies), size=(height, coarse), mode="bilinear", antialias=True, align_corners=False)
    up = F.interpolate(down, size=(height, copies * width), mode="bilinear", align_corners=False)
    return up.narrow(-1, copies // 2 * width, width)


def _respond(x: Tensor, cutoff: float, kind: Kind, wrap: bool) -> Tensor:
    """Apply a frequency response along the last axis, mirrored at its ends or periodic."""
    n = x.shape[-1]
    period = x if wrap else torch.cat([x, x.flip(-1)], dim=-1)
    spectrum = torch.fft.rfft(period)  # bin k is at 2 k / period of Nyquist
    gains = [response(2 * k / period.shape[-1], cutoff, kind) for k in range(spectrum.shape[-1])]
    gained = spectrum * torch.tensor(gains, dtype=x.dtype, device=x.device)
    out: Tensor = torch.fft.irfft(gained, n=period.shape[-1])[..., :n]
    return out
