"""The low-pass filters as they are defined, through `F.interpolate` and the Fourier transform; fp64 stays fp64, gradients flow.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff_kernels.lowpass.geometry import Kind, coarse_length, response


def low_pass_reference(x: Tensor, *, cutoff: float, kind: Kind) -> Tensor:
    """`LP(x)`, `[B, C, Y, X]` in at least fp32: ScaleDiff's filter (arXiv:2510.25818), or the named frequency response per axis."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "resize":
        coarse = coarse_length(x.shape[2], cutoff), coarse_length(x.shape[3], cutoff)
        down = F.interpolate(x, size=coarse, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(down, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return _respond(_respond(x, cutoff, kind).transpose(2, 3), cutoff, kind).transpose(2, 3)


def _respond(x: Tensor, cutoff: float, kind: Kind) -> Tensor:
    """One frequency response along the last axis, mirrored at its ends."""
    n = x.shape[-1]
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], dim=-1))  # bin k lies at k / n of Nyquist
    gains = [response(k / n, cutoff, kind) for k in range(n + 1)]
    out: Tensor = torch.fft.irfft(spectrum * torch.tensor(gains, dtype=x.dtype, device=x.device), n=2 * n)[..., :n]
    return out
