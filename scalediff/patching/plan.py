"""`AttentionPlan`: which attention calls of a forward pass are computed in windows, and how. It knows no model.

Legend: B batch, S tokens of a sequence, H heads, G key heads, D head dim, Y x X token grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from scalediff.arguments import check_arguments, check_grid, check_wrap, choice, instance, optional
from scalediff.families.grid import Grid, Layout
from scalediff.families.rotation import TextRotation
from scalediff.patching.call import Call
from scalediff.patching.masks import is_constant, key_mask_bias, with_score_bias
from scalediff_kernels.neighborhood.api import Impl, TextQueries, check_impl


class Match(NamedTuple):
    """A call that is computed in windows: queries `[B, S, H, D]`, keys and values `[B, S, G, D]`, and the factors of a score bias."""

    call: Call
    q: Tensor
    k: Tensor
    v: Tensor
    weights: tuple[Tensor, Tensor] | None

    def attend(self, scale: float | None) -> Tensor:
        """The result, `[B, S, H, D]`."""
        q, k, v = self.q, self.k, self.v
        if self.weights is None:
            return self.call.attend(q, k, v, scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        of_queries, of_keys = (x.expand(q.shape[0], -1) for x in self.weights)
        if of_queries.shape[1] != q.shape[1]:  # only the image has queries, and text is among the keys
            of_queries = of_queries[:, :1].expand(-1, q.shape[1])
        return self.call.attend(*with_score_bias(q, k, v, of_queries, of_keys, scale), scale)[..., : q.shape[-1]]


class AttentionPlan:
    """The attention of one forward pass in windows, without any model: call it with the queries, keys and values of every attention call.

        plan = scalediff.AttentionPlan(Layout((128, 128), (Sequence((128, 128), text=77),)), window=(64, 64))
        out = plan(q, k, v)
        if out is None:  # another call, such as cross-attention: plan.why tells
            out = full_attention(q, k, v)

    A call is recognised by its numbers of queries and keys, which `layout` lists. A plan may be kept for all passes of one size, and used
    by several threads; only `why` is that of the last call.

    Args:
        layout: Layout of the tokens of the pass.
        window: Key/value window `(Y, X)` in tokens at the finest level: the token grid that the model was trained on. Query patches are
            half a window. If the layout's grid is not larger in area, no call is computed in windows.
        text_rope: The model's rotary positions, to rotate text for each window; text is not rotated when None.
        text_queries: What text queries attend to: `"window"` or `"global"`, as in
            `scalediff_kernels.joint_neighborhood_patch_attention`.
        offset: Offset of the patch grid `(Y, X)`, each as a fraction of a patch in [0, 1).
        wrap: Whether the picture continues on the other side, per axis `(Y, X)`, as in
            `scalediff_kernels.neighborhood_patch_attention`.
        impl: Implementation of the attention, as in `scalediff_kernels.neighborhood_patch_attention`.
        group: Process group, or `DeviceMesh` of one dimension, over whose ranks the picture is split by rows and the text by tokens, both
            in equal parts (text as `torch.tensor_split` does). Then the tokens of a call are those of this rank, `[text, image]` or
            `[image, text]`; `layout` describes the whole sequence, without `shards`.

    Raises:
        ValueError: An argument is out of range, or the ranks do not divide the rows.
        TypeError: An argument is of the wrong type.
        NotImplementedError: `impl="triton"` without the triton package; `wrap` beside rotary positions.

    ScaleDiff, arXiv:2510.25818, section 3.2.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        window: Grid,
        text_rope: TextRotation | None = None,
        text_queries: TextQueries = "window",
        offset: tuple[float, float] = (0.0, 0.0),
        wrap: tuple[bool, bool] = (False, False),
        impl: Impl = "auto",
        group: Any = None,
    ) -> None:
        given = {
            "layout": layout, "window": window, "text_rope": text_rope, "text_queries": text_queries, "offset": offset, "wrap": wrap,
        }  # fmt: skip
        check_arguments(_CHECKS, given)
        check_impl(impl)
        if text_rope is not None and any(wrap):
            raise NotImplementedError(f"wrap is for models without rotary positions, which end at the border, got {wrap=} and {text_rope=}")
        self.layout, self.window, self.grid = layout, (int(window[0]), int(window[1])), layout.grid
        self.why = ""  # why the last call was not computed in windows; empty if it was
        self.group = group
        options = {"rotation": text_rope, "text_queries": text_queries, "impl": impl, "wrap": (wrap[0], wrap[1]), "group": group}
        self.calls = tuple(Call(sequence, native=self.window, offset=offset, **options) for sequence in layout.sequences)
        self.grids = " or ".join(dict.fromkeys(f"{y} x {x}" for y, x in (call.grid for call in self.calls)))

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """Compute one attention call in windows, or return None if the caller must compute it.

        Args:
            q: Queries `[B, S, H, D]`, any strides with a contiguous last axis; fp16, bf16, fp32 or fp64.
            k, v: Keys and values `[B, S, G, D]`, where G is H or 1, or divides H with `enable_gqa`.
            mask: Mask that broadcasts to `[B, H, S, S]`, as for `F.scaled_dot_product_attention`. Masks without effect and boolean masks of
                keys `[B or 1, 1, 1, S]` are supported; with any other the result is None.
            scale: Scale of the scores; 1 / sqrt(D) when None.
            is_causal: Whether attention is causal, which is not supported: the result is None.
            enable_gqa: Whether fewer key heads than query heads are intended, as for `F.scaled_dot_product_attention`.

        Returns:
            The result `[B, S, H, D]`; None if this is not one of the plan's calls, if windows cannot be used for it, or if the grid is
            not larger than the window. Then `why` tells the reason.
        """
        match, why = None, "the grid is not larger than the window"
        if not self.is_native:
            match, why = self.match(q, k, v, mask=mask, is_causal=is_causal, enable_gqa=enable_gqa, weights=self.layout.weights)
        if match is None:
            self._set_why(why or f"{q.shape[1]} queries and {k.shape[1]} keys are not the tokens of {self.grids}")
            return None
        self._set_why("")
        return match.attend(scale)

    def __repr__(self) -> str:
        return f"AttentionPlan({self.layout!r}, window={self.window})"

    @property
    def is_native(self) -> bool:
        """Whether the token grid is not larger in area than the window, so that every call runs full attention."""
        return self.grid[0] * self.grid[1] <= self.window[0] * self.window[1]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> AttentionPlan:
        """Move the rotary tables to the device and dtype of later calls, and return the plan. Otherwise the first call moves them."""
        for call in self.calls:
            call.move_text_rope(torch.device(device), dtype)
        return self

    def call(self, queries: int, keys: int) -> Call | None:
        """The kind of call with these numbers of tokens; None if there is none, or if it could be another kind of call."""
        if keys in self.layout.others:
            return None
        for call in self.calls:
            if (queries, keys) == call.lengths:
                return call
        return None

    def match(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        enable_gqa: bool = False,
        heads_first: bool = False,
        weights: Tensor | None = None,
    ) -> tuple[Match | None, str]:
        """Match a call with the plan.

        Args:
            q, k, v, mask, is_causal, enable_gqa: As in a call of the plan; `[B, H, S, D]` with `heads_first`.
            dropout_p: Dropout of the attention, which must be 0.
            weights: The layout's score weights of this pass.

        Returns:
            The match and an empty string; or None and why the call runs full attention, which is empty for cross-attention and attention
            among text tokens.
        """
        if not q.ndim == k.ndim == v.ndim == 4:
            return None, f"q, k and v must be {'[B, H, S, D]' if heads_first else '[B, S, H, D]'}" + got(q)
        if heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        call = self.call(q.shape[1], k.shape[1])
        if call is None:
            return None, self._unexpected(q.shape[1], k.shape[1])
        k, v = _broadcast(q, k, v)
        problem = _find_problem(call, q, k, v, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=enable_gqa)
        if not problem and weights is not None and weights.shape != q.shape[:2]:
            problem = "score weights must be [B, S]" + got(weights, q)
        if not problem and call.padded and mask is None:
            problem = f"text of {call.real} tokens is padded, but the call has no mask"
        if problem:
            return None, problem
        factors = None if weights is None else (call.as_it_arrives(weights),) * 2
        if mask is not None and not self.layout.masked and not is_constant(mask):  # masked: the layout already accounts for the mask
            if call.share is not None:
                return None, "masks of the text are not supported over ranks" + got(mask)
            bias = key_mask_bias(mask, k)
            if bias is None:
                return None, "this attention mask is not supported" + got(mask)
            factors = torch.ones_like(bias), bias
        return Match(call, *_cast_to_one_dtype(q, k, v), factors), ""

    def _unexpected(self, queries: int, keys: int) -> str:
        """Why a call that looks like image self-attention does not match; empty for cross-attention and attention among text tokens."""
        others = self.layout.others
        if keys in others:
            same = any((queries, keys) == call.lengths for call in self.calls)
            return "image and text have the same number of tokens and cannot be told apart" + got(keys) if same else ""
        image = any(queries == call.sizes.area for call in self.calls)
        joint = any(call.sequence.text for call in self.calls)
        wrong = queries == keys or (image and (keys - queries in others or (joint and keys > queries)))
        return f"q, k and v must have the tokens of {self.grids}" + got(queries, keys) if wrong else ""

    def _set_why(self, why: str) -> None:
        if not torch.compiler.is_compiling():
            self.why = why


