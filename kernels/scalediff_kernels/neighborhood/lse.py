"""Log-sum-exp of the scores of image queries in eager torch, one window after the other; fp64 stays fp64.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.neighborhood.reference import rotate_pairs


def window_log_sum_exp(
    q: Tensor,
    k: Tensor,
    text_k: Tensor | None,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    scale: float,
    text_rope: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`[B, Y, X, H]`, natural logarithm, in at least fp32; arguments as in `api.joint_neighborhood_patch_attention`, already checked."""
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape[:-1], dtype=compute, device=q.device)
    rows = windows(q.shape[1], window[0], patch[0], offset[0])
    columns = windows(q.shape[2], window[1], patch[1], offset[1])
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        for j, (x0, x1, key_x0, key_x1) in enumerate(columns):
            keys = k[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2).to(compute)
            if text_k is not None:
                keys = torch.cat([rotate_pairs(text_k.to(compute), text_rope, i, j), keys], dim=1)
            keys = keys.repeat_interleave(q.shape[3] // k.shape[3], dim=2)
            scores = torch.einsum("byxhd,bkhd->byxhk", q[:, y0:y1, x0:x1].to(compute) * scale, keys)
            out[:, y0:y1, x0:x1] = scores.logsumexp(dim=-1)
    return out
