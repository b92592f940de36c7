"""What the attention benchmark runs: the models' shapes by name, the tasks made of them, and their inputs.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim. 2 FLOPs a multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.harness.rows import Row, read_records
from scalediff_kernels.neighborhood.geometry import PatchWindow, attention_flops, text_attention_flops, windows

Pair = tuple[int, int]
Heads = tuple[Tensor, Tensor, Tensor]  # q, k and v
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Self-attention of one layer."""

    grid: Pair  # tokens, (Y, X), as the next two
    window: Pair
    patch: Pair
    heads: int
    head_dim: int
    batch: int = 1  # 2 for models with classifier-free guidance
    text: int = 0  # tokens in the same softmax
    groups: int = 0  # key heads; 0 for as many as query heads
    dtype: torch.dtype = torch.bfloat16  # the model's own

    @property
    def key_heads(self) -> int:
        return self.groups or self.heads

    @property
    def tokens(self) -> int:
        return self.text + prod(self.grid)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules for text queries; one empty rule without text."""
        return ("window", "global") if self.text else ("",)

    def flops(self, queries: Literal["image", "text"], rule: str = "") -> int:
        """Useful FLOPs of the queries of the image in windows, or of those of text by a rule."""
        how: Any = {name: getattr(self, name) for name in ("grid", "window", "heads", "head_dim", "batch", "text")}
        return attention_flops(**how) if queries == "image" else text_attention_flops(**how, patch=self.patch, rule=rule)


def _shape(row: Row) -> Shape:
    """A row of shapes.csv, with sizes in tokens, Y x X; patches are half as large as windows."""
    sizes: dict[str, Any] = {name: tuple(map(int, row[name].split("x"))) for name in ("grid", "window")}
    sizes |= {name: int(row[name]) for name in ("heads", "head_dim", "batch", "text", "groups")}
    return Shape(**sizes, patch=(sizes["window"][0] // 2, sizes["window"][1] // 2), dtype=DTYPES[row["dtype"]])


# `flux-image` has no text, as in published figures of other kernels; Lumina-Next's text has attention of its own. No patch divides a grid
# of `uhd`, 2160 x 3840 px.
_ALL = {row["name"]: _shape(row) for row in read_records(Path(__file__).with_name("shapes.csv"))}
CPU_SHAPES = {name: shape for name, shape in _ALL.items() if name.startswith("cpu-")}
SHAPES = {name: shape for name, shape in _ALL.items() if name not in CPU_SHAPES}
QUICK = ("flux-4096", "flux-image-4096", "sdxl-64-4096", "sdxl-32-4096")
CPU_QUICK = ("cpu-32", "cpu-64")


@dataclass(frozen=True)
class Task:
    """A shape in a dtype on a device, with one rule for its text queries: `"window"`, `"global"`, or `""` without text.

    Under `"window"` text is rotated for every window, as the method's authors do; under `"global"` it is not.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    device: str
    rule: str = ""

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype is self.dtype)

    def row_name(self, provider: str) -> str:
        return "/".join(filter(None, (self.name, self.dtype_name, self.rule, provider)))

    @property
    def scale(self) -> float:
        return float(self.shape.head_dim**-0.5)

    @property
    def window(self) -> Pair:
        """Cut to the grid."""
        return min(self.shape.window[0], self.shape.grid[0]), min(self.shape.window[1], self.shape.grid[1])

    @property
    def spans(self) -> tuple[tuple[PatchWindow, ...], tuple[PatchWindow, ...]]:
        """Patches and windows along both axes, no offset."""
        rows, columns = (windows(n, w, p) for n, w, p in zip(self.shape.grid, self.shape.window, self.shape.patch, strict=True))
        return rows, columns

    @property
    def views(self) -> list[Pair]:
        """Corners of MultiDiffusion's views: of native size, half of it apart, the last ones at the border (arXiv:2302.08113)."""
        ys, xs = (view_starts(n, w) for n, w in zip(self.shape.grid, self.window, strict=True))
        return [(y, x) for y in ys for x in xs]

    def flops(self, function: str) -> int:
        """Useful FLOPs of one call of `"window"`, `"full"` or `"views"` attention, with the text queries by the rule."""
        s = self.shape
        if function != "window":
            count, tokens = (1, s.tokens) if function == "full" else (len(self.views), s.text + prod(self.window))
            return count * 4 * s.batch * s.heads * s.head_dim * tokens**2
        return s.flops("image") + (s.flops("text", self.rule) if s.text else 0)

    def bytes(self, function: str) -> int:
        """Bytes that a call must move: q, k and v are read once and the result written once, of each view."""
        s = self.shape
        tokens = len(self.views) * (s.text + prod(self.window)) if function == "views" else s.tokens
        return self.dtype.itemsize * s.batch * s.head_dim * tokens * 2 * (s.heads + s.key_heads)

    def inputs(self, seed: int) -> Inputs:
        """Unit normal sequences and random angles, made on the device."""
        s, rng = self.shape, torch.Generator(self.device).manual_seed(seed)
        q, k, v = (
            torch.randn(s.batch, s.tokens, heads, s.head_dim, generator=rng, dtype=self.dtype, device=self.device)
            for heads in (s.heads, s.key_heads, s.key_heads)
        )
        if self.rule != "window":
            return Inputs(self, (q, k, v), None)
        angles = 2 * math.pi * torch.rand(*map(len, self.spans), s.head_dim // 2, generator=rng, device=self.device)
        return Inputs(self, (q, k, v), (angles.cos(), angles.sin()))


@dataclass(frozen=True)
class Inputs:
    """q, k and v as a joint model holds them, one sequence `[B, T + Y X, H or G, D]` each, text first."""

    task: Task
    sequences: Heads
    rope: tuple[Tensor, Tensor] | None

    @property
    def image(self) -> Heads:
        """Views of `[B, Y, X, H or G, D]`."""
        q, k, v = (x[:, self.task.shape.text :].unflatten(1, self.task.shape.grid) for x in self.sequences)
        return q, k, v

    @property
    def text(self) -> Heads:
        """Views of `[B, T, H or G, D]`."""
        q, k, v = (x[:, : self.task.shape.text] for x in self.sequences)
        return q, k, v


def tasks(names: list[str], dtypes: list[torch.dtype] | None, device: str) -> Iterator[Task]:
    """Every shape in every dtype, or its own, by every rule."""
    for name in names:
        shape = (SHAPES | CPU_SHAPES)[name]
        for dtype in dtypes or [shape.dtype]:
            for rule in shape.rules:
                yield Task(name, shape, dtype, device, rule)


def view_starts(length: int, native: int) -> list[int]:
    """Along one axis, with `native` at most `length`."""
    step = max(1, native // 2)
    return [min(i * step, length - native) for i in range(1 + math.ceil((length - native) / step))]
