"""Reference implementation of neighborhood patch attention: eager torch, one window after the other; fp64 stays fp64.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim, K window tokens.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from scalediff_kernels.neighborhood.wrapping import rolled_back, unrolled


def neighborhood_patch_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int], wrap: tuple[bool, bool],
    scale: float, origin: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """Reference of every faster implementation; arguments as in `api.neighborhood_patch_attention`, already checked."""
    (q, k, v), rows, columns = unrolled(q, (k, v), window=window, patch=patch, offset=offset, origin=origin, wrap=wrap)
    out = torch.empty_like(q)
    for y0, y1, key_y0, key_y1 in rows:
        for x0, x1, key_x0, key_x1 in columns:
            keys, values = (x[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2) for x in (k, v))
            b_out = attend(q[:, y0:y1, x0:x1].flatten(1, 2), keys, values, scale)
            out[:, y0:y1, x0:x1] = b_out.unflatten(1, (y1 - y0, x1 - x0)).to(q.dtype)
    return rolled_back(out, offset=offset, wrap=wrap)


def joint_neighborhood_patch_attention_reference(
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
    wrap: tuple[bool, bool],
    scale: float,
    text_rope: tuple[Tensor, Tensor] | None,
    text_queries: str | None,
    origin: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor | None]:
    """Reference of every faster implementation; arguments as in `api.joint_neighborhood_patch_attention`, already checked.

    Text keys and text queries are rotated for each window, as in the definition.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    every_k, every_v = k, v
    (q, k, v), rows, columns = unrolled(q, (k, v), window=window, patch=patch, offset=offset, origin=origin, wrap=wrap)
    out, text_sum = torch.empty_like(q), torch.zeros_like(text_q, dtype=compute)
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        for j, (x0, x1, key_x0, key_x1) in enumerate(columns):
            rotated_q, rotated_k = (rotate_pairs(x.to(compute), text_rope, i, j) for x in (text_q, text_k))
            keys = torch.cat([rotated_k, k[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2).to(compute)], dim=1)
            values = torch.cat([text_v, v[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2)], dim=1)
            b_out = attend(q[:, y0:y1, x0:x1].flatten(1, 2), keys, values, scale)
            out[:, y0:y1, x0:x1] = b_out.unflatten(1, (y1 - y0, x1 - x0)).to(q.dtype)
            if text_queries == "window":
                text_sum += attend(rotated_q, keys, values, scale)
    out = rolled_back(out, offset=offset, wrap=wrap)
    if text_queries == "global":
        keys, values = torch.cat([text_k, every_k.flatten(1, 2)], dim=1), torch.cat([text_v, every_v.flatten(1, 2)], dim=1)
        return out, attend(text_q, keys, values, scale).to(q.dtype)
    return out, (text_sum / (len(rows) * len(columns))).to(q.dtype) if text_queries == "window" else None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of queries `[B, S, H, D]` to keys `[B, K, G, D]`, computed and returned in at least fp32."""
    compute = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False) if torch.amp.is_autocast_available(q.device.type) else nullcontext():
        weights = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def rotate_pairs(x: Tensor, rope: tuple[Tensor, Tensor] | None, i: int, j: int | None = None) -> Tensor:
    """Rotate channels 2c and 2c + 1 of `[B, ..., D]` by the angle of window (i, j), or of all windows of row i: `[windows, B, ..., D]`."""
    if rope is None:
        return x
    cos, sin = (table[i].to(x.dtype) for table in rope)  # [windows, D / 2]
    cos, sin = (row[j] if j is not None else row.view(-1, *[1] * (x.ndim - 1), row.shape[-1]) for row in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
