"""Neighborhood patch attention on any device: one scaled_dot_product_attention per window, on slices of K and V.

Only one window is ever copied out at a time (a slice of a grid is not one stride), never all of them.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.neighborhood.reference import rotate_pairs

# Taken at import, so that a caller who has replaced the attribute for the time of a forward pass does not meet itself here.
_sdpa = F.scaled_dot_product_attention


def neighborhood_patch_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int], scale: float
) -> Tensor:
    """Arguments as in `api.neighborhood_patch_attention`, already validated; a window over the grid is one plain SDPA."""
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, Y, X, D]
    if window[0] >= q.shape[2] and window[1] >= q.shape[3]:
        return _attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), scale).view(*q.shape[:4], -1).permute(0, 2, 3, 1, 4)
    rows = windows(q.shape[2], window[0], patch[0], offset[0])
    columns = windows(q.shape[3], window[1], patch[1], offset[1])
    bands = []
    for y0, y1, key_y0, key_y1 in rows:
        patches = []
        for x0, x1, key_x0, key_x1 in columns:
            b_k, b_v = (x[:, :, key_y0:key_y1, key_x0:key_x1].flatten(2, 3) for x in (k, v))
            b_out = _attend(q[:, :, y0:y1, x0:x1].flatten(2, 3), b_k, b_v, scale)
            patches.append(b_out.unflatten(2, (y1 - y0, x1 - x0)))
        bands.append(torch.cat(patches, dim=3))
    return torch.cat(bands, dim=2).permute(0, 2, 3, 1, 4)


def joint_neighborhood_patch_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    scale: float,
    text_rope: tuple[Tensor, Tensor] | None,
    text_queries: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments as in `api.joint_neighborhood_patch_attention`, already validated; text and window in one call per window."""
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, Y, X, D]
    text_q, text_k, text_v = (x.transpose(1, 2) for x in (text_q, text_k, text_v))  # [B, H, T, D]
    rows = windows(q.shape[2], window[0], patch[0], offset[0])
    columns = windows(q.shape[3], window[1], patch[1], offset[1])
    tokens = text_q.shape[2] if text_queries == "window" else 0
    bands, text_sum = [], torch.zeros_like(text_q, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        patches = []
        for j, (x0, x1, key_x0, key_x1) in enumerate(columns):
            turned_q, turned_k = (rotate_pairs(x.to(text_sum.dtype), text_rope, i, j).to(q.dtype) for x in (text_q, text_k))
            b_k = torch.cat([turned_k, k[:, :, key_y0:key_y1, key_x0:key_x1].flatten(2, 3)], dim=2)
            b_v = torch.cat([text_v, v[:, :, key_y0:key_y1, key_x0:key_x1].flatten(2, 3)], dim=2)
            b_q = torch.cat([turned_q[:, :, :tokens], q[:, :, y0:y1, x0:x1].flatten(2, 3)], dim=2)
            b_out = _attend(b_q, b_k, b_v, scale)
            patches.append(b_out[:, :, tokens:].unflatten(2, (y1 - y0, x1 - x0)))
            if tokens:
                text_sum = text_sum + b_out[:, :, :tokens]
        bands.append(torch.cat(patches, dim=3))
    out = torch.cat(bands, dim=2).permute(0, 2, 3, 1, 4)
    if text_queries == "global":
        b_k, b_v = torch.cat([text_k, k.flatten(2, 3)], dim=2), torch.cat([text_v, v.flatten(2, 3)], dim=2)
        return out, _attend(text_q, b_k, b_v, scale).transpose(1, 2)
    return out, (text_sum / (len(rows) * len(columns))).to(out.dtype).transpose(1, 2) if tokens else None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = _sdpa(q, k, v, scale=scale, enable_gqa=True) if q.shape[1] != k.shape[1] else _sdpa(q, k, v, scale=scale)
    return out
