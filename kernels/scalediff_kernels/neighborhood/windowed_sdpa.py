"""Neighborhood patch attention on any device: one scaled_dot_product_attention per window, on slices of K and V.

Only one window is ever copied out at a time (a slice of a grid is not one stride), never all of them.

Legend: B batch, H heads, Y x X token grid, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff_kernels.neighborhood.geometry import windows

# Taken at import, so that a caller who has replaced the attribute for the time of a forward pass does not meet itself here.
_sdpa = F.scaled_dot_product_attention


def neighborhood_patch_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int], scale: float
) -> Tensor:
    """Arguments as in `api.neighborhood_patch_attention`, already validated; a window over the grid is one plain SDPA."""
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, Y, X, D]
    if window[0] >= q.shape[2] and window[1] >= q.shape[3]:
        out: Tensor = _sdpa(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), scale=scale)
        return out.view(*q.shape[:4], -1).permute(0, 2, 3, 1, 4)
    rows = windows(q.shape[2], window[0], patch[0], offset[0])
    columns = windows(q.shape[3], window[1], patch[1], offset[1])
    bands = []
    for y0, y1, key_y0, key_y1 in rows:
        band_q, band_k, band_v = q[:, :, y0:y1], k[:, :, key_y0:key_y1], v[:, :, key_y0:key_y1]
        patches = []
        for x0, x1, key_x0, key_x1 in columns:
            b_q = band_q[:, :, :, x0:x1].flatten(2, 3)
            b_k = band_k[:, :, :, key_x0:key_x1].flatten(2, 3)
            b_v = band_v[:, :, :, key_x0:key_x1].flatten(2, 3)
            patches.append(_sdpa(b_q, b_k, b_v, scale=scale).unflatten(2, (y1 - y0, x1 - x0)))
        bands.append(torch.cat(patches, dim=3))
    return torch.cat(bands, dim=2).permute(0, 2, 3, 1, 4)
