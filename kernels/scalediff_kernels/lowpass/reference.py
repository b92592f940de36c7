"""Reference implementation of the low-pass filters, by `F.interpolate` and the Fourier transform; fp64 stays fp64; differentiable.

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
    one_axis = _resize if kind == "resize" else _respond
    return one_axis(one_axis(x, cutoff, kind).transpose(2, 3), cutoff, kind).transpose(2, 3)


def _resize(x: Tensor, cutoff: float, kind: Kind) -> Tensor:
    """Antialiased bilinear down and bilinear up along the last axis. Not both axes in one call: wrong on CPUs for one coarse column."""
    height, width = x.shape[2:]
    down = F.interpolate(x, size=(height, coarse_length(width, cutoff, kind)), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(down, size=(height, width), mode="bilinear", align_corners=False)


def _respond(x: Tensor, cutoff: float, kind: Kind) -> Tensor:
    """Apply a frequency response along the last axis, mirrored at its ends."""
    n = x.shape[-1]
    spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], dim=-1))  # bin k is at k / n of Nyquist
    gains = [response(k / n, cutoff, kind) for k in range(n + 1)]
    out: Tensor = torch.fft.irfft(spectrum * torch.tensor(gains, dtype=x.dtype, device=x.device), n=2 * n)[..., :n]
    return out
