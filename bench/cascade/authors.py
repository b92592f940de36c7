"""The authors' form of neighborhood patch attention, in the place of ours: everything else of a run stays the same.

Their code pads the canvas of queries to whole patches, gathers the window of keys and values of every patch into one batch, and calls
torch's attention on it. Text is copied into every window, rotated, and averaged. With jitter every call of every layer draws a new offset
and pads the canvas by one more patch. Written from the description of the method (arXiv:2510.25818), not from its code.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim, P x P patch, W x W window, n windows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.families.grid import Grid
from scalediff.families.rotation import TextRotation
from scalediff.patching import plan
from scalediff_kernels.neighborhood.reference import rotate_pairs

_sdpa = F.scaled_dot_product_attention  # taken at import: in the pass of a patched model the attribute leads to the patch


class Authors:
    """Their attention for a model that rotates so, with jitter or always with one offset `(Y, X)` in tokens, padded as with jitter."""

    def __init__(self, rotation: TextRotation | None, *, jitter: bool = False, offset: Grid | None = None) -> None:
        self._rotation = rotation
        self._jitter, self._fixed, self._random = jitter, offset, random.Random(0)
        self._tables: dict[Any, list[Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, patched models compute their windows by it."""
        with mock.patch.multiple(plan, neighborhood_patch_attention=self.image, joint_neighborhood_patch_attention=self.joint):
            yield

    def image(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: Grid, patch: Grid, offset: Grid = (0, 0), scale: float | None = None,
        impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """As `scalediff_kernels.neighborhood_patch_attention`, `[B, Y, X, H, D]`."""
        cut = self._cut(q, window, patch, offset)
        return cut.canvas(_attended(cut.queries(q), cut.keys(k), cut.keys(v), scale))

    def joint(
        self, q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, *, window: Grid, patch: Grid,
        offset: Grid = (0, 0), scale: float | None = None, text_rope: tuple[Tensor, Tensor] | None = None,
        text_queries: str | None = "window", impl: str = "auto",
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `scalediff_kernels.joint_neighborhood_patch_attention`; text `[B, T, H, D]`. Another rule than theirs is a ValueError."""
        if text_queries != "window":
            raise ValueError(f"text_queries must be 'window', the authors' rule, got {text_queries=}")
        cut = self._cut(q, window, patch, offset)
        rope = self._rope(cut) if text_rope is not None and self._spare else text_rope
        texts = [x[:, None] if rope is None else _rotated(x, rope) for x in (text_q, text_k)]
        texts = [x.expand(-1, cut.count, -1, -1, -1) for x in (*texts, text_v[:, None])]
        b_q, b_k, b_v = (torch.cat(pair, 2) for pair in zip(texts, (cut.queries(q), cut.keys(k), cut.keys(v)), strict=True))
        out = _attended(b_q, b_k, b_v, scale)
        text = text_q.shape[1]
        return cut.canvas(out[:, :, text:]), out[:, :, :text].mean(1)

    @property
    def _spare(self) -> bool:
        return self._jitter or self._fixed is not None

    def _cut(self, q: Tensor, window: Grid, patch: Grid, offset: Grid) -> _Cut:
        drawn = (self._random.randrange(patch[0]), self._random.randrange(patch[1])) if self._jitter else offset
        return _Cut(q, window, patch, drawn if self._fixed is None else self._fixed, spare=self._spare)

    def _rope(self, cut: _Cut) -> tuple[Tensor, Tensor]:
        """cos and sin `[n_y, n_x, D / 2]` of the windows' top-left tokens, looked up on the device: offsets change from call to call."""
        assert self._rotation is not None
        key = (cut.grid, cut.window, cut.device)
        if key not in self._tables:  # of the window around every token
            tables = self._rotation.tables(cut.grid, cut.grid, cut.window, (1, 1), (0, 0))
            self._tables[key] = [table.to(cut.device, torch.float32) for table in tables]
        y, x = (center.clamp(0, n - 1) for center, n in zip(cut.centers, cut.grid, strict=True))
        cos, sin = self._tables[key]
        return cos[y[:, None], x], sin[y[:, None], x]


class _Cut:
    """A canvas of queries in whole patches, with or without one to spare along each axis, and the windows of these patches."""

    def __init__(self, q: Tensor, window: Grid, patch: Grid, offset: Grid, *, spare: bool) -> None:
        self.grid: Grid = (q.shape[1], q.shape[2])
        self.window, self._patch, self._offset, self.device = window, patch, offset, q.device
        self._patches = [-(-n // p) + spare for n, p in zip(self.grid, patch, strict=True)]
        self.count = self._patches[0] * self._patches[1]
        counts = zip(self._patches, patch, offset, strict=True)
        self.centers = [torch.arange(n, device=q.device) * p + (p // 2 - o) for n, p, o in counts]  # tokens along each axis
        self._places = self._keys(0)[:, None, :, None], self._keys(1)[None, :, None, :]

    def _keys(self, axis: int) -> Tensor:
        """`[n, W]`, the tokens of every patch's window along an axis."""
        length, window = self.grid[axis], min(self.window[axis], self.grid[axis])
        starts = (self.centers[axis] - self.window[axis] // 2).clamp(0, length - window)
        return starts[:, None] + torch.arange(window, device=self.device)

    def queries(self, q: Tensor) -> Tensor:
        """`[B, n, P P, H, D]` of `[B, Y, X, H, D]`."""
        (y, x), (p_y, p_x), (n_y, n_x) = self._offset, self._patch, self._patches
        pad = (0, 0, 0, 0, x, n_x * p_x - x - self.grid[1], y, n_y * p_y - y - self.grid[0])
        q = F.pad(q, pad) if any(pad) else q
        q = q.unflatten(2, (n_x, p_x)).unflatten(1, (n_y, p_y)).transpose(2, 3)
        return q.flatten(3, 4).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, n, W W, H, D]` of `[B, Y, X, H, D]`, copied."""
        rows, columns = self._places
        return x[:, rows, columns].flatten(3, 4).flatten(1, 2)

    def canvas(self, out: Tensor) -> Tensor:
        """`[B, Y, X, H, D]` of `[B, n, P P, H, D]`, without the padding."""
        (y, x), (rows, columns) = self._offset, self.grid
        out = out.unflatten(2, self._patch).unflatten(1, self._patches).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, y : y + rows, x : x + columns]


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Torch's attention, the windows of all pictures in one batch; `[B, n, S, H, D]`."""
    b_q, b_k, b_v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B n, H, S, D]
    out: Tensor = _sdpa(b_q, b_k, b_v, scale=scale).transpose(1, 2).unflatten(0, q.shape[:2])
    return out


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Text `[B, T, H, D]` rotated for every window, `[B, n, T, H, D]`, in fp32 or better."""
    cos, sin = (table.flatten(0, 1)[None] for table in rope)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rotate_pairs(wide, (cos, sin), 0).to(x.dtype).movedim(0, 1)
