"""How often parts of a picture occur elsewhere in it: duplicated subjects, of any model, without a network.

Legend: N pictures, Y x X pixels, P patches, K x L places of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.demo.scenes import luminance

WORKING = 128  # pixels of the shorter side that every picture is reduced to
PATCH = 16  # pixels per side, an eighth of the working size
STRIDE = 8  # between patches
REACH = 12  # in pixels: of places nearer than this to a better one, along both axes, only the better one counts
ALIKE = 0.7  # the correlation above which a place looks like a patch
FLAT = 0.01  # root of the variance of the gradient, in luma per pixel, below which a patch has no content
STRAIGHT = 0.2  # share of the gradient's energy across its main direction, below which a patch has only straight edges


def repetition(images: Tensor) -> Tensor:
    """Mean number of other places in each picture `[N, 3, Y, X]` in [0, 1] that look like one of its patches; `[N]` fp64.

    The luma is reduced to a shorter side of 128 (triangle filter with antialias) and its gradient taken by central differences: a
    picture is a smooth shade first, and shades alone would correlate everywhere. Patches of 16 x 16 lie on a grid of 8 pixels. Left out
    are flat patches, and those whose edges all have one direction, as an edge looks like itself along its whole length (smaller eigenvalue
    of the structure tensor below 0.2 of the trace). A patch is compared with all places by zero-mean normalised cross-correlation of both
    components of the gradient. Other places count where it is above 0.7 and not exceeded within 12 pixels along both axes; the patch's
    own place is its own maximum. A picture with no such patch has 0. k equal subjects on a plain background give k - 1.

    It sees copies of about the same size, orientation and contrast, and not those that are mirrored, turned, scaled or drawn anew with
    other outlines. Subjects that repeat rightly (windows, bricks, stars) count too, hundreds in a regular texture, so compare with
    the same prompts at the native size.
    ValueError where a side is below 128.
    """
    if min(images.shape[2:]) < WORKING:
        raise ValueError(f"pictures must have sides of at least {WORKING} for their repetition, got {tuple(images.shape)=}")
    return torch.stack([_repetition_of(luma) for luma in luminance(images)])


def _repetition_of(luma: Tensor) -> Tensor:
    sizes = [round(WORKING * n / min(luma.shape)) for n in luma.shape]
    small = F.interpolate(luma[None, None], sizes, mode="bilinear", antialias=True)[0, 0].double()
    field = torch.stack(torch.gradient(small))
    field = field - field.mean((1, 2), keepdim=True)
    deviation = (_box(field.square()) - _box(field).square()).sum(0).clamp(min=0).sqrt()
    y, x = (STRIDE * index for index in _is_distinct(field, deviation)[::STRIDE, ::STRIDE].nonzero(as_tuple=True))
    if not len(y):
        return torch.zeros((), dtype=torch.float64)
    spectrum, inner = torch.fft.rfft2(field), PATCH**2 * deviation.clamp(min=FLAT)
    counts = []
    for rows, columns in zip(y.split(64), x.split(64), strict=True):
        patches = torch.stack([field[:, i : i + PATCH, j : j + PATCH] for i, j in zip(rows, columns, strict=True)])
        patches = patches - patches.mean((2, 3), keepdim=True)
        products = (spectrum * torch.fft.rfft2(patches, s=small.shape).conj()).sum(1)
        covariance = torch.fft.irfft2(products, s=small.shape)[:, : inner.shape[0], : inner.shape[1]]
        correlation = torch.where(deviation >= FLAT, covariance / inner / deviation[rows, columns][:, None, None], 0.0)
        counts.append(_peaks(correlation) - 1)
    return torch.cat(counts).double().mean()


def _is_distinct(field: Tensor, deviation: Tensor) -> Tensor:
    """`[K, L]`: whether the patch at a place is neither flat nor has edges of one direction alone."""
    yy, xx, yx = _box(torch.stack([field[0] ** 2, field[1] ** 2, field[0] * field[1]]))
    smaller = (yy + xx) / 2 - torch.hypot((yy - xx) / 2, yx)
    distinct: Tensor = (deviation >= FLAT) & (smaller >= STRAIGHT * (yy + xx))
    return distinct


def _peaks(correlation: Tensor) -> Tensor:
    """`[P]` number of places of `[P, K, L]` above `ALIKE` that are the largest within `REACH`."""
    largest = correlation
    for _ in range(2):  # along each axis; in one dimension torch has a faster pooling than in two
        largest = F.max_pool1d(largest.mT.contiguous(), 2 * REACH + 1, 1, REACH)
    return ((correlation > ALIKE) & (correlation == largest)).sum((1, 2))


def _box(values: Tensor) -> Tensor:
    """Mean over the patch at each place: `[C, Y, X]` to `[C, K, L]`."""
    return F.avg_pool2d(values[None], PATCH, 1)[0]
