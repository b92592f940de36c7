"""Log-sum-exp of the scores of image queries in eager torch, one window after the other; fp64 stays fp64.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from scalediff_kernels.neighborhood.geometry import PatchWindow
from scalediff_kernels.neighborhood.reference import rotate_pairs
from scalediff_kernels.neighborhood.wrapping import rolled_back, unrolled


def window_log_sum_exp(
    q: Tensor,
    k: Tensor,
    text_k: Tensor | None = None,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    wrap: tuple[bool, bool],
    scale: float,
    text_rope: tuple[Tensor, Tensor] | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Tensor:
    """`[B, Y, X, H]`, natural logarithm, in at least fp32; arguments as in `api.joint_neighborhood_patch_attention`, already checked."""
    compute = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False) if torch.amp.is_autocast_available(q.device.type) else nullcontext():
        (q, k), rows, columns = unrolled(q, (k,), window=window, patch=patch, offset=offset, origin=origin, wrap=wrap)
        text_k = None if text_k is None else text_k.to(compute)
        lse = _log_sum_exp(q.to(compute), k.to(compute), text_k, rows, columns, scale, text_rope)
    return rolled_back(lse, offset=offset, wrap=wrap)


def _log_sum_exp(
    q: Tensor, k: Tensor, text_k: Tensor | None, rows: tuple[PatchWindow, ...], columns: tuple[PatchWindow, ...], scale: float,
    text_rope: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q[..., 0], memory_format=torch.contiguous_format)
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        for j, (x0, x1, key_x0, key_x1) in enumerate(columns):
            keys = k[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2)
            if text_k is not None:
                keys = torch.cat([rotate_pairs(text_k, text_rope, i, j), keys], dim=1)
            for head in range(q.shape[3]):  # the scores of one head at a time are in memory
                scores = torch.einsum("byxd,bkd->byxk", q[:, y0:y1, x0:x1, head] * scale, keys[:, :, head // (q.shape[3] // k.shape[3])])
                out[:, y0:y1, x0:x1, head] = scores.logsumexp(dim=-1)
    return out
