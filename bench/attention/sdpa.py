"""Providers by torch's own attention: windows gathered or looped over, the whole grid, MultiDiffusion's views.

Legend: B batch, H heads, G key heads, T text tokens, D head dim, W x W window, P x P patch, n windows or views, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from bench.attention.gate import Outputs
from bench.attention.providers import Ready, image_and_text
from bench.attention.shapes import Heads, Inputs, Pair, Task
from bench.harness.timing import Call
from scalediff_kernels.neighborhood.reference import rotate_pairs


class Cut:
    """A canvas of queries in whole patches, with or without one to spare along each axis, and the windows of these patches."""

    def __init__(
        self, grid: Pair, window: Pair, patch: Pair, device: torch.device | str, *, offset: Pair = (0, 0), spare: bool = False
    ) -> None:  # fmt: skip
        self.grid, self.window, self.device, self._offset = grid, window, device, offset
        counts = [-(-n // p) + spare for n, p in zip(grid, patch, strict=True)]
        self.count = counts[0] * counts[1]
        axes = zip(counts, patch, offset, strict=True)
        self.centers = [torch.arange(n, device=device) * p + (p // 2 - o) for n, p, o in axes]  # tokens along each axis
        self._sizes = {"r": counts[0], "c": counts[1], "y": patch[0], "x": patch[1]}
        self._places = self._keys(0)[:, None, :, None], self._keys(1)[None, :, None, :]
        (y, x), after = offset, [n * p - o - length for n, p, o, length in zip(counts, patch, offset, grid, strict=True)]
        self._pad = (0, 0, 0, 0, x, after[1], y, after[0])

    def _keys(self, axis: int) -> Tensor:
        """`[n, W]`, the tokens of every patch's window along an axis."""
        length, window = self.grid[axis], min(self.window[axis], self.grid[axis])
        starts = (self.centers[axis] - self.window[axis] // 2).clamp(0, length - window)
        return starts[:, None] + torch.arange(window, device=self.device)

    def parts(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Patches `[B, n, P P, H, D]` and windows `[B, n, W W, H, D]` of `[B, Y, X, H, D]`."""
        padded = F.pad(q, self._pad) if any(self._pad) else q
        patches = rearrange(padded, "b (r y) (c x) h d -> b (r c) (y x) h d", **self._sizes)
        return [patches, *(x[:, *self._places].flatten(3, 4).flatten(1, 2) for x in (k, v))]

    def texts(self, texts: Sequence[Tensor], rope: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """q, k and v of text `[B, T, H, D]` for every window, `[B, n, T, H, D]`; rotated in fp32 or better, as the models do."""
        text_q, text_k, text_v = (x[:, None] for x in texts)
        if rope is not None:
            tables = (rope[0].flatten(0, 1)[None], rope[1].flatten(0, 1)[None])
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in texts[:2]]
            text_q, text_k = (rotate_pairs(x, tables, 0).to(texts[0].dtype).movedim(0, 1) for x in wide)
        return [x.expand(-1, self.count, -1, -1, -1) for x in (text_q, text_k, text_v)]

    def canvas(self, out: Tensor) -> Tensor:
        """`[B, Y, X, H, D]` of `[B, n, P P, H, D]`, without the padding."""
        (y, x), (rows, columns) = self._offset, self.grid
        return rearrange(out, "b (r c) (y x) h d -> b (r y) (c x) h d", **self._sizes)[:, y : y + rows, x : x + columns]


def gather(task: Task, *, beforehand: bool = False) -> Ready:
    """As the method's authors do it: queries padded to whole patches, windows copied out into one batch, one SDPA; no jitter.

    Under the rule "window" text is copied into every window, rotated and joined, and its results are averaged. `beforehand`: attention is
    timed alone, on windows gathered before: what a dense kernel reaches if copies cost nothing.
    """
    s, cut = task.shape, Cut(task.shape.grid, task.shape.window, task.shape.patch, task.device)

    def gathered(inputs: Inputs) -> list[Heads]:
        """Patches `[B n, H, P P, D]` and windows `[B n, G, W W, D]` with text before them; by "global" also the text's call."""
        parts = cut.parts(*inputs.image)
        if task.rule:
            first = 0 if task.rule == "window" else 1  # else text has a call of its own
            texts = cut.texts(inputs.text, inputs.rope)
            parts[first:] = [torch.cat(pair, 2) for pair in zip(texts[first:], parts[first:], strict=True)]
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in parts)
        return [(q, k, v), text_heads(inputs)] if task.rule == "global" else [(q, k, v)]

    def attend_all(calls: list[Heads]) -> list[Tensor]:
        return [attend(call, task) for call in calls]

    def assemble(results: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        out = results[0].transpose(1, 2).unflatten(0, (s.batch, -1))  # [B, n, S, H, D]
        text = results[1].transpose(1, 2) if task.rule == "global" else None
        if task.rule == "window":
            text, out = out[:, :, : s.text].mean(1), out[:, :, s.text :]
        return cut.canvas(out), text

    def lay(inputs: Inputs) -> list[Any]:
        return [tuple(x.contiguous() for x in call) for call in gathered(inputs)]

    if beforehand:
        return Ready(attend_all, lay, lambda results: image_and_text(assemble(results)), "windows gathered beforehand")
    return Ready(lambda inputs: assemble(attend_all(gathered(inputs))))


def padded_flops(task: Task) -> int:
    """Of gathered windows, with the patches' padding."""
    s = task.shape
    padding = prod(map(len, task.spans)) * prod(s.patch) - prod(s.grid)
    return task.flops("window") + 4 * s.batch * s.heads * s.head_dim * padding * (prod(task.window) + s.text)


def loop(task: Task) -> Ready:
    """One SDPA per window on slices, into one result: what is written by hand in ten lines. Text as in `gather`."""

    def run(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        (q, k, v), (text_q, text_k, text_v) = inputs.image, inputs.text
        out, texts = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for i, (y0, y1, key_y0, key_y1) in enumerate(task.spans[0]):
            for j, (x0, x1, key_x0, key_x1) in enumerate(task.spans[1]):
                parts = [q[:, y0:y1, x0:x1], k[:, key_y0:key_y1, key_x0:key_x1], v[:, key_y0:key_y1, key_x0:key_x1]]
                parts = [x.flatten(1, 2) for x in parts]
                if task.rule:
                    b_q, b_k = (rotate_pairs(x.float(), inputs.rope, i, j).to(x.dtype) for x in (text_q, text_k))
                    first = 0 if task.rule == "window" else 1
                    parts[first:] = [torch.cat(pair, 1) for pair in zip((b_q, b_k, text_v)[first:], parts[first:], strict=True)]
                b_out = attend([x.transpose(1, 2) for x in parts], task).transpose(1, 2)
                tokens = (y1 - y0) * (x1 - x0)
                texts.append(b_out[:, :-tokens].float())
                out[:, y0:y1, x0:x1] = b_out[:, -tokens:].unflatten(1, (y1 - y0, x1 - x0))
        if task.rule == "global":
            return out, attend(text_heads(inputs), task).transpose(1, 2)
        return out, torch.stack(texts).mean(0).to(out.dtype) if task.rule else None

    return Ready(run)


def full(task: Task) -> Ready:
    """Attention of every token to every token, as the unpatched model has it."""
    text = task.shape.text

    def unlay(out: Tensor) -> Outputs:
        return Outputs(out.transpose(1, 2)[:, text:], out.transpose(1, 2)[:, :text] if text else None)

    return Ready(partial(attend, task=task), lambda inputs: [x.transpose(1, 2) for x in inputs.sequences], unlay)


def multidiffusion(task: Task) -> Ready:
    """Full attention in all overlapping views of native size, half a view apart, as one batch cut beforehand, with text in each."""
    height, width = task.window

    def lay(inputs: Inputs) -> list[Tensor]:
        """Each `[B n, H or G, T + W W, D]`."""
        parts = []
        for image, text in zip(inputs.image, inputs.text, strict=True):
            views = [torch.cat([text, image[:, y : y + height, x : x + width].flatten(1, 2)], 1) for y, x in task.views]
            parts.append(torch.stack(views, 1).flatten(0, 1).transpose(1, 2))
        return parts

    def unlay(out: Tensor) -> Outputs:
        return Outputs(out.transpose(1, 2).unflatten(0, (task.shape.batch, -1))[:, :, task.shape.text :].flatten(1, 2), None)

    return Ready(partial(attend, task=task), lay, unlay)


def one_window(task: Task) -> tuple[Call, int]:
    """Attention on one window with its text, as often as there are windows, and its FLOPs: nothing is gathered, most of it in cache."""
    s, count = task.shape, prod(map(len, task.spans))
    queries, keys = prod(s.patch) + (s.text if task.rule == "window" else 0), prod(task.window) + s.text
    rng = torch.Generator(task.device).manual_seed(0)
    q, k, v = (
        torch.randn(s.batch, heads, tokens, s.head_dim, generator=rng, dtype=task.dtype, device=task.device)
        for heads, tokens in ((s.heads, queries), (s.key_heads, keys), (s.key_heads, keys))
    )
    return lambda: [attend((q, k, v), task) for _ in range(count)], 4 * count * s.batch * s.heads * s.head_dim * queries * keys


def attend(heads: Any, task: Task) -> Tensor:
    """torch's attention of q, k and v, `[B, H, S, D]`."""
    q, k, v = heads
    return F.scaled_dot_product_attention(q, k, v, scale=task.scale, enable_gqa=q.shape[1] != k.shape[1])


def text_heads(inputs: Inputs) -> Heads:
    """Of the text queries by the rule "global", which attend to all keys."""
    q, k, v = inputs.sequences
    return q[:, : inputs.task.shape.text].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
