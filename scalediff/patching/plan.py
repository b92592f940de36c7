"""What one forward pass does with its attention calls: known once per picture size, read by every call.

Legend: B batch, S tokens of a sequence, H heads, G key heads, D head dim, Y x X token grid, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.families.grid import Grid, Layout, Sequence, Span, offset_of, patch_of, window_of
from scalediff.families.rotation import TextRotation
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
        self.sequence, self.grid = sequence, sequence.grid
        self.window, self.patch = window_of(native, sequence.level), patch_of(native, sequence.level)
        self.offset = offset_of(native, sequence.level, fraction)
        self.impl, self.text_queries = options.impl, options.text_queries if sequence.queries == "all" else None
        self.real, self.padded = sequence.real, any(count < sequence.text for count in sequence.real)
        self.text_rope: tuple[Tensor, Tensor] | None = None
        if rotation is not None and options.text_rope and sequence.text != 0:
            cos, sin = rotation.tables(self.grid, native, self.window, self.patch, self.offset)
            kind = torch.promote_types(like.dtype, torch.float32)
            self.text_rope = cos.to(like.device, kind), sin.to(like.device, kind)
        spans = sequence.spans(len(sequence.real) or 1)
        self._numbers = _Numbers(self.grid, self.window, self.patch, self.offset, sequence.lengths, spans)
        self._written = self._numbers.write()

    @property
    def numbers(self) -> _Numbers:
        """All its numbers. torch.compile would take them for symbols once a second picture size comes; from a text they are constants."""
        return _Numbers.read(self._written) if torch.compiler.is_compiling() else self._numbers

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """`[B, S, H, D]` over keys and values `[B, S, G, D]`; padding comes out as zeros."""
        numbers = self.numbers
        if numbers.lengths[1] == numbers.area:
            return self._image(numbers, q, k, v, scale)
        if len(numbers.spans) == 1:
            return self._joint(numbers, numbers.spans[0], q, k, v, scale)
        parts = [self._joint(numbers, s, q[s.first : s.last], k[s.first : s.last], v[s.first : s.last], scale) for s in numbers.spans]
        return torch.cat(parts)

    def _image(self, numbers: _Numbers, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (_part(x, 0, numbers.area).unflatten(1, numbers.grid) for x in (q, k, v))
        how = {"window": numbers.window, "patch": numbers.patch, "offset": numbers.offset}
        return neighborhood_patch_attention(q, k, v, **how, scale=scale, impl=self.impl).flatten(1, 2)

    def _joint(self, numbers: _Numbers, span: Span, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        queries, area = numbers.lengths[0], numbers.area
        tokens = span.text_stop - span.text_start
        image_q = _part(q, span.image if queries > area else 0, area)
        image_k, image_v = (_part(x, span.image, area) for x in (k, v))
        if tokens == 0:
            out = self._image(numbers, image_q, image_k, image_v, scale)
            return F.pad(out, (0, 0, 0, 0, span.image, queries - area - span.image)) if queries > area else out
        text_k, text_v = (_part(x, span.text_start, tokens) for x in (k, v))
        text_q = _part(q, span.text_start, tokens) if self.text_queries else _like_queries(text_k, q)
        image_q, image_k, image_v = (x.unflatten(1, numbers.grid) for x in (image_q, image_k, image_v))
        text_rope = None if self.text_rope is None else _fitting(self.text_rope, q)
        image_out, text_out = joint_neighborhood_patch_attention(
            image_q, image_k, image_v, text_q, text_k, text_v,
            window=numbers.window, patch=numbers.patch, offset=numbers.offset, scale=scale, text_rope=text_rope,
            text_queries=self.text_queries, impl=self.impl,
        )  # fmt: skip
        image_out = image_out.flatten(1, 2)
        if text_out is None:
            return image_out
        parts, between = [image_out, text_out], 0
        if self.sequence.side == "prefix":
            parts, between = [text_out, image_out], span.image - span.text_stop
        if between:
            parts.insert(1, image_out.new_zeros(()).expand(q.shape[0], between, *q.shape[2:]))
        out = torch.cat(parts, dim=1)
        length = between + tokens + area
        return F.pad(out, (0, 0, 0, 0, 0, queries - length)) if queries > length else out


class _Numbers(NamedTuple):
    """What a call must know to cut its tensors."""

    grid: Grid
    window: Grid
    patch: Grid
    offset: Grid
    lengths: tuple[int, int]
    spans: tuple[Span, ...]

    @property
    def area(self) -> int:
        return self.grid[0] * self.grid[1]

    def write(self) -> str:
        """As a text: five pairs, and the spans."""
        return " ".join(str(n) for pair in (*self[:5], *self.spans) for n in pair)

    @classmethod
    def read(cls, text: str) -> _Numbers:
        """The inverse of `write`."""
        n = [int(number) for number in text.split()]
        pairs = [(n[i], n[i + 1]) for i in range(0, 10, 2)]
        spans = tuple(Span(n[i], n[i + 1], n[i + 2], n[i + 3], n[i + 4]) for i in range(10, len(n), 5))
        return cls(pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], spans)


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
        self.calls = tuple(Call(sequence, native, fraction, rotation, like, options) for sequence in layout.sequences)
        self.grids = " or ".join(dict.fromkeys(f"{y} x {x}" for y, x in (call.grid for call in self.calls)))

    def call(self, queries: int, keys: int) -> Call | None:
        """The call of these lengths, if it can be nothing else."""
        if keys in self.others:
            return None
        for call in self.calls:
            if (queries, keys) == call.numbers.lengths:
                return call
        return None

    def unexpected(self, queries: int, keys: int) -> str:
        """What is wrong with a call that `call` does not know; empty for text alone and cross-attention."""
        if keys in self.others:
            same = any((queries, keys) == call.numbers.lengths for call in self.calls)
            return "image and text have as many tokens, and a call may be either" + got(keys) if same else ""
        image = any(queries == call.numbers.area for call in self.calls)
        joint = any(call.sequence.text for call in self.calls)
        wrong = queries == keys or (image and (keys - queries in self.others or (joint and keys > queries)))
        return f"q, k and v must have the tokens of {self.grids}" + got(queries, keys) if wrong else ""


_EXTRA = 8  # the kernel takes heads in multiples of it


def with_weights(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, S, H, D + 8]`, for which attention without a mask adds a_i b_j to the score of query i and key j; a, b `[B, S]`.

    The sum is one more product of channels: a / scale in the queries, b in the keys, nothing in the values.
    """

    def longer(x: Tensor, channel: Tensor | None) -> Tensor:
        x = F.pad(x, (0, _EXTRA))
        if channel is not None:
            x[..., -_EXTRA] = channel[:, :, None].to(x.device, x.dtype)
        return x

    return longer(q, of_queries / scale), longer(k, of_keys), longer(v, None)


def got(*values: Tensor | int) -> str:
    """What a message ends with: shapes and dtypes, or numbers. Nothing inside a compiled graph, where shapes may be symbols."""
    if torch.compiler.is_compiling():
        return ""
    return ", got " + ", ".join(f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"{x}" for x in values)


def _fitting(rope: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """The tables on the device of a call, which an offloading hook may have chosen; further channels are not turned."""
    cos, sin = (table.to(q.device) for table in rope)
    more = q.shape[-1] // 2 - cos.shape[-1]
    return (F.pad(cos, (0, more), value=1.0), F.pad(sin, (0, more))) if more > 0 else (cos, sin)


def _part(x: Tensor, start: int, length: int) -> Tensor:
    """Tokens `[start, start + length)` of `[B, S, H, D]`. Of a slice torch.compile would keep symbols in the shape."""
    return x.narrow(1, start, length)


def _like_queries(text_k: Tensor, q: Tensor) -> Tensor:
    """A stand-in `[B, T, H, D]` for text queries that nobody reads."""
    return text_k if text_k.shape[2] == q.shape[2] else text_k.repeat_interleave(q.shape[2] // text_k.shape[2], dim=2)
