"""Convolution and group normalisation of a picture whose rows are shared out among ranks in equal bands.

Legend: B batch, C channels, Y x X pixels of one rank, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from scalediff_kernels.distributed.groups import all_gather
from scalediff_kernels.distributed.losses import naming_losses

NORM_ELEMENTS = 2**26  # of a picture that a norm copies at once


def convolve_band(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    group: Any,
) -> Tensor:
    """`F.conv2d` of a picture, of which each rank of `group` has a band of as many rows `[B, C, Y, X]`; all ranks must call it.

    A rank receives the rows that its kernel reaches into from the bands above and below.

    Args:
        x: This rank's band. Its rows must be a multiple of the stride.
        weight, bias, stride, padding, dilation, groups: As in `F.conv2d`; the padding of rows must be half of what the kernel spans, as in
            the convolutions of U-Nets.
        group: A process group.

    Returns:
        This rank's band of the result, `[B, C, Y / stride, X / stride]`.

    Raises:
        NotImplementedError: The padding is another one.
        ValueError: The band's rows are not a multiple of the stride, or fewer than the kernel reaches into.
        LostRankError: A rank has ended: the message names it.
    """
    steps, spread = _pair(stride), _pair(dilation)
    span = spread[0] * (weight.shape[2] - 1)
    if isinstance(padding, str) or 2 * _pair(padding)[0] != span:
        raise NotImplementedError(f"a convolution over ranks must pad half of its kernel's {weight.shape[2]} rows, got {padding=}")
    pads, rows = _pair(padding), x.shape[2]
    above, below = pads[0], max(0, span - pads[0] - steps[0] + 1)
    if rows % steps[0] or rows < max(above, below):
        raise ValueError(f"a band must have rows that are a multiple of stride={steps[0]}, at least {max(above, below)}, got {rows}")
    if above or below:
        x = torch.cat(neighbour_rows(x, above, below, group), dim=2)
    return torch.conv2d(x, weight, bias, steps, (0, pads[1]), spread, groups)


def normalise_band(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, group: Any
) -> Tensor:
    """`F.group_norm` of a picture `[B, C, ...]`, of which each rank of `group` has an equal part; all ranks must call it.

    Means and variances of the parts are gathered and merged in the order of the ranks, in at least fp32.

    Args:
        x: This rank's part.
        num_groups, weight, bias, eps: As in `F.group_norm`.
        group: A process group.

    Returns:
        This rank's part of the result, with the dtype of x; fp32 under autocast, as `F.group_norm`.
    """
    cast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    wide, grouped = torch.promote_types(x.dtype, torch.float32), x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, -1)
    at_once = max(1, num_groups * NORM_ELEMENTS // x.numel())  # groups, whose copies in fp32 are in memory together
    found = [torch.var_mean(part.to(wide), (2, 3), correction=0) for part in grouped.split(at_once, dim=1)]
    variance, mean = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    mean, variance = merge_statistics(mean, variance, group)
    factor = (variance + eps).rsqrt()
    out = torch.empty(x.shape, device=x.device, dtype=wide if cast else x.dtype)
    for start, part in zip(range(0, num_groups, at_once), grouped.split(at_once, dim=1), strict=True):
        chosen = slice(start, start + at_once)
        values = (part.to(wide) - mean[:, chosen, None, None]).mul_(factor[:, chosen, None, None])
        if weight is not None:
            values.mul_(weight.to(wide).view(1, num_groups, -1, 1)[:, chosen])
        if bias is not None:
            values.add_(bias.to(wide).view(1, num_groups, -1, 1)[:, chosen])
        out.view(grouped.shape)[:, chosen] = values
    return out


def merge_statistics(mean: Tensor, variance: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of a whole from those of as many values on each rank, merged in the order of the ranks; all must call it."""
    own = torch.stack([mean, variance])
    parts = own.new_empty(distributed.get_world_size(group), *own.shape)
    all_gather(parts.flatten(0, 1), own, group)
    mean = parts[:, 0].mean(0)
    return mean, (parts[:, 1] + (parts[:, 0] - mean).square()).mean(0)


def gather_bands(x: Tensor, group: Any) -> Tensor:
    """The whole picture `[B, C, R Y, X]` from the bands of all ranks."""
    band = x.movedim(2, 0).contiguous()
    whole = band.new_empty(distributed.get_world_size(group) * band.shape[0], *band.shape[1:])
    all_gather(whole, band, group)
    return whole.movedim(0, 2)


def neighbour_rows(x: Tensor, above: int, below: int, group: Any) -> list[Tensor]:
    """Rows of the band above, the band `[B, C, Y, X]`, and rows of the band below; zeros outside of the picture. All ranks must call it.

    Raises:
        RuntimeError: A rank has ended: the message names it.
    """
    rank, last = distributed.get_rank(group), distributed.get_world_size(group) - 1
    upper, lower = (x.new_zeros(*x.shape[:2], n, x.shape[3]) for n in (above, below))
    messages = [
        (distributed.isend, x[:, :, x.shape[2] - above :].contiguous(), rank + 1, above),
        (distributed.isend, x[:, :, :below].contiguous(), rank - 1, below),
        (distributed.irecv, upper, rank - 1, above),
        (distributed.irecv, lower, rank + 1, below),
    ]
    wanted = [(way, rows, peer) for way, rows, peer, n in messages if n and 0 <= peer <= last]
    operations = [distributed.P2POp(way, rows, group=group, group_peer=peer) for way, rows, peer in wanted]
    with naming_losses(group, "exchanging rows", peers={peer for _, _, peer in wanted}):
        for work in distributed.batch_isend_irecv(operations) if operations else []:
            work.wait()
    return [upper, x, lower]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
