"""One kind of attention call of a forward pass: where its tokens are, and how it is computed in windows.

Legend: B batch, S tokens of a sequence, H heads, G key heads, D head dim, Y x X token grid, T text tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.families.grid import Grid, Sequence, Span, offset_of, patch_of, split_sizes, window_of
from scalediff.families.rotation import TextRotation
from scalediff.patching.rows import RowShare
from scalediff_kernels import (
    joint_neighborhood_patch_attention,
    neighborhood_patch_attention,
    sharded_joint_neighborhood_patch_attention,
    sharded_neighborhood_patch_attention,
)
from scalediff_kernels.neighborhood.api import Impl, TextQueries


class Call:
    """One kind of attention call: the layout of its sequence, and its windows."""

    def __init__(
        self,
        sequence: Sequence,
        *,
        native: Grid,
        offset: tuple[float, float],
        rotation: TextRotation | None,
        text_queries: TextQueries,
        impl: Impl,
        wrap: tuple[bool, bool] = (False, False),
        group: Any = None,
    ) -> None:
        self.sequence, self.grid = sequence, sequence.grid
        self.window, self.patch = window_of(native, sequence.level), patch_of(native, sequence.level)
        self.offset, self.wrap = offset_of(native, sequence.level, offset), wrap
        self.impl, self.text_queries = impl, text_queries if sequence.queries == "all" else None
        self.real, self.padded = sequence.real, any(count < sequence.text for count in sequence.real)
        self.rotation = rotation if sequence.text != 0 else None
        self._exact: tuple[Tensor, Tensor] | None = None
        if self.rotation is not None:
            with torch.inference_mode(False):  # tables made in inference mode could not be used with gradients later
                self._exact = self.rotation.tables(self.grid, native, self.window, self.patch, self.offset)
        self.text_rope = self._exact  # on the device and in the dtype of the last call
        self.share = None if group is None else RowShare(sequence, group)  # this rank's, if the rows are split over ranks
        if self.share is not None:
            self._attend_uncompiled = torch.compiler.disable(
                self._attend_over_ranks, reason="ranks exchange rows: leave out fullgraph=True"
            )
        held = sequence if self.share is None else self.share.with_all_text
        spans = held.spans(len(held.real) or 1)
        around = int(wrap[0]), int(wrap[1])
        self._sizes = _CallSizes(held.grid, self.window, self.patch, self.offset, around, held.lengths, held.shards, spans)
        self._encoded = self._sizes.encode()

    def move_text_rope(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The rotary tables `(cos, sin)` on a device, in at least fp32. They stay there, except inside a compiled graph."""
        if self.text_rope is None or self._exact is None:
            return None
        kind = torch.promote_types(dtype, torch.float32)
        if (self.text_rope[0].device, self.text_rope[0].dtype) == (device, kind):
            return self.text_rope
        cos, sin = self._exact
        if torch.compiler.is_compiling():
            return cos.to(device, kind), sin.to(device, kind)
        with torch.inference_mode(False):
            moved = cos.to(device, kind), sin.to(device, kind)
        if type(moved[0]) is Tensor:  # no fake one
            self.text_rope = moved
        return moved

    @property
    def is_traced(self) -> bool:
        """Whether the rotary tables belong to an export or another trace, so that no later pass can use them."""
        return self._exact is not None and type(self._exact[0]) is not Tensor

    @property
    def sizes(self) -> _CallSizes:
        """The sizes of the call.

        Under torch.compile they are parsed from a string, which makes them constants: integers would become symbolic as soon as a second
        picture size is used.
        """
        return _CallSizes.decode(self._encoded) if torch.compiler.is_compiling() else self._sizes

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of query and key tokens, by which a call is recognised."""
        return self.sizes.lengths if self.share is None else self.share.lengths

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of queries `[B, S, H, D]` to keys and values `[B, S, G, D]`; the output is zero at padding."""
        if self.share is not None:
            out: Tensor = self._attend_uncompiled(self.share, q, k, v, scale)
            return out
        parts = self._parts()
        if parts is None:
            return self._attend(q, k, v, scale)
        k, v = _join(k, *parts), _join(v, *parts)
        if self.text_queries is None:  # the queries are image tokens alone
            return self._attend(q, k, v, scale)
        return _interleave(self._attend(_join(q, *parts), k, v, scale), *parts)

    def _attend_over_ranks(self, share: RowShare, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        k, v = share.gather_text(k), share.gather_text(v)
        if self.text_queries is None:
            return self._attend(q, k, v, scale)
        return share.own_text(self._attend(share.gather_text(q), k, v, scale))

    def as_it_arrives(self, x: Tensor) -> Tensor:
        """Reorder `[B, S, ...]` from text and image in one piece to the order of a call's tokens, which differs if there are shards."""
        parts = self._parts()
        return x if parts is None else _interleave(x, *parts)

    def _parts(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Lengths of the shards of what comes first, text or image, and of the other; None if text and image are in one piece."""
        sizes = self.sizes
        if sizes.shards == 1 or sizes.lengths[1] == sizes.area:
            return None
        text, image = (split_sizes(n, sizes.shards) for n in (sizes.lengths[1] - sizes.area, sizes.area))
        return (text, image) if self.sequence.side == "prefix" else (image, text)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """As `attend`, of text and image in one piece."""
        sizes = self.sizes
        if sizes.lengths[1] == sizes.area:
            return self._image(sizes, q, k, v, scale)
        if len(sizes.spans) == 1:
            return self._joint(sizes, sizes.spans[0], q, k, v, scale)
        parts = [self._joint(sizes, s, q[s.first : s.last], k[s.first : s.last], v[s.first : s.last], scale) for s in sizes.spans]
        return torch.cat(parts)

    def _image(self, sizes: _CallSizes, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (_tokens(x, 0, sizes.area).unflatten(1, sizes.grid) for x in (q, k, v))
        if self.share is not None:
            how = {**sizes.geometry_of_rows, "scale": scale, "impl": self.impl, "group": self.share.group, "rows": self.share.rows}
            return sharded_neighborhood_patch_attention(q, k, v, **how).flatten(1, 2)
        out: Tensor = neighborhood_patch_attention(q, k, v, **sizes.geometry, scale=scale, impl=self.impl)
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
        text_rope = _pad_channels(self.move_text_rope(q.device, q.dtype), q.shape[-1])
        tensors = image_q, image_k, image_v, text_q, text_k, text_v
        how: dict[str, Any] = {"scale": scale, "text_rope": text_rope, "text_queries": self.text_queries, "impl": self.impl}
        if self.share is not None:
            how |= {**sizes.geometry_of_rows, "group": self.share.group, "rows": self.share.rows}
            image_out, text_out = sharded_joint_neighborhood_patch_attention(*tensors, **how)
        else:
            how |= sizes.geometry
            image_out, text_out = joint_neighborhood_patch_attention(*tensors, **how)
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
    around: Grid  # 1 for an axis that wraps
    lengths: tuple[int, int]
    shards: int
    spans: tuple[Span, ...]

    @property
    def area(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of the operations."""
        return {**self.geometry_of_rows, "wrap": (self.around[0] == 1, self.around[1] == 1)}

    @property
    def geometry_of_rows(self) -> dict[str, Any]:
        """Arguments of the operations on rows that are shared out among ranks, which do not wrap."""
        return {"window": self.window, "patch": self.patch, "offset": self.offset}

    def encode(self) -> str:
        """Encode as a string: six pairs, the number of shards, then the spans."""
        return " ".join(str(n) for numbers in (*self[:6], (self.shards,), *self.spans) for n in numbers)

    @classmethod
    def decode(cls, text: str) -> _CallSizes:
        """The inverse of `encode`."""
        n = [int(number) for number in text.split()]
        pairs = [(n[i], n[i + 1]) for i in range(0, 12, 2)]
        spans = tuple(Span(n[i], n[i + 1], n[i + 2], n[i + 3], n[i + 4]) for i in range(13, len(n), 5))
        return cls(pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], pairs[5], n[12], spans)


def _join(x: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> Tensor:
    """Reorder tokens `[f0 s0 f1 s1 ...]` of `[B, S, ...]`, parts of these lengths, to `[f0 f1 ... s0 s1 ...]`."""
    parts = x.split([length for pair in zip(first, second, strict=True) for length in pair], dim=1)
    return torch.cat([*parts[0::2], *parts[1::2]], dim=1)


def _interleave(x: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> Tensor:
    """The inverse of `_join`."""
    parts = x.split([*first, *second], dim=1)
    return torch.cat([part for pair in zip(parts[: len(first)], parts[len(first) :], strict=True) for part in pair], dim=1)


def _pad_channels(rope: tuple[Tensor, Tensor] | None, dim: int) -> tuple[Tensor, Tensor] | None:
    """Extend rotary tables to heads of `dim` channels, of which the last are not rotated."""
    more = 0 if rope is None else dim // 2 - rope[0].shape[-1]
    return rope if rope is None or more <= 0 else (F.pad(rope[0], (0, more), value=1.0), F.pad(rope[1], (0, more)))


def _tokens(x: Tensor, start: int, length: int) -> Tensor:
    """Tokens `[start, start + length)` of `[B, S, H, D]`. With slicing, torch.compile would keep symbolic shapes."""
    return x.narrow(1, start, length)


def _placeholder_queries(text_k: Tensor, q: Tensor) -> Tensor:
    """A placeholder `[B, T, H, D]` for the text queries where none are needed."""
    return text_k if text_k.shape[2] == q.shape[2] else text_k.repeat_interleave(q.shape[2] // text_k.shape[2], dim=2)
