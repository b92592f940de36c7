"""Cutoffs and frequency responses: plain numbers, no torch.

Frequencies are fractions of Nyquist; frequency 1 alternates from pixel to pixel.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Kind = Literal["resize", "gaussian", "butterworth"]

BUTTERWORTH_ORDER = 4
SMALLEST_RESPONSE = 1e-4  # smaller responses are set to zero: they are below the rounding of fp16, and the coarse grid stays small


def check_filter(cutoff: float, kind: str) -> None:
    """Check the parameters of a filter.

    Raises:
        ValueError: The cutoff is outside (0, 1], or the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind=}")
    if not 0 < cutoff <= 1:  # also true for NaN
        raise ValueError(f"cutoff must lie in (0, 1], got {cutoff=}")


def coarse_length(length: int, cutoff: float, kind: Kind = "resize", *, wrap: bool = False) -> int:
    """Number of coarse samples of an axis: `int(length * cutoff)` pixels for `"resize"`, otherwise the modes with non-zero gain.

    Modes are cosines, and on an axis that wraps cosines and sines with whole periods.

    Args:
        length: Number of pixels along the axis.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1].
        kind: As in `low_pass`.
        wrap: Whether the axis continues on the other side.

    Raises:
        ValueError: The cutoff is outside (0, 1] or leaves no coarse pixel, or the kind is unknown.
    """
    check_filter(cutoff, kind)
    if kind != "resize" and wrap:
        return min(length, 1 + 2 * math.floor(length / 2 * cutoff * _reach(kind)))
    if kind != "resize":
        return min(length, 1 + math.floor(length * cutoff * _reach(kind)))
    coarse = math.floor(length * cutoff)
    if coarse < 1:
        raise ValueError(f"cutoff must leave at least one coarse pixel, got {cutoff=} for {length=}")
    return coarse


def response(frequency: float, cutoff: float, kind: Kind) -> float:
    """Gain of `"gaussian"`, `2^-(f / cutoff)^2`, or `"butterworth"`, `1 / (1 + (f / cutoff)^8)`: 1 at DC, 1/2 at the cutoff."""
    ratio = frequency / cutoff
    if ratio > _reach(kind):
        return 0.0
    return 2.0 ** -(ratio**2) if kind == "gaussian" else 1 / (1 + ratio ** (2 * BUTTERWORTH_ORDER))


def _reach(kind: Kind) -> float:
    """The frequency, as a multiple of the cutoff, above which the response is set to zero."""
    if kind == "gaussian":
        return math.sqrt(math.log2(1 / SMALLEST_RESPONSE))
    return float((1 / SMALLEST_RESPONSE - 1) ** (0.5 / BUTTERWORTH_ORDER))
