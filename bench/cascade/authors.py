"""The authors' form of neighborhood patch attention, put in the place of ours: everything else of a run stays ours.

Their code pads the canvas of queries to whole patches, gathers every patch's window of keys and values into one batch, and calls
torch's attention on it. Text is copied into every window, turned, and averaged. For FLUX it may be jittered: a new offset for every
call of every layer, by padding the canvas by one more patch, which is computed and thrown away. Written from the description of the
method (arXiv:2510.25818), not from its code.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim, P x P patch, W x W window, n windows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.families import family_of
from scalediff.families.grid import Grid
from scalediff.patching import plan

# Taken at import, as ours does: within a patched model's pass the attribute leads to the patch.
_sdpa = F.scaled_dot_product_attention


class Authors:
    """Their attention for one denoiser.

    Args:
        denoiser: Of a known family; says how text is turned.
        jitter: Draw a new offset for every call, and pad by a patch for it.
        seed: Of the offsets.
        offset: Instead of drawing, always this one, `(Y, X)` in tokens; to compare with another implementation.
    """

    def __init__(self, denoiser: nn.Module, *, jitter: bool = False, seed: int = 0, offset: Grid | None = None) -> None:
        family = family_of(denoiser)
        self._rotation = None if family is None else family.rotation(denoiser)
        self._jitter, self._fixed, self._random = jitter, offset, random.Random(seed)
        self._turns: dict[Any, tuple[Tensor, Tensor]] = {}

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
        cut = _Cut(q, window, patch, self._offset(offset, patch), spare=self._spare)
        b_q, b_k, b_v = (x.flatten(0, 1).transpose(1, 2) for x in (cut.queries(q), cut.keys(k), cut.keys(v)))  # [B n, H, S, D]
        out = _sdpa(b_q, b_k, b_v, scale=scale)
        return cut.canvas(out.transpose(1, 2).unflatten(0, (q.shape[0], -1)))

    def joint(
        self, q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, *, window: Grid, patch: Grid,
        offset: Grid = (0, 0), scale: float | None = None, text_rope: tuple[Tensor, Tensor] | None = None,
        text_queries: str | None = "window", impl: str = "auto",
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `scalediff_kernels.joint_neighborhood_patch_attention`; text `[B, T, H, D]`.

        Raises:
            ValueError: another rule for queries of text than theirs.
        """
        if text_queries != "window":
            raise ValueError(f"text_queries must be 'window', the authors' rule, got {text_queries=}")
        cut = _Cut(q, window, patch, self._offset(offset, patch), spare=self._spare)
        if text_rope is not None and self._spare:
            text_rope = self._turned_by(cut)
        texts = [_turned(x, text_rope) if text_rope is not None else x[:, None] for x in (text_q, text_k)]
        texts = [x.expand(-1, cut.count, -1, -1, -1) for x in (*texts, text_v[:, None])]
        parts = zip(texts, (cut.queries(q), cut.keys(k), cut.keys(v)), strict=True)
        b_q, b_k, b_v = (torch.cat(pair, 2).flatten(0, 1).transpose(1, 2) for pair in parts)  # [B n, H, T + S, D]
        out = _sdpa(b_q, b_k, b_v, scale=scale).transpose(1, 2).unflatten(0, (q.shape[0], -1))
        text = text_q.shape[1]
        return cut.canvas(out[:, :, text:]), out[:, :, :text].mean(1)

    @property
    def _spare(self) -> bool:
        return self._jitter or self._fixed is not None

    def _offset(self, given: Grid, patch: Grid) -> Grid:
        if self._fixed is not None:
            return self._fixed
        return (self._random.randrange(patch[0]), self._random.randrange(patch[1])) if self._jitter else given

    def _turned_by(self, cut: _Cut) -> tuple[Tensor, Tensor]:
        """cos and sin `[n_y, n_x, D / 2]` of the windows' top-left tokens, looked up on the device: offsets change from call to call."""
        assert self._rotation is not None
        key = (cut.grid, cut.window, cut.device)
        if key not in self._turns:
            cos, sin = self._rotation.tables(cut.grid, cut.grid, cut.window, (1, 1), (0, 0))  # every token its own patch: every window
            first = [min(w // 2, n - 1) for n, w in zip(cut.grid, cut.window, strict=True)]
            y, x = (slice(i, i + n - min(w, n) + 1) for i, n, w in zip(first, cut.grid, cut.window, strict=True))  # all starts, once
            cos, sin = cos[y, x], sin[y, x]
            self._turns[key] = cos.to(cut.device, torch.float32), sin.to(cut.device, torch.float32)
        cos, sin = self._turns[key]
        rows, columns = cut.places[0][:, :1], cut.places[1][:, 0]
        return cos[rows, columns], sin[rows, columns]


class _Cut:
    """A canvas of queries in whole patches, with one to spare along each axis or not, and the windows of these patches."""

    def __init__(self, q: Tensor, window: Grid, patch: Grid, offset: Grid, *, spare: bool) -> None:
        self.grid: Grid = (q.shape[1], q.shape[2])
        self.window, self._patch, self.device = window, patch, q.device
        self._rows, self._columns = (-(-n // p) + spare for n, p in zip(self.grid, patch, strict=True))
        self.count = self._rows * self._columns
        self._first = offset
        ends = (self._rows * patch[0] - offset[0] - self.grid[0], self._columns * patch[1] - offset[1] - self.grid[1])
        self._pad = (0, 0, 0, 0, offset[1], ends[1], offset[0], ends[0])
        self.places = [self._keys(axis, count) for axis, count in enumerate((self._rows, self._columns))]

    def _keys(self, axis: int, count: int) -> Tensor:
        """`[count, W]`, the tokens of every patch's window along an axis; made on the device."""
        length, window, patch = self.grid[axis], self.window[axis], self._patch[axis]
        kept = min(window, length)
        starts = torch.arange(count, device=self.device) * patch + (patch // 2 - window // 2 - self._first[axis])
        return starts.clamp(0, length - kept)[:, None] + torch.arange(kept, device=self.device)

    def queries(self, q: Tensor) -> Tensor:
        """`[B, n, P P, H, D]` of `[B, Y, X, H, D]`."""
        q = F.pad(q, self._pad) if any(self._pad) else q
        q = q.unflatten(2, (self._columns, self._patch[1])).unflatten(1, (self._rows, self._patch[0])).transpose(2, 3)
        return q.flatten(3, 4).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, n, W W, H, D]` of `[B, Y, X, H, D]`, copied."""
        y, z = self.places
        return x[:, y[:, None, :, None], z[None, :, None, :]].flatten(3, 4).flatten(1, 2)

    def canvas(self, out: Tensor) -> Tensor:
        """`[B, Y, X, H, D]` of `[B, n, P P, H, D]`, without the padding."""
        (y, x), (rows, columns) = self._first, self.grid
        out = out.unflatten(2, self._patch).unflatten(1, (self._rows, self._columns)).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, y : y + rows, x : x + columns]


def _turned(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Text `[B, T, H, D]` turned for every window, `[B, n, T, H, D]`, in fp32 or better."""
    cos, sin = (table.flatten(0, 1)[None, :, None, None] for table in rope)
    kind = torch.promote_types(x.dtype, torch.float32)
    even, odd = x[:, None, ..., 0::2].to(kind), x[:, None, ..., 1::2].to(kind)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)
