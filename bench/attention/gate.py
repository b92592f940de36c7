"""What a provider must have computed before it is timed: attention in fp64, at that very shape, of a sample of its queries.

Every patch (of more than 256 a sample of them) is looked at in 32 of its queries, its corners among them, and the first and the last patch
in all of theirs; full attention in 64 queries; 16 views in 32 queries each; text in 16 tokens. The whole result must be finite.

Legend: B batch, H heads, G key heads, n sampled queries, K keys, T text tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from bench.attention.shapes import Inputs
from scalediff_kernels.neighborhood.reference import rotate_pairs
from scalediff_kernels.testing import assert_within_budget

PATCHES, QUERIES, WHOLE, VIEWS, TEXT = 256, 32, 64, 16, 16
CHUNK = 2**29  # bytes of fp64 keys at a time


class GateFailed(Exception):
    """A result is not what it should be, in a sentence."""


class Outputs(NamedTuple):
    """Of any provider: image `[B, tokens, H, D]`, of views all tokens of one after those of the other; text `[B, T, H, D]` or None."""

    image: Tensor
    text: Tensor | None


class Sample(NamedTuple):
    """Results that must be met at `tokens`: in fp64, and of plain torch in the task's dtype."""

    tokens: Tensor
    exact: Tensor
    eager: Tensor


@dataclass(frozen=True)
class Truth:
    """What `function` of some inputs is."""

    image: Sample
    text: Sample | None

    def check(self, outputs: Outputs) -> tuple[float, float]:
        """The largest error and that of plain torch in the same dtype.

        Raises:
            GateFailed: an error exceeds the budget, a value is not finite, or the text is missing.
        """
        found = []
        for name, sample, result in (("image", self.image, outputs.image), ("text", self.text, outputs.text)):
            if sample is None:
                continue
            if result is None:
                raise GateFailed(f"{name} is missing from the result")
            if not result.isfinite().all():
                raise GateFailed(f"{name}: the result has NaN or infinite values")
            actual = result[:, sample.tokens]
            try:
                assert_within_budget(actual, sample.eager, sample.exact)
            except AssertionError as failed:
                raise GateFailed(f"{name}: {failed}") from None
            found.append([(x.double() - sample.exact).abs().max().item() for x in (actual, sample.eager)])
        return max(error for error, _ in found), max(error for _, error in found)


