"""Mean and variance of the inputs of group norms over the bands of a picture, and the norms with these.

Legend: B batch, C channels, G groups of a norm, Y x X rows and columns of a band.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scalediff_kernels.distributed.bands import merge_statistics


class Unknown(Exception):
    """The statistics of a norm are not known yet; those of this band have been added to them."""


class Statistics:
    """Mean and variance of the inputs of norms over all bands, and the norms with these.

    Attributes:
        band: First row of the band, its end, and the number of rows, in the input of the group with its halo.
        whole: Whether this band is all there is, so that a norm is computed as usual.
        pending: The norm whose statistics are being collected; None if all that were needed were known.
    """

    def __init__(self) -> None:
        self.band, self.whole = (0, 0, 0), False
        self.forget()

    def forget(self) -> None:
        """Begin again, for another input."""
        self.pending: nn.GroupNorm | None = None
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._rows, self._mean, self._squares = 0, torch.empty(0), torch.empty(0)

    def normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """The norm of a band `[B, C, Y, X]`, by the statistics of all bands.

        Raises:
            Unknown: They are not known yet.
        """
        if self.whole:
            return type(norm).forward(norm, x)
        if norm not in self._known:
            self._collect(norm, x)
            raise Unknown
        scale, shift = self._known[norm]
        return x.mul(scale).add_(shift).to(x.dtype)

    def finish(self, ranks: Any) -> None:
        """Make scale and shift of the pending norm from the statistics of all bands, also those of the ranks of a group if there is one."""
        norm = self.pending
        assert norm is not None
        mean, variance = self._mean, self._squares / self._rows
        if ranks is not None:
            mean, variance = merge_statistics(mean, variance, ranks)
        scale, mean = (x.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for x in ((variance + norm.eps).rsqrt(), mean))
        if norm.affine:
            scale = scale * norm.weight
        shift = -mean * scale + (norm.bias if norm.affine else 0)
        self._known[norm] = scale[..., None, None], shift[..., None, None]
        self.pending, self._rows = None, 0

    def _collect(self, norm: nn.GroupNorm, x: Tensor) -> None:
        """Add the rows of the band, without its halo, to mean and sum of squared deviations `[B, G]`: Chan et al. 1979, equation 2.1."""
        assert self.pending in (None, norm)
        start, stop, rows = self.band
        top, end = start * x.shape[2] // rows, stop * x.shape[2] // rows
        values = x[:, :, top:end].to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), norm.num_groups, -1)
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        new, before = end - top, self._rows
        if self.pending is None:
            self.pending, self._mean, self._squares = norm, torch.zeros_like(mean), torch.zeros_like(mean)
        delta, self._rows = mean - self._mean, before + new
        self._squares += variance * new + delta**2 * (before * new / self._rows)
        self._mean += delta * (new / self._rows)
