"""The authors' form of neighborhood patch attention, in the place of ours: everything else of a run stays the same.

Their code pads the canvas of queries to whole patches, gathers the window of keys and values of every patch into one batch, and calls
torch's attention on it. Text is copied into every window, rotated, and averaged. With jitter every call of every layer draws a new offset
and pads the canvas by one more patch. Written from the description of the method (arXiv:2510.25818), not from its code.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim, n windows, S tokens of a window and its text.
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

from bench.attention.sdpa import Cut
from scalediff.families.grid import Grid
from scalediff.families.rotation import TextRotation
from scalediff.patching import call

_sdpa = F.scaled_dot_product_attention  # taken at import: in the pass of a patched model the attribute leads to the patch


class Authors:
    """Their attention for a model that rotates so, with jitter or always with one offset `(Y, X)` in tokens, padded as with jitter."""

    def __init__(self, rotation: TextRotation | None, *, jitter: bool = False, offset: Grid | None = None) -> None:
        self._rotation, self._jitter, self._fixed, self._random = rotation, jitter, offset, random.Random(0)
        self._spare = jitter or offset is not None
        self._tables: dict[Any, list[Tensor]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, patched models compute their windows by it."""
        with mock.patch.multiple(call, neighborhood_patch_attention=self.image, joint_neighborhood_patch_attention=self.joint):
            yield

    def image(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: Grid, patch: Grid, offset: Grid = (0, 0),
        wrap: tuple[bool, bool] = (False, False), scale: float | None = None, impl: str = "auto",
    ) -> Tensor:  # fmt: skip
        """As `scalediff_kernels.neighborhood_patch_attention`, `[B, Y, X, H, D]`, without axes that wrap, as theirs."""
        assert not any(wrap)
        cut = self._cut(q, window, patch, offset)
        return cut.canvas(_attended(cut.parts(q, k, v), scale))

    def joint(
        self, q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, *, window: Grid, patch: Grid,
        offset: Grid = (0, 0), wrap: tuple[bool, bool] = (False, False), scale: float | None = None,
        text_rope: tuple[Tensor, Tensor] | None = None, text_queries: str | None = "window", impl: str = "auto",
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `scalediff_kernels.joint_neighborhood_patch_attention`; text `[B, T, H, D]`. Another rule than theirs is a ValueError."""
        assert not any(wrap)
        if text_queries != "window":
            raise ValueError(f"text_queries must be 'window', the authors' rule, got {text_queries=}")
        cut = self._cut(q, window, patch, offset)
        rope = self._rope(cut) if text_rope is not None and self._spare else text_rope
        pairs = zip(cut.texts((text_q, text_k, text_v), rope), cut.parts(q, k, v), strict=True)
        out, text = _attended([torch.cat(pair, 2) for pair in pairs], scale), text_q.shape[1]
        return cut.canvas(out[:, :, text:]), out[:, :, :text].mean(1)

    def _cut(self, q: Tensor, window: Grid, patch: Grid, offset: Grid) -> Cut:
        drawn = (self._random.randrange(patch[0]), self._random.randrange(patch[1])) if self._jitter else offset
        chosen = drawn if self._fixed is None else self._fixed
        return Cut((q.shape[1], q.shape[2]), window, patch, q.device, offset=chosen, spare=self._spare)

    def _rope(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """cos and sin `[n_y, n_x, D / 2]` of the windows' top-left tokens, looked up on the device: offsets change from call to call."""
        assert self._rotation is not None
        key = (cut.grid, cut.window, cut.device)
        if key not in self._tables:  # of the window around every token
            tables = self._rotation.tables(cut.grid, cut.grid, cut.window, (1, 1), (0, 0))
            self._tables[key] = [table.to(cut.device, torch.float32) for table in tables]
        y, x = (center.clamp(0, n - 1) for center, n in zip(cut.centers, cut.grid, strict=True))
        cos, sin = self._tables[key]
        return cos[y[:, None], x], sin[y[:, None], x]


def _attended(parts: list[Tensor], scale: float | None) -> Tensor:
    """Torch's attention of q, k and v `[B, n, S, H, D]`, the windows of all pictures in one batch."""
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in parts)  # [B n, H, S, D]
    out: Tensor = _sdpa(q, k, v, scale=scale).transpose(1, 2).unflatten(0, parts[0].shape[:2])
    return out
