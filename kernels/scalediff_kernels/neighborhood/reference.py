"""Neighborhood patch attention as it is defined: eager torch, one window after the other; fp64 stays fp64.

Legend: B batch, H heads, Y x X token grid, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalediff_kernels.neighborhood.geometry import windows


def neighborhood_patch_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int], scale: float
) -> Tensor:
    """The oracle of every faster implementation; arguments as in `api.neighborhood_patch_attention`, already validated."""
    compute = torch.promote_types(q.dtype, torch.float32)
    rows = windows(q.shape[1], window[0], patch[0], offset[0])
    columns = windows(q.shape[2], window[1], patch[1], offset[1])
    out = torch.empty_like(q)
    for y0, y1, key_y0, key_y1 in rows:
        for x0, x1, key_x0, key_x1 in columns:
            b_q = q[:, y0:y1, x0:x1].flatten(1, 2).to(compute)
            b_k = k[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2).to(compute)
            b_v = v[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2).to(compute)
            weights = torch.einsum("bqhd,bkhd->bhqk", b_q * scale, b_k).softmax(dim=-1)
            b_out = torch.einsum("bhqk,bkhd->bqhd", weights, b_v)
            out[:, y0:y1, x0:x1] = b_out.unflatten(1, (y1 - y0, x1 - x0)).to(q.dtype)
    return out
