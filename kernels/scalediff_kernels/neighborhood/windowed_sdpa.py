"""Neighborhood patch attention on any device by torch's scaled_dot_product_attention.

SDPA needs keys with a constant stride, which a window of a grid does not have. So the keys of a row of windows are copied column by column:
every window is then a contiguous range that overlaps the next one. Each key is copied once per row of windows, not once per window, and a
row of windows needs only a few calls. With text in the same softmax, every window is copied separately. Along an axis that wraps, keys are
repeated as far as the windows reach.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff_kernels.neighborhood.geometry import PatchWindow
from scalediff_kernels.neighborhood.reference import rotate_pairs
from scalediff_kernels.neighborhood.wrapping import rolled_back, unrolled

# Bound at import, because `scalediff.patch_model` replaces the attribute during a forward pass and its replacement calls this module.
_sdpa = F.scaled_dot_product_attention


def neighborhood_patch_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int], wrap: tuple[bool, bool],
    scale: float, origin: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """Arguments as in `api.neighborhood_patch_attention`, already checked. A window that covers the grid is one plain SDPA call."""
    if window[0] >= k.shape[1] and window[1] >= k.shape[2]:
        b_q, b_k, b_v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        return _attend(b_q, b_k, b_v, scale).transpose(1, 2).reshape(q.shape)
    (q, k, v), rows, columns = unrolled(q, (k, v), window=window, patch=patch, offset=offset, origin=origin, wrap=wrap)
    runs = _evenly_spaced(_distinct(columns))
    out: Tensor | None = None
    for y0, y1, key_y0, key_y1 in _distinct(rows):
        band = _by_columns(q[:, y0:y1]), _by_columns(k[:, key_y0:key_y1]), _by_columns(v[:, key_y0:key_y1])
        for run in runs:
            b_out = _attend_run(*band, run, y1 - y0, key_y1 - key_y0, scale)  # [B, H, columns, rows, D]
            out = b_out.new_empty(q.shape) if out is None else out  # in the dtype that autocast chose
            out[:, y0:y1, run[0].query_start : run[-1].query_stop] = b_out.permute(0, 3, 2, 1, 4)
    assert out is not None
    return rolled_back(out, offset=offset, wrap=wrap)


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
    wrap: tuple[bool, bool],
    scale: float,
    text_rope: tuple[Tensor, Tensor] | None,
    text_queries: str | None,
    origin: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor | None]:
    """Arguments as in `api.joint_neighborhood_patch_attention`, already checked. One SDPA call per window."""
    every_k, every_v = k, v
    (q, k, v), rows, columns = unrolled(q, (k, v), window=window, patch=patch, offset=offset, origin=origin, wrap=wrap)
    q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))  # [B, H, Y, X, D]
    text_q, text_k, text_v = (x.transpose(1, 2) for x in (text_q, text_k, text_v))  # [B, H, T, D]
    tokens = text_q.shape[2] if text_queries == "window" else 0
    out: Tensor | None = None
    text_sum = torch.zeros_like(text_q, dtype=torch.promote_types(q.dtype, torch.float32))
    for i, (y0, y1, key_y0, key_y1) in enumerate(rows):
        rotated = zip(_rotated(text_q, text_rope, i, len(columns)), _rotated(text_k, text_rope, i, len(columns)), strict=True)
        for (x0, x1, key_x0, key_x1), (rotated_q, rotated_k) in zip(columns, rotated, strict=True):
            b_k = torch.cat([rotated_k, k[:, :, key_y0:key_y1, key_x0:key_x1].flatten(2, 3)], dim=2)
            b_v = torch.cat([text_v, v[:, :, key_y0:key_y1, key_x0:key_x1].flatten(2, 3)], dim=2)
            b_q = torch.cat([rotated_q[:, :, :tokens], q[:, :, y0:y1, x0:x1].flatten(2, 3)], dim=2)
            b_out = _attend(b_q, b_k, b_v, scale)
            out = b_out.new_empty(q.permute(0, 2, 3, 1, 4).shape) if out is None else out  # in the dtype that autocast chose
            out[:, y0:y1, x0:x1] = b_out[:, :, tokens:].unflatten(2, (y1 - y0, x1 - x0)).permute(0, 2, 3, 1, 4)
            if tokens:
                text_sum = text_sum + b_out[:, :, :tokens]
    assert out is not None
    out = rolled_back(out, offset=offset, wrap=wrap)
    if text_queries == "global":
        b_k, b_v = (torch.cat([x, y.flatten(1, 2).transpose(1, 2)], dim=2) for x, y in ((text_k, every_k), (text_v, every_v)))
        return out, _attend(text_q, b_k, b_v, scale).transpose(1, 2)
    return out, (text_sum / (len(rows) * len(columns))).to(out.dtype).transpose(1, 2) if tokens else None


def _rotated(text: Tensor, rope: tuple[Tensor, Tensor] | None, i: int, count: int) -> Sequence[Tensor]:
    """Text `[B, H or G, T, D]` rotated for each window of row i, computed in at least fp32."""
    if rope is None:
        return [text] * count
    return rotate_pairs(text.to(torch.promote_types(text.dtype, torch.float32)), rope, i).to(text.dtype).unbind()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out: Tensor = _sdpa(q, k, v, scale=scale, enable_gqa=True) if q.shape[1] != k.shape[1] else _sdpa(q, k, v, scale=scale)
    return out


def _distinct(spans: tuple[PatchWindow, ...]) -> list[PatchWindow]:
    """Merge adjacent patches with the same window, which occur at borders, into larger patches."""
    shared = (list(group) for _, group in groupby(spans, key=lambda span: span.key_start))
    return [group[-1]._replace(query_start=group[0].query_start) for group in shared]


def _evenly_spaced(spans: list[PatchWindow]) -> list[list[PatchWindow]]:
    """Split adjacent patches into runs with equal patch sizes and equal distances between windows."""
    runs: list[list[PatchWindow]] = []
    for span in spans:
        run = runs[-1] if runs else []
        fits = bool(run) and span.query_stop - span.query_start == run[0].query_stop - run[0].query_start
        if fits and (len(run) == 1 or span.key_start - run[-1].key_start == run[1].key_start - run[0].key_start):
            run.append(span)
        else:
            runs.append([span])
    return runs


def _by_columns(band: Tensor) -> Tensor:
    """Copy `[B, rows, X, H, D]` to `[B, H, X rows, D]`."""
    return band.permute(0, 3, 2, 1, 4).flatten(2, 3)


def _attend_run(q: Tensor, k: Tensor, v: Tensor, run: list[PatchWindow], rows: int, key_rows: int, scale: float) -> Tensor:
    """Attend to all windows of a run in one SDPA call.

    Windows take the place of heads and overlap in memory. Query heads that share a key head become additional queries.

    Args:
        q, k, v: `[B, H or G, X rows, D]` from `_by_columns`, with `rows` rows of queries and `key_rows` rows of keys.

    Returns:
        `[B, H, columns, rows, D]`, the columns of all patches of the run.
    """
    (batch, heads, _, dim), groups, n = q.shape, k.shape[1], len(run)
    width = (run[0].key_stop - run[0].key_start) * key_rows
    step = (run[1].key_start - run[0].key_start) * key_rows if n > 1 else width
    keys = slice(run[0].key_start * key_rows, run[-1].key_stop * key_rows)
    b_k, b_v = (x.flatten(0, 1)[:, keys].unfold(1, width, step).mT for x in (k, v))  # [B G, n, width, D]
    b_q = q[:, :, run[0].query_start * rows : run[-1].query_stop * rows]
    b_q = b_q.reshape(batch * groups, heads // groups, n, -1, dim).transpose(1, 2).reshape(batch * groups, n, -1, dim)
    out: Tensor = _sdpa(b_q, b_k, b_v, scale=scale)
    return out.view(batch * groups, n, heads // groups, -1, dim).transpose(1, 2).reshape(batch, heads, -1, rows, dim)
