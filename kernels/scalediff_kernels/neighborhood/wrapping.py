"""Axes that wrap, for the implementations in torch: longer tensors on which the windows that continue on the other side are plain slices.

Legend: B batch, H heads, G key heads, Y x X token grid, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalediff_kernels.neighborhood.geometry import PatchWindow, grid_windows

Spans = tuple[PatchWindow, ...]


def unrolled(
    q: Tensor,
    keys: Sequence[Tensor],
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int],
    origin: tuple[int, int],
    wrap: tuple[bool, bool],
) -> tuple[tuple[Tensor, ...], Spans, Spans]:
    """The tensors and, for rows and columns, the patches and windows that are slices of them.

    Along an axis that wraps, the queries are rolled by the offset, so that no patch crosses the border, and the keys are repeated as far
    as the windows reach. Along another axis nothing changes.

    Args:
        q: Queries `[B, Y, X, H, D]`.
        keys: Keys, or keys and values, `[B, Y, X, G, D]`.
        window, patch, offset, origin, wrap: As in `windows`, per axis `(Y, X)`.

    Returns:
        q and the keys, the spans of rows, the spans of columns.
    """
    spans = list(grid_windows(q.shape[1:3], keys[0].shape[1:3], window, patch, offset, origin, wrap))
    for axis in (0, 1):
        if wrap[axis]:
            first, last = min(span.key_start for span in spans[axis]), max(span.key_stop for span in spans[axis])
            places = torch.arange(first, last, device=q.device) % q.shape[1 + axis]
            keys = [x.index_select(1 + axis, places) for x in keys]
            by = offset[axis]
            q = q.roll(by, 1 + axis) if by else q
            spans[axis] = tuple(PatchWindow(a + by, b + by, c - first, d - first) for a, b, c, d in spans[axis])
    return (q, *keys), spans[0], spans[1]


def rolled_back(out: Tensor, *, offset: tuple[int, int], wrap: tuple[bool, bool]) -> Tensor:
    """The result `[B, Y, X, ...]` of queries that `unrolled` has rolled."""
    shifts = {1 + axis: -offset[axis] for axis in (0, 1) if wrap[axis] and offset[axis]}
    return out.roll(tuple(shifts.values()), tuple(shifts)) if shifts else out
