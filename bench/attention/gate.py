"""What a provider must compute before it is timed: attention in fp64, at that very shape, for a sample of its queries.

Of every patch (at most 256 of them) 32 queries are checked with its corners, and all of the first and the last patch; of full attention
64 queries; of 16 views 32 queries each; of text 16 tokens. The whole result must be finite.

Legend: B batch, H heads, G key heads, n sampled queries, K keys, T text tokens, D head dim.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from bench.attention.shapes import Inputs
from bench.harness.gated import GateFailed
from scalediff_kernels.neighborhood.reference import rotate_pairs
from scalediff_kernels.testing import assert_within_budget

PATCHES, QUERIES, WHOLE, VIEWS, TEXT = 256, 32, 64, 16, 16
CHUNK = 2**29  # bytes of fp64 keys at a time


class Outputs(NamedTuple):
    image: Tensor  # [B, tokens, H, D], or the tokens of one view after the other
    text: Tensor | None  # [B, T, H, D]


class Sample(NamedTuple):
    """Expected results at `tokens`: in fp64, and of plain torch in the task's dtype."""

    tokens: Tensor
    exact: Tensor
    eager: Tensor

    def check(self, name: str, result: Tensor | None) -> tuple[float, float]:
        """The largest error, and that of plain torch in the same dtype."""
        if result is None:
            raise GateFailed(f"{name} is missing from the result")
        if not result.isfinite().all():
            raise GateFailed(f"{name}: the result has NaN or infinite values")
        actual = result[:, self.tokens]
        try:
            assert_within_budget(actual, self.eager, self.exact)
        except AssertionError as failed:
            raise GateFailed(f"{name}: {failed}") from None
        error, eager = ((x.double() - self.exact).abs().max().item() for x in (actual, self.eager))
        return error, eager


class Truth(NamedTuple):
    """What one function of some inputs is."""

    image: Sample
    text: Sample | None

    def check(self, outputs: Outputs) -> tuple[float, float]:
        """The largest error, and that of plain torch; raises GateFailed: too large, not finite, or the text is missing."""
        errors = [sample.check(name, result) for name, sample, result in zip(self._fields, self, outputs, strict=True) if sample]
        return max(error for error, _ in errors), max(eager for _, eager in errors)


def truth(inputs: Inputs, function: str, *, whole: bool = False) -> Truth:
    """Of `"window"`, `"full"` or `"views"` attention. `whole`: of windows every query, for small grids."""
    task, (q, k, v), text = inputs.task, inputs.sequences, None
    if function == "views":
        return Truth(_views(inputs), None)
    if task.shape.text and (function == "full" or task.rule == "global"):
        tokens = _draw(task.shape.text, TEXT, inputs)
        text = Sample(tokens, *_attend(q[:, tokens], k, v, inputs))
    if function == "window":
        image, averaged = _windows(inputs, whole=whole)
        return Truth(image, averaged or text)
    tokens = _draw(prod(task.shape.grid), WHOLE, inputs)
    return Truth(Sample(tokens, *_attend(q[:, task.shape.text + tokens], k, v, inputs)), text)


def _attend(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`[B, n, H, D]` in fp64, and in the task's dtype with a rounding at every operation; as many heads at a time as fit."""
    exact, eager = (torch.empty_like(q, dtype=dtype) for dtype in (torch.float64, inputs.task.dtype))
    repeat = q.shape[2] // k.shape[2]
    step = max(1, CHUNK // (8 * k[:, :, 0].numel()))
    for g in range(0, k.shape[2], step):
        heads = slice(g * repeat, (g + step) * repeat)
        parts = q[:, :, heads], *(x[:, :, g : g + step].repeat_interleave(repeat, dim=2) for x in (k, v))
        for out in (exact, eager):
            b_q, b_k, b_v = (x.to(out.dtype) for x in parts)
            weights = torch.einsum("bqhd,bkhd->bhqk", b_q, b_k).mul(inputs.task.scale).softmax(-1)
            out[:, :, heads] = torch.einsum("bhqk,bkhd->bqhd", weights, b_v)
    return exact, eager


def _windows(inputs: Inputs, *, whole: bool) -> tuple[Sample, Sample | None]:
    """Image patch by patch, and by the rule "window" the text of every window, averaged in fp32 or better."""
    task, (q, k, v), (text_q, text_k, text_v) = inputs.task, inputs.image, inputs.text
    rope = None if inputs.rope is None else (inputs.rope[0].double(), inputs.rope[1].double())
    pairs = [(i, j) for i in range(len(task.spans[0])) for j in range(len(task.spans[1]))]
    checked = set(_draw(len(pairs), len(pairs) if whole else PATCHES, inputs).tolist())
    tokens = _draw(task.shape.text, TEXT, inputs) if task.rule == "window" else None
    grid = torch.arange(prod(task.shape.grid), device=q.device).view(task.shape.grid)
    places, images, texts = [], [], []
    for n, (i, j) in enumerate(pairs):
        if n in checked or tokens is not None:
            (y0, y1, key_y0, key_y1), (x0, x1, key_x0, key_x1) = task.spans[0][i], task.spans[1][j]
            keys, values = (x[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2) for x in (k, v))
            keys, values = torch.cat([rotate_pairs(text_k.double(), rope, i, j), keys.double()], 1), torch.cat([text_v, values], 1)
        if tokens is not None:
            texts.append(_attend(rotate_pairs(text_q[:, tokens].double(), rope, i, j), keys, values, inputs))
        if n in checked:
            area = grid[y0:y1, x0:x1]
            if not whole and n not in (0, len(pairs) - 1):  # corners and a sample
                drawn = area.flatten()[_draw(area.numel(), QUERIES, inputs, seed=int(area[0, 0]))]
                area = torch.cat([area[[0, 0, -1, -1], [0, -1, 0, -1]], drawn]).unique()
            places.append(area.flatten())
            images.append(_attend(q.flatten(1, 2)[:, places[-1]], keys, values, inputs))
    image = Sample(torch.cat(places), *(torch.cat(parts, 1) for parts in zip(*images, strict=True)))
    if tokens is None:
        return image, None
    exact, eager = (torch.stack(parts) for parts in zip(*texts, strict=True))
    return image, Sample(tokens, exact.mean(0), eager.float().mean(0).to(task.dtype))


def _views(inputs: Inputs) -> Sample:
    """The image tokens of views; their text is attended to and not checked."""
    task, (height, width) = inputs.task, inputs.task.window
    places, results = [], []
    for n in _draw(len(task.views), VIEWS, inputs).tolist():
        y, x = task.views[n]
        q, k, v = (t[:, y : y + height, x : x + width].flatten(1, 2) for t in inputs.image)
        place = _draw(height * width, QUERIES, inputs, seed=n)
        places.append(n * height * width + place)
        results.append(_attend(q[:, place], torch.cat([inputs.text[1], k], 1), torch.cat([inputs.text[2], v], 1), inputs))
    return Sample(torch.cat(places), *(torch.cat(parts, 1) for parts in zip(*results, strict=True)))


def _draw(total: int, most: int, inputs: Inputs, seed: int = 0) -> Tensor:
    """At most so many of `range(total)`, first and last among them, the same in every run."""
    drawn = torch.arange(total)
    if total > most:
        inner = torch.randperm(total - 2, generator=torch.Generator().manual_seed(total + seed))[: most - 2] + 1
        drawn = torch.cat([torch.tensor([0, total - 1]), inner]).sort().values
    return drawn.to(inputs.sequences[0].device)
