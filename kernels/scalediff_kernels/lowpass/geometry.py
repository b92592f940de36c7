"""How many coarse pixels a cutoff leaves: integers only, no torch."""

from __future__ import annotations


def coarse_length(length: int, cutoff: float) -> int:
    """Pixels of the coarse axis: `int(length * cutoff)`, at least 1.

    Args:
        length: Pixels along the axis.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1].

    Raises:
        ValueError: the cutoff is outside (0, 1] or leaves no coarse pixel.
    """
    if not 0 < cutoff <= 1:  # also refuses NaN
        raise ValueError(f"cutoff must lie in (0, 1], got {cutoff=}")
    coarse = int(length * cutoff)
    if coarse < 1:
        raise ValueError(f"cutoff must leave at least one coarse pixel, got {cutoff=} for {length=}")
    return coarse
