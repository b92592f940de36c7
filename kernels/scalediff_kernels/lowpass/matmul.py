"""The filters as matrix products, on any device: two per direction, in fp32, or in fp64 for fp64.

Legend: B batch, C channels, Y x X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalediff_kernels.lowpass.operators import LowPass, factor


def coarse_matmul(inputs: Sequence[Tensor], weights: Sequence[float], axes: tuple[LowPass, LowPass], offset: Tensor | None) -> Tensor:
    """`offset + D_y (sum weights * inputs) D_x^T`, `[B, C, m_y, m_x]`; inputs `[B, C, Y, X]`."""
    dtype = accumulator(inputs[0])
    total = _weighted_sum(inputs, weights, dtype)
    down_y, down_x = (factor(axis, "down", total.device, dtype) for axis in axes)
    rows = total.reshape(-1, total.shape[-1]) @ down_x.T  # one plain product over all rows of all pictures
    coarse = torch.matmul(down_y, rows.view(*total.shape[:-1], -1))
    return coarse if offset is None else coarse.add_(offset)


def expand_matmul(
    coarse: Tensor, gain: float, axes: tuple[LowPass, LowPass], addends: Sequence[Tensor], weights: Sequence[float], *, dtype: torch.dtype
) -> Tensor:
    """`sum weights * addends + gain U_y coarse U_x^T`, `[B, C, Y, X]` in `dtype`; addends of that shape."""
    up_y, up_x = (factor(axis, "up", coarse.device, coarse.dtype) for axis in axes)
    rows = torch.matmul(up_y, coarse)  # [B, C, Y, m_x]
    flat = rows.view(-1, rows.shape[-1])
    if not addends:
        return torch.mm(flat * gain, up_x.T).view(*rows.shape[:-1], -1).to(dtype)
    total = _weighted_sum(addends, weights, coarse.dtype)
    return torch.addmm(total.reshape(-1, total.shape[-1]), flat, up_x.T, alpha=gain).view(total.shape).to(dtype)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """In `dtype`; the one tensor itself where its weight is 1."""
    first = tensors[0].to(dtype)
    if len(tensors) == 1:
        return first if weights[0] == 1 else first * weights[0]
    if weights[0] == 1:
        total = torch.add(first, tensors[1].to(dtype), alpha=weights[1])
    else:
        total = (first * weights[0]).add_(tensors[1].to(dtype), alpha=weights[1])
    for x, weight in zip(tensors[2:], weights[2:], strict=True):
        total.add_(x.to(dtype), alpha=weight)
    return total
