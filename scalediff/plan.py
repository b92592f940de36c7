"""What one forward pass does with its attention calls: known once per picture size, read by every call.

Legend: B batch, S tokens of a sequence, H heads, G key heads, D head dim, Y x X token grid, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.grid import Grid, Layout, Sequence, Span, offset_of, patch_of, window_of
from scalediff.rotation import TextRotation
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.api import Impl, TextQueries


@dataclass(frozen=True)
class Options:
    """What `patch_model` was asked for, where it matters to a call."""

    impl: Impl = "auto"
    text_queries: TextQueries = "window"
    text_rope: bool = True


class Call:
    """One kind of attention call: how its sequence lies, and its windows."""

    def __init__(
        self, sequence: Sequence, native: Grid, fraction: tuple[float, float], rotation: TextRotation | None, like: Tensor, options: Options
    ) -> None:
        self.sequence, self.grid, self.area, self.lengths = sequence, sequence.grid, sequence.area, sequence.lengths
        self.window, self.patch = window_of(native, sequence.level), patch_of(native, sequence.level)
        self.offset = offset_of(native, sequence.level, fraction)
        self.text_queries = options.text_queries if sequence.queries == "all" else None
        self.impl, self.real = options.impl, sequence.real
        self.padded = any(count < sequence.text for count in sequence.real)
        self.text_rope: tuple[Tensor, Tensor] | None = None
        if rotation is not None and options.text_rope and sequence.text != 0:
            cos, sin = rotation.tables(self.grid, native, self.window, self.patch, self.offset)
            kind = torch.promote_types(like.dtype, torch.float32)
            self.text_rope = cos.to(like.device, kind), sin.to(like.device, kind)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """`[B, S, H, D]` over keys and values `[B, S, G, D]`; padding comes out as zeros."""
        if k.shape[1] == self.area:
            return self._image(q, k, v, scale)
        spans = self.sequence.spans(q.shape[0])
        if len(spans) == 1:
            return self._joint(q, k, v, scale, spans[0])
        return torch.cat([self._joint(q[s.first : s.last], k[s.first : s.last], v[s.first : s.last], scale, s) for s in spans])

    def _image(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (x.unflatten(1, self.grid) for x in (q, k, v))
        how = {"window": self.window, "patch": self.patch, "offset": self.offset}
        return neighborhood_patch_attention(q, k, v, **how, scale=scale, impl=self.impl).flatten(1, 2)

    def _joint(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, span: Span) -> Tensor:
        text, image = slice(span.text_start, span.text_stop), slice(span.image, span.image + self.area)
        if span.text_start == span.text_stop:
            out = self._image(q if q.shape[1] == self.area else q[:, image], k[:, image], v[:, image], scale)
            return F.pad(out, (0, 0, 0, 0, span.image, q.shape[1] - image.stop)) if q.shape[1] > self.area else out
        image_k, image_v = (x[:, image].unflatten(1, self.grid) for x in (k, v))
        image_q, text_q = (q[:, image], q[:, text]) if self.text_queries else (q, _like_queries(k[:, text], q))
        image_out, text_out = joint_neighborhood_patch_attention(
            image_q.unflatten(1, self.grid), image_k, image_v, text_q, k[:, text], v[:, text],
            window=self.window, patch=self.patch, offset=self.offset, scale=scale, text_rope=self.text_rope,
            text_queries=self.text_queries, impl=self.impl,
        )  # fmt: skip
        image_out = image_out.flatten(1, 2)
        if text_out is None:
            return image_out
        parts = [text_out, image_out] if self.sequence.side == "prefix" else [image_out, text_out]
        between = span.image - span.text_stop if self.sequence.side == "prefix" else 0
        if between:
            parts.insert(1, q.new_zeros(()).to(image_out.dtype).expand(q.shape[0], between, *q.shape[2:]))
        out = torch.cat(parts, dim=1)
        return F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1])) if q.shape[1] > out.shape[1] else out


class Plan:
    """The calls of one forward pass, and how to tell them from others.

    Args:
        layout: How its tokens lie.
        native: The token grid that the model was trained on: the window.
        fraction: How far the patch grid is moved, in patches.
        rotation: How the model rotates, where its text is to be turned for each window.
        like: A tensor of the model's input: its device and dtype.
        options: What `patch_model` was asked for.
    """

    def __init__(
        self, layout: Layout, native: Grid, fraction: tuple[float, float], rotation: TextRotation | None, like: Tensor, options: Options
    ) -> None:
        self.grid, self.masked, self.others = layout.grid, layout.masked, layout.others
        if rotation is not None and layout.weighted:
            rotation = replace(rotation, dim=rotation.channels + _EXTRA)
        self.calls = tuple(Call(sequence, native, fraction, rotation, like, options) for sequence in layout.sequences)
        self.grids = " or ".join(dict.fromkeys(f"{y} x {x}" for y, x in (call.grid for call in self.calls)))

    def call(self, queries: int, keys: int) -> Call | None:
        """The call of these lengths, if it can be nothing else."""
        if keys in self.others:
            return None
        for call in self.calls:
            if (queries, keys) == call.lengths:
                return call
        return None

    def unexpected(self, queries: int, keys: int) -> str:
        """What is wrong with a call that `call` does not know; empty for text alone and cross-attention."""
        if keys in self.others:
            same = any((queries, keys) == call.lengths for call in self.calls)
            return "image and text have as many tokens, and a call may be either" + got(keys) if same else ""
        wrong = queries == keys or (keys - queries in self.others and any(queries == call.area for call in self.calls))
        return f"q, k and v must have the tokens of {self.grids}" + got(queries, keys) if wrong else ""


_EXTRA = 8  # the kernel takes heads in multiples of it


def with_weights(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, S, H, D + 8]`, for which attention without a mask adds weights_i weights_j, `[B, S]`, to the score of query i and key j.

    The sum is one more product of channels: weight / scale in the queries, weight in the keys, nothing in the values.
    """

    def longer(x: Tensor, channel: Tensor | None) -> Tensor:
        x = F.pad(x, (0, _EXTRA))
        if channel is not None:
            x[..., -_EXTRA] = channel[:, :, None].to(x.dtype)
        return x

    return longer(q, weights / scale), longer(k, weights), longer(v, None)


def got(*values: Tensor | int) -> str:
    """What a message ends with: shapes and dtypes, or numbers. Nothing inside a compiled graph, where shapes may be symbols."""
    if torch.compiler.is_compiling():
        return ""
    return ", got " + ", ".join(f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"{x}" for x in values)


def _like_queries(text_k: Tensor, q: Tensor) -> Tensor:
    """A stand-in `[B, T, H, D]` for text queries that nobody reads."""
    return text_k if text_k.shape[2] == q.shape[2] else text_k.repeat_interleave(q.shape[2] // text_k.shape[2], dim=2)