def truth(inputs: Inputs, function: str) -> Truth:
    """Of `"window"`, `"full"` or `"views"` attention."""
    if function == "views":
        return _views(inputs)
    task, (q, k, v), text = inputs.task, inputs.sequences, None
    if task.shape.text and (function == "full" or task.rule == "global"):
        tokens = _numbers(task.shape.text, TEXT, inputs)
        text = Sample(tokens, *attended(q[:, tokens], k, v, task.scale))
    if function == "window":
        return _windows(inputs, text)
    index = _numbers(prod(task.shape.grid), WHOLE, inputs)
    return Truth(Sample(index, *attended(q[:, task.shape.text + index], k, v, task.scale)), text)


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[B, n, H, D]` in fp64, and in the tensors' dtype with a rounding at every operation; as many heads at a time as fit."""
    exact, eager = torch.empty_like(q, dtype=torch.float64), torch.empty_like(q)
    repeat = q.shape[2] // k.shape[2]
    step = max(1, CHUNK // (8 * k[:, :, 0].numel()))
    for g in range(0, k.shape[2], step):
        heads = slice(g * repeat, (g + step) * repeat)
        b_q, b_k, b_v = q[:, :, heads], *(x[:, :, g : g + step].repeat_interleave(repeat, dim=2) for x in (k, v))
        exact[:, :, heads] = _softmax_attention(b_q.double(), b_k.double(), b_v.double(), scale)
        eager[:, :, heads] = _softmax_attention(b_q, b_k, b_v, scale)
    return exact, eager


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(scale).softmax(-1)
    out: Tensor = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out


def _windows(inputs: Inputs, text: Sample | None) -> Truth:
    """Patch by patch; with the rule "window" also the text of every window, averaged in fp32 or better."""
    task = inputs.task
    (q, k, v), (text_q, text_k, text_v) = inputs.image, inputs.text
    rows, columns = task.spans
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    looked_at = {pairs[n] for n in _numbers(len(pairs), PATCHES, inputs).tolist()}
    averaged = task.rule == "window"
    tokens = _numbers(task.shape.text, TEXT, inputs) if averaged else None
    places: list[Tensor] = []
    images: list[tuple[Tensor, Tensor]] = []
    sums: list[Tensor] = []
    for i, j in pairs if averaged else sorted(looked_at):
        (y0, y1, key_y0, key_y1), (x0, x1, key_x0, key_x1) = rows[i], columns[j]
        keys, values = (x[:, key_y0:key_y1, key_x0:key_x1].flatten(1, 2) for x in (k, v))
        exact_k, exact_v = torch.cat([_turned(text_k, inputs, i, j), keys.double()], 1), torch.cat([text_v, values], 1)
        if tokens is not None:
            both = _twice(_turned(text_q[:, tokens], inputs, i, j), exact_k, exact_v, task.scale)
            sums = [a + b for a, b in zip(sums, both, strict=True)] if sums else list(both)
        if (i, j) in looked_at:
            area = torch.arange(y0, y1)[:, None] * task.shape.grid[1] + torch.arange(x0, x1)
            whole = (i, j) in (pairs[0], pairs[-1])
            place = (area.flatten() if whole else _corners_and_more(area, inputs)).to(q.device)
            places.append(place)
            images.append(_twice(q.flatten(1, 2)[:, place].double(), exact_k, exact_v, task.scale))
    if tokens is not None:
        text = Sample(tokens, sums[0] / len(pairs), (sums[1] / len(pairs)).to(task.dtype))
    exact, eager = (torch.cat(part, 1) for part in zip(*images, strict=True))
    return Truth(Sample(torch.cat(places), exact, eager.to(task.dtype)), text)


def _twice(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """fp64 from fp64 queries and keys; in v's dtype from the same, rounded, and held in fp32."""
    repeat = q.shape[2] // k.shape[2]
    k_all, v_all = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    eager = _softmax_attention(q.to(v.dtype), k_all.to(v.dtype), v_all, scale)
    return _softmax_attention(q, k_all, v_all.double(), scale), eager.float()


def _turned(x: Tensor, inputs: Inputs, i: int, j: int) -> Tensor:
    """Text in fp64, rotated for a window."""
    rope = None if inputs.rope is None else (inputs.rope[0].double(), inputs.rope[1].double())
    return rotate_pairs(x.double(), rope, i, j)


def _views(inputs: Inputs) -> Truth:
    """Views alone; the text of a view stands with it and is not looked at apart."""
    task = inputs.task
    (q, k, v), (_, text_k, text_v) = inputs.image, inputs.text
    (height, width), area = task.window, task.window[0] * task.window[1]
    places, results = [], []
    for n in _numbers(len(task.views), VIEWS, inputs).tolist():
        y, x = task.views[n]
        view_q, view_k, view_v = (t[:, y : y + height, x : x + width].flatten(1, 2) for t in (q, k, v))
        place = _numbers(area, QUERIES, inputs, seed=n)
        places.append(n * area + place)
        keys, values = torch.cat([text_k, view_k], 1), torch.cat([text_v, view_v], 1)
        results.append(attended(view_q[:, place], keys, values, task.scale))
    exact, eager = (torch.cat(part, 1) for part in zip(*results, strict=True))
    return Truth(Sample(torch.cat(places), exact, eager), None)


def _numbers(total: int, most: int, inputs: Inputs, seed: int = 0) -> Tensor:
    """At most so many of `range(total)`, first and last among them, the same in every run."""
    if total <= most:
        picked = torch.arange(total)
    else:
        drawn = torch.randperm(total - 2, generator=torch.Generator().manual_seed(total + seed))[: most - 2] + 1
        picked = torch.cat([torch.tensor([0, total - 1]), drawn]).sort().values
    return picked.to(inputs.sequences[0].device)


def _corners_and_more(area: Tensor, inputs: Inputs) -> Tensor:
    """Of a patch `[y, x]` of token numbers: its corners and what is drawn."""
    corners = area[[0, 0, -1, -1], [0, -1, 0, -1]]
    drawn = area.flatten()[_numbers(area.numel(), QUERIES, inputs, seed=int(area[0, 0])).cpu()]
    both: Tensor = torch.cat([corners, drawn]).unique()
    return both
