"""The filters as small matrix products on any device, in fp32, or in fp64 for fp64.

The factors are cut into tiles of rows as for the kernel, so that few zeros are multiplied. On a CPU a few planes
at a time go through all of it, from cache to cache.

Legend: B batch, C channels, Y x X pixels, K planes of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scalediff_kernels.lowpass.operators import Band, LowPass, band

TILE = 16  # coarse samples that a tile makes or, twice as many, reads: larger, and zeros are multiplied; smaller, and calls are many
CHUNK_BYTES = 4 * 2**20  # of planes at a time, in a CPU's cache

Axes = tuple[LowPass, LowPass]


def coarse_matmul(inputs: Sequence[Tensor], weights: Sequence[float], axes: Axes, offset: Tensor | None) -> Tensor:
    """`offset + D_y (sum weights * inputs) D_x^T`, `[B, C, m_y, m_x]`; inputs `[B, C, Y, X]`."""
    like, dtype = inputs[0], accumulator(inputs[0])
    down_y, down_x = (band(axis, "down", like.device, dtype, rows=TILE) for axis in axes)
    coarse = torch.empty(*like.shape[:2], axes[0].coarse, axes[1].coarse, dtype=dtype, device=like.device)
    for planes in _chunks(like, dtype):
        picture = _weighted_sum([x[planes] for x in inputs], weights, dtype).contiguous()
        rows = picture.new_empty(picture.shape[0], axes[0].coarse, picture.shape[2])
        for tile, columns, place in _tiles(down_y, axes[0].coarse):
            torch.bmm(tile.expand(picture.shape[0], -1, -1), picture[:, columns], out=rows[:, place])
        _times_transposed(rows, down_x, coarse[planes])
    return coarse if offset is None else coarse.add_(offset)


def expand_matmul(
    out: Tensor, coarse: Tensor, gain: float, axes: Axes, addends: Sequence[Tensor], weights: Sequence[float], *, dtype: torch.dtype
) -> None:
    """`out <- sum weights * addends + gain U_y coarse U_x^T`, pictures `[B, C, Y, X]`; out may be an addend. Sums in `dtype`."""
    up_y, up_x = (band(axis, "up", out.device, dtype, rows=2 * TILE * axis.length // axis.coarse) for axis in axes)
    for planes in _chunks(out, dtype):
        small = gain * coarse[planes].to(dtype)
        rows = small.new_empty(small.shape[0], axes[0].coarse, axes[1].length)
        _times_transposed(small, up_x, rows)
        addend = _weighted_sum([x[planes] for x in addends], weights, dtype) if addends else None
        for tile, columns, place in _tiles(up_y, axes[0].length):
            product, target = (tile.expand(rows.shape[0], -1, -1), rows[:, columns]), out[planes][:, place]
            into = target if out.dtype == dtype else None
            summed = torch.bmm(*product, out=into) if addend is None else torch.baddbmm(addend[:, place], *product, out=into)
            if into is None:
                target.copy_(summed)  # rounded here


def _times_transposed(x: Tensor, tiled: Band, out: Tensor) -> None:
    """`out <- x W^T` along the last axis, W in tiles; x and out contiguous."""
    flat, flat_out = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for tile, columns, place in _tiles(tiled, out.shape[-1]):
        flat_out[:, place] = flat[:, columns] @ tile.T


def accumulator(x: Tensor) -> torch.dtype:
    """In what sums are done: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice]]:
    """Batch and channels of the planes that are worked on together."""
    plane = x.shape[2] * x.shape[3] * dtype.itemsize
    step = max(1, CHUNK_BYTES // plane) if x.device.type == "cpu" else x.shape[1]
    for batch in range(x.shape[0]):
        for start in range(0, x.shape[1], step):
            yield batch, slice(start, start + step)


def _tiles(tiled: Band, rows: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Every tile's weights `[rows, columns]`, the columns it reads and the rows it makes."""
    tile_rows = tiled.weights.shape[1]
    for i, (start, stop) in enumerate(tiled.ranges):
        place = slice(i * tile_rows, min((i + 1) * tile_rows, rows))
        yield tiled.weights[i, : place.stop - place.start, : stop - start], slice(start, stop), place


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """In `dtype`; the one tensor itself where its weight is 1."""
    first = tensors[0].to(dtype)
    if len(tensors) == 1:
        return first if weights[0] == 1 else first * weights[0]
    total = first * weights[0]
    for x, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(x.to(dtype), alpha=weight)
    return total
