"""Low-pass filtering, latent frequency mixing and structure guidance: what users call.

Every filter is linear and separable, `LP(x) = A_y x A_x^T`, with DC gain 1.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from scalediff_kernels.lowpass.geometry import coarse_length
from scalediff_kernels.lowpass.reference import low_pass_resize

Kind = Literal["resize", "gaussian", "butterworth"]


def low_pass(x: Tensor, *, cutoff: float, kind: Kind = "resize") -> Tensor:
    """Keep the low frequencies of a picture.

    Args:
        x: `[B, C, Y, X]`, floating point; filtered in fp32, or in fp64 if it is fp64.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1]; the paper takes 0.125 for SDXL, 0.25 for FLUX.
        kind: `"resize"` is the paper's: antialiased bilinear down to `int(length * cutoff)` pixels, bilinear up.
            `"gaussian"` and `"butterworth"` are refused until they are there.

    Returns:
        `[B, C, Y, X]` in the dtype of x.

    Raises:
        ValueError: the cutoff is outside (0, 1] or leaves no coarse pixel, or x is not four-dimensional.
        TypeError: x is not floating point.
        NotImplementedError: a kind of filter that this version lacks.

    ScaleDiff, arXiv:2510.25818.
    """
    _check(x, kind)
    coarse = coarse_length(x.shape[2], cutoff), coarse_length(x.shape[3], cutoff)
    return low_pass_resize(x, coarse=coarse).to(x.dtype)


def mix_frequencies(high: Tensor, low: Tensor, *, cutoff: float, kind: Kind = "resize") -> Tensor:
    """Latent frequency mixing: the high band of one picture with the low band of another, `high + LP(low - high)`.

    Args:
        high: `[B, C, Y, X]`, the upsampled-in-RGB latent in the paper.
        low: The same shape, dtype and device; the latent upsampled as it is.
        cutoff, kind: As in `low_pass`.

    Returns:
        `[B, C, Y, X]` in the dtype of high.

    Raises:
        ValueError, TypeError, NotImplementedError: as `low_pass`; high and low disagree.

    ScaleDiff, arXiv:2510.25818.
    """
    _check_same("high", high, "low", low)
    return high + low_pass(low - high, cutoff=cutoff, kind=kind)


def guide_structure(x0: Tensor, reference: Tensor, *, gamma: float, cutoff: float, kind: Kind = "resize") -> Tensor:
    """Structure guidance: draw the low band of a denoised estimate to a reference, `x0 + gamma (LP(reference) - LP(x0))`.

    Args:
        x0: `[B, C, Y, X]`, the estimate of the clean latent at this step.
        reference: The same shape, dtype and device.
        gamma: Strength, finite; 0 leaves x0 as it is, 1 replaces its low band (to the filter's own roll-off).
        cutoff, kind: As in `low_pass`.

    Returns:
        `[B, C, Y, X]` in the dtype of x0.

    Raises:
        ValueError, TypeError, NotImplementedError: as `low_pass`; x0 and reference disagree, or gamma is not finite.

    ScaleDiff, arXiv:2510.25818.
    """
    _check_same("x0", x0, "reference", reference)
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma=}")
    return x0 + gamma * low_pass(reference - x0, cutoff=cutoff, kind=kind)


def _check(x: Tensor, kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind=}")
    if kind != "resize":
        raise NotImplementedError(f"this version has the filter kind 'resize' alone, got {kind=}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [B, C, Y, X] with no empty axis, got {tuple(x.shape)=}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype=}")


def _check_same(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            f"{a_name} and {b_name} must agree in shape, dtype and device, "
            f"got {tuple(a.shape)} {a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}"
        )