def _check_window(name: str, value: object) -> None:
    check_grid(name, value)
    if not (isinstance(value, tuple | list) and len(value) == 2 and min(value) > 0):
        raise ValueError(f"{name} must be two positive integers (Y, X) in tokens, got {name}={value!r}")


def _check_offset(name: str, value: object) -> None:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(n, int | float) and 0 <= n < 1 for n in value)
    if not pair:
        raise ValueError(f"{name} must be two fractions of a patch (Y, X) in [0, 1), got {name}={value!r}")


_CHECKS = {
    "layout": instance(Layout, "a Layout"),
    "window": _check_window,
    "text_rope": optional(instance(TextRotation, "a TextRotation")),
    "text_queries": choice(get_args(TextQueries)),
    "offset": _check_offset,
    "wrap": check_wrap,
}


def _broadcast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast keys and values as `F.scaled_dot_product_attention` does: over the batch, and to equal numbers of heads.

    One head for all queries stays one head: the op takes grouped heads.
    """
    batch = q.shape[0]
    k, v = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 and batch > 1 else x for x in (k, v))
    heads = max(k.shape[2], v.shape[2])
    k, v = (x.expand(-1, -1, heads, -1) if x.shape[2] == 1 and heads > 1 else x for x in (k, v))
    return k, v


def _find_problem(call: Call, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, is_causal: bool, enable_gqa: bool) -> str:
    """Why a call of the expected lengths cannot be computed in windows, whatever its mask; empty if it can."""
    if is_causal:
        return "causal attention is not supported"
    if dropout_p != 0.0:
        return "attention with dropout is not supported"
    grouped = enable_gqa or k.shape[2] == 1
    if k.shape != v.shape or (k.shape[2] != q.shape[2] and not grouped) or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        return "q, k and v must have the same shape except for their lengths" + got(q, k, v)
    if call.rotation is not None and call.rotation.channels != q.shape[3]:
        return f"text_rope rotates heads of {call.rotation.channels} channels: pass dim= if the others are not rotated" + got(q)
    if call.real and len(call.real) != q.shape[0]:
        return f"the text lengths are for a batch of {len(call.real)} samples" + got(q)
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return "q, k and v must have the same dtype" + got(q, k, v)
    return ""


def _cast_to_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as torch's attention does under autocast, where normalised queries and keys may be fp32 and values 16-bit."""
    if q.dtype == k.dtype == v.dtype:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def got(*values: Tensor | int) -> str:
    """The end of a message: ", got" with shapes and dtypes, or numbers. Empty inside a compiled graph, where shapes may be symbolic."""
    if torch.compiler.is_compiling():
        return ""
    return ", got " + ", ".join(f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"{x}" for x in values)
