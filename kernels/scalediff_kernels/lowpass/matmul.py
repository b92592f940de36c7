"""The filters as small matrix products on any device, in fp32, or in fp64 for fp64.

The factors are split into tiles of rows, as in the kernel, so that few zeros are multiplied. On a CPU, the picture is processed in parts
that fit into the cache: a few planes, or, if channels are adjacent in memory, a few columns of all channels.

Legend: B batch, C channels, Y x X pixels, K planes of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scalediff_kernels.lowpass.operators import Band, LowPass, band

TILE = 16  # coarse samples that a reducing tile makes; an expanding one reads twice as many. Larger tiles multiply more zeros
PART_BYTES = 4 * 2**20  # size of a part of the picture, for a CPU's cache

Axes = tuple[LowPass, LowPass]


def coarse_matmul(inputs: Sequence[Tensor], weights: Sequence[float], axes: Axes, offset: Tensor | None) -> Tensor:
    """Compute `offset + D_y (sum weights * inputs) D_x^T`, `[B, C, m_y, m_x]`, from inputs `[B, C, Y, X]`."""
    like, dtype = inputs[0], accumulator(inputs[0])
    coarse = torch.empty(*like.shape[:2], axes[0].coarse, axes[1].coarse, dtype=dtype, device=like.device)
    reduce = _reduce_pixels if is_channels_last(like) else _reduce_planes
    bands = [band(axis, "down", like.device, dtype, rows=TILE) for axis in axes]
    scale = weights[0] or 1.0  # applied to the small result, so that the first picture need not be scaled
    for out, *pictures in zip(*_by_batch(coarse, *inputs), strict=True):
        reduce(out, pictures, [weight / scale for weight in weights], bands)
    coarse.mul_(scale)
    return coarse if offset is None else coarse.add_(offset)


def expand_matmul(out: Tensor, coarse: Tensor, gain: float, axes: Axes, addends: Sequence[Tensor], weights: Sequence[float]) -> None:
    """`out <- sum weights * addends + gain U_y coarse U_x^T` for pictures `[B, C, Y, X]`, in coarse's dtype; out may be an addend."""
    expand = _expand_pixels if is_channels_last(out) else _expand_planes
    bands = [band(axis, "up", out.device, coarse.dtype, rows=2 * TILE * axis.length // axis.coarse) for axis in axes]
    for target, small, *pictures in zip(*_by_batch(out, coarse, *addends), strict=True):
        expand(target, gain * small, pictures, weights, bands)


def _reduce_planes(out: Tensor, pictures: list[Tensor], weights: Sequence[float], bands: list[Band]) -> None:
    """Reduce `[C, Y, X]` to `[C, m_y, m_x]`, a few planes at a time."""
    planes, height, width = pictures[0].shape
    for part in _parts(planes, height * width, out):
        picture = _weighted_sum([x[part] for x in pictures], weights, out.dtype).contiguous()
        _times_transposed(_times(bands[0], picture, out.shape[1]), bands[1], out[part])


def _expand_planes(out: Tensor, small: Tensor, pictures: list[Tensor], weights: Sequence[float], bands: list[Band]) -> None:
    planes, height, width = out.shape
    for part in _parts(planes, height * width, small):
        rows = small.new_empty(small[part].shape[0], small.shape[1], width)
        _times_transposed(small[part], bands[1], rows)
        addend = _weighted_sum([x[part] for x in pictures], weights, small.dtype) if pictures else None
        _times(bands[0], rows, height, addend, out[part])


def _reduce_pixels(out: Tensor, pictures: list[Tensor], weights: Sequence[float], bands: list[Band]) -> None:
    """As `_reduce_planes`, for channels that are adjacent in memory: a few columns of all channels at a time."""
    channels, height, width = pictures[0].shape
    rows = out.new_empty(out.shape[1], width, channels)
    for part in _parts(width, channels * height, out):
        picture = _weighted_sum([x[:, :, part].permute(1, 2, 0) for x in pictures], weights, out.dtype)  # [Y, columns, C]
        rows[:, part] = _times(bands[0], picture.flatten(1)[None], out.shape[1])[0].unflatten(1, picture.shape[1:])
    out.copy_(_times(bands[1], rows, out.shape[2]).permute(2, 0, 1))


def _expand_pixels(out: Tensor, small: Tensor, pictures: list[Tensor], weights: Sequence[float], bands: list[Band]) -> None:
    channels, height, width = out.shape
    rows = _times(bands[1], small.permute(1, 2, 0).contiguous(), width)  # [m_y, X, C]
    for part in _parts(width, channels * height, small):
        columns, addend = rows[:, part], None
        if pictures:
            addend = _weighted_sum([x[:, :, part].permute(1, 2, 0) for x in pictures], weights, small.dtype).flatten(1)[None]
        summed = _times(bands[0], columns.flatten(1)[None], height, addend)[0].unflatten(1, columns.shape[1:])
        out[:, :, part] = summed.permute(2, 0, 1)


def _by_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors to iterate over as `[C, Y, X]` per sample; contiguous tensors become one sample with all planes."""
    if all(x.is_contiguous() for x in tensors):
        return tuple(x.view(1, -1, *x.shape[2:]) for x in tensors)
    return tensors


def _times(tiled: Band, x: Tensor, rows: int, addend: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`addend + W x` for every matrix of the batch `[K, columns, N]`, W in tiles; written to `out` if given, one tile at a time."""
    if out is None:
        out = x.new_empty(x.shape[0], rows, x.shape[2])
    for tile, columns, place in _tiles(tiled, rows):
        product, target = (tile.expand(x.shape[0], -1, -1), x[:, columns]), out[:, place]
        into = target if out.dtype == x.dtype and (addend is None or not _share_memory(addend, out)) else None
        summed = torch.bmm(*product, out=into) if addend is None else torch.baddbmm(addend[:, place], *product, out=into)
        if into is None:
            target.copy_(summed)
    return out


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _times_transposed(x: Tensor, tiled: Band, out: Tensor) -> None:
    """`out <- x W^T` along the last axis, W in tiles; x and out contiguous."""
    flat, flat_out = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for tile, columns, place in _tiles(tiled, out.shape[-1]):
        flat_out[:, place] = flat[:, columns] @ tile.T


def is_channels_last(x: Tensor) -> bool:
    """Whether channels, not columns, are adjacent in memory."""
    return x.shape[1] > 1 and x.stride(1) < x.stride(-1)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(length: int, elements: int, like: Tensor) -> Iterator[slice]:
    """Split an axis with `elements` elements per index into parts that fit into a CPU's cache; one part on other devices."""
    step = max(1, PART_BYTES // (elements * like.element_size())) if like.device.type == "cpu" else length
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _tiles(tiled: Band, rows: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Iterate over tiles: weights `[rows, columns]`, the columns that they apply to, and the rows of the result."""
    tile_rows = tiled.weights.shape[1]
    for i, (start, stop) in enumerate(tiled.ranges):
        place = slice(i * tile_rows, min((i + 1) * tile_rows, rows))
        yield tiled.weights[i, : place.stop - place.start, : stop - start], slice(start, stop), place


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The weighted sum in `dtype`; a single tensor with weight 1 is not copied."""
    first = tensors[0].to(dtype)
    if len(tensors) == 1:
        return first if weights[0] == 1 else first * weights[0]
    second = tensors[1].to(dtype)
    total = torch.add(first, second, alpha=weights[1]) if weights[0] == 1 else (first * weights[0]).add_(second, alpha=weights[1])
    for x, weight in zip(tensors[2:], weights[2:], strict=True):
        total.add_(x.to(dtype), alpha=weight)
    return total
