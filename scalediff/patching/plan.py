"""How the attention calls of one forward pass are computed: one plan per picture size.

Legend: B batch, S tokens of a sequence, H heads, G key heads, D head dim, Y x X token grid, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.families.grid import Grid, Layout, Sequence, Span, offset_of, patch_of, window_of
from scalediff.families.rotation import TextRotation
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.api import Impl, TextQueries


@dataclass(frozen=True)
class Options:
    """The options of `patch_model` that attention calls need."""

    impl: Impl = "auto"
    text_queries: TextQueries = "window"
    text_rope: bool = True


class Call:
    """One kind of attention call: the layout of its sequence, and its windows."""

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
        self._sizes = _CallSizes(self.grid, self.window, self.patch, self.offset, sequence.lengths, spans)
        self._encoded = self._sizes.encode()

    @property
    def sizes(self) -> _CallSizes:
        """The sizes of the call.

        Under torch.compile they are parsed from a string, which makes them constants: integers would become symbolic as soon as a second
        picture size is used.
        """
        return _CallSizes.decode(self._encoded) if torch.compiler.is_compiling() else self._sizes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of queries `[B, S, H, D]` to keys and values `[B, S, G, D]`; the output is zero at padding."""
        sizes = self.sizes
        if sizes.lengths[1] == sizes.area:
            return self._image(sizes, q, k, v, scale)
        if len(sizes.spans) == 1:
            return self._joint(sizes, sizes.spans[0], q, k, v, scale)
        parts = [self._joint(sizes, s, q[s.first : s.last], k[s.first : s.last], v[s.first : s.last], scale) for s in sizes.spans]
        return torch.cat(parts)

    def _image(self, sizes: _CallSizes, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (_tokens(x, 0, sizes.area).unflatten(1, sizes.grid) for x in (q, k, v))
        geometry: dict[str, Any] = {"window": sizes.window, "patch": sizes.patch, "offset": sizes.offset}
        out: Tensor = neighborhood_patch_attention(q, k, v, **geometry, scale=scale, impl=self.impl)
        return out.flatten(1, 2)

    def _joint(self, sizes: _CallSizes, span: Span, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        queries, area = sizes.lengths[0], sizes.area
        tokens = span.text_stop - span.text_start
        image_q = _tokens(q, span.image if queries > area else 0, area)
        image_k, image_v = (_tokens(x, span.image, area) for x in (k, v))
        if tokens == 0:
            out = self._image(sizes, image_q, image_k, image_v, scale)
            return F.pad(out, (0, 0, 0, 0, span.image, queries - area - span.image)) if queries > area else out
        text_k, text_v = (_tokens(x, span.text_start, tokens) for x in (k, v))
        text_q = _tokens(q, span.text_start, tokens) if self.text_queries else _placeholder_queries(text_k, q)
        image_q, image_k, image_v = (x.unflatten(1, sizes.grid) for x in (image_q, image_k, image_v))
        text_rope = None if self.text_rope is None else _rope_for(self.text_rope, q)
        image_out, text_out = joint_neighborhood_patch_attention(
            image_q, image_k, image_v, text_q, text_k, text_v,
            window=sizes.window, patch=sizes.patch, offset=sizes.offset, scale=scale, text_rope=text_rope,
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


class _CallSizes(NamedTuple):
    """The sizes by which a call slices its tensors."""

    grid: Grid
    window: Grid
    patch: Grid
    offset: Grid
    lengths: tuple[int, int]
    spans: tuple[Span, ...]

    @property
    def area(self) -> int:
        return self.grid[0] * self.grid[1]

    def encode(self) -> str:
        """Encode as a string: five pairs, then the spans."""
        return " ".join(str(n) for pair in (*self[:5], *self.spans) for n in pair)

    @classmethod
    def decode(cls, text: str) -> _CallSizes:
        """The inverse of `encode`."""
        n = [int(number) for number in text.split()]
        pairs = [(n[i], n[i + 1]) for i in range(0, 10, 2)]
        spans = tuple(Span(n[i], n[i + 1], n[i + 2], n[i + 3], n[i + 4]) for i in range(10, len(n), 5))
        return cls(pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], spans)


class Plan:
    """The attention calls of one forward pass that are computed in windows, and how to recognise them.

    Args:
        layout: Layout of the pass's tokens.
        native: Native token grid `(Y, X)` of the model; the window.
        fraction: Offset of the patch grid per axis, as a fraction of the patch.
        rotation: The model's rotary positions, if text is rotated for each window.
        like: An input tensor of the model, for device and dtype.
        options: Options of `patch_model`.
    """

    def __init__(
        self, layout: Layout, native: Grid, fraction: tuple[float, float], rotation: TextRotation | None, like: Tensor, options: Options
    ) -> None:
        self.grid, self.masked, self.others = layout.grid, layout.masked, layout.others
        self.calls = tuple(Call(sequence, native, fraction, rotation, like, options) for sequence in layout.sequences)
        self.grids = " or ".join(dict.fromkeys(f"{y} x {x}" for y, x in (call.grid for call in self.calls)))

    def call(self, queries: int, keys: int) -> Call | None:
        """The call with these sequence lengths; None if there is none, or if it could be another kind of call."""
        if keys in self.others:
            return None
        for call in self.calls:
            if (queries, keys) == call.sizes.lengths:
                return call
        return None

    def unexpected(self, queries: int, keys: int) -> str:
        """Why a call that looks like image self-attention does not match; empty for cross-attention and attention among text tokens."""
        if keys in self.others:
            same = any((queries, keys) == call.sizes.lengths for call in self.calls)
            return "image and text have the same number of tokens and cannot be told apart" + got(keys) if same else ""
        image = any(queries == call.sizes.area for call in self.calls)
        joint = any(call.sequence.text for call in self.calls)
        wrong = queries == keys or (image and (keys - queries in self.others or (joint and keys > queries)))
        return f"q, k and v must have the tokens of {self.grids}" + got(queries, keys) if wrong else ""


_EXTRA_CHANNELS = 8  # the kernel needs head dims that are multiples of 8


def with_score_bias(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Extend q, k and v to `[B, S, H, D + 8]` so that attention adds a_i b_j to the score of query i and key j; a and b are `[B, S]`.

    The product is one more channel: a / scale in the queries, b in the keys, zero in the values.
    """

    def longer(x: Tensor, channel: Tensor | None) -> Tensor:
        x = F.pad(x, (0, _EXTRA_CHANNELS))
        if channel is not None:
            x[..., -_EXTRA_CHANNELS] = channel[:, :, None].to(x.device, x.dtype)
        return x

    return longer(q, of_queries / scale), longer(k, of_keys), longer(v, None)


def got(*values: Tensor | int) -> str:
    """The end of a message: ", got" with shapes and dtypes, or numbers. Empty inside a compiled graph, where shapes may be symbolic."""
    if torch.compiler.is_compiling():
        return ""
    return ", got " + ", ".join(f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"{x}" for x in values)


def _rope_for(rope: tuple[Tensor, Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    """The tables on the device of a call, which offloading may change, padded for channels that are not rotated."""
    cos, sin = (table.to(q.device) for table in rope)
    more = q.shape[-1] // 2 - cos.shape[-1]
    return (F.pad(cos, (0, more), value=1.0), F.pad(sin, (0, more))) if more > 0 else (cos, sin)


def _tokens(x: Tensor, start: int, length: int) -> Tensor:
    """Tokens `[start, start + length)` of `[B, S, H, D]`. With slicing, torch.compile would keep symbolic shapes."""
    return x.narrow(1, start, length)


def _placeholder_queries(text_k: Tensor, q: Tensor) -> Tensor:
    """A placeholder `[B, T, H, D]` for the text queries where none are needed."""
    return text_k if text_k.shape[2] == q.shape[2] else text_k.repeat_interleave(q.shape[2] // text_k.shape[2], dim=2)
