"""Neighborhood patch attention: the public functions, with their argument checks.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from scalediff_kernels._arguments import checked_wrap
from scalediff_kernels._launch import has_triton
from scalediff_kernels.neighborhood import op
from scalediff_kernels.neighborhood.geometry import check_axis, patch_count
from scalediff_kernels.neighborhood.lse import window_log_sum_exp
from scalediff_kernels.neighborhood.reference import joint_neighborhood_patch_attention_reference, neighborhood_patch_attention_reference
from scalediff_kernels.neighborhood.windowed_sdpa import joint_neighborhood_patch_attention_sdpa, neighborhood_patch_attention_sdpa

Impl = Literal["auto", "reference", "sdpa", "triton"]
TextQueries = Literal["window", "global"]
Pair = tuple[int, int]


@overload
def neighborhood_patch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int] = (0, 0),
    wrap: tuple[bool, bool] = (False, False), origin: Pair | None = None, scale: float | None = None,
    return_lse: Literal[False] = False, impl: Impl = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def neighborhood_patch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int] = (0, 0),
    wrap: tuple[bool, bool] = (False, False), origin: Pair | None = None, scale: float | None = None,
    return_lse: Literal[True], impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def neighborhood_patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    wrap: tuple[bool, bool] = (False, False),
    origin: tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query patch to one key/value window around it.

    Args:
        q: Queries `[B, Y, X, H, D]`, floating point, with any strides. The Triton kernel first copies a tensor whose rows do not start
            at multiples of 16 bytes.
        k, v: Keys and values `[B, Y, X, G, D]`, with the dtype and device of q. G divides H; head h of q uses head h * G // H of k and v.
            With `origin`, their grid may be larger than that of q.
        window: Key/value window in tokens, `(Y, X)`. It is shifted into the grid at the borders. A window larger than the grid is the
            whole grid, and the result is that of `F.scaled_dot_product_attention`.
        patch: Query patch in tokens, `(Y, X)`, at most the window. The paper uses half the window.
        offset: Shift of the patch grid towards the first query in tokens, `(Y, X)`, each in `[0, patch)`. Border patches are smaller.
        wrap: Whether the picture continues on the other side, per axis `(Y, X)`: `(False, True)` for a panorama of 360 degrees. Windows and
            patches then cross the border instead of being shifted or cut there. Along an axis whose length the patch divides, a cyclic
            shift of all tensors by a patch shifts the result; otherwise the last patch is smaller and tells where the axis begins.
        origin: Position `(Y, X)` of the first query on the grid of k and v, if the queries are a part of that grid. Windows are shifted
            into the grid of k and v. When None, both grids must be the same.
        scale: Factor on the scores; `D ** -0.5` when None.
        return_lse: Whether to return the log-sum-exp of the scores as well, by which results over different keys can be merged. The
            kernel has it at no cost; `"sdpa"` and `"reference"` compute the scores once more for it.
        impl: The implementation. `"triton"`: the fused kernel (fp16, bf16 or fp32, D a multiple of 8 up to 256, contiguous last axis, no
            gradients). `"sdpa"`: torch's SDPA on windows. `"reference"`: eager torch (fp64 stays fp64). `"auto"`: the kernel for 16-bit
            tensors on a GPU if it supports them and the window does not cover the grid, otherwise SDPA. A named implementation is never
            replaced by another.

    Returns:
        `[B, Y, X, H, D]` in the dtype of q. Under autocast, `"triton"` and `"sdpa"` compute in autocast's dtype and return it. With
        `return_lse`, a pair of this and the log-sum-exp (natural logarithm) `[B, Y, X, H]` in fp32, or in fp64 for fp64 tensors.

    Raises:
        ValueError: Shapes, dtypes or devices disagree, patch exceeds window, an offset is outside the patch, queries are outside the
            grid of k and v, or the scale is not finite.
        TypeError: A tensor is not floating point, or `wrap` is not a pair of booleans.
        NotImplementedError: `impl="triton"` does not support these tensors.

    ScaleDiff, arXiv:2510.25818, section 3.2; equal to NATTEN's generalized neighborhood attention with
    kernel_size=window, stride=patch (arXiv:2504.16922) at offset 0.
    """
    _check_image(q, k, v, origin)
    window, patch, offset, wrap, origin, scale = _check_numbers(q, k, window, patch, offset, wrap, origin, scale)
    covers = window[0] >= k.shape[1] and window[1] >= k.shape[2]
    chosen = _choose(impl, (q, k, v), covers=covers and not return_lse)  # the kernel has the log-sum-exp, torch's attention has not
    if chosen == "triton":
        run = op.image_attention_lse if return_lse else op.image_attention
        out: Tensor | tuple[Tensor, Tensor] = run(q, k, v, None, None, None, None, window, patch, offset, wrap, scale, origin)
        return out
    how: dict[str, Any] = {"window": window, "patch": patch, "offset": offset, "wrap": wrap, "scale": scale, "origin": origin}
    attend = neighborhood_patch_attention_reference if chosen == "reference" else neighborhood_patch_attention_sdpa
    result = attend(q, k, v, **how)
    return (result, window_log_sum_exp(*_as_cast(chosen, q, k), **how)) if return_lse else result


@overload
def joint_neighborhood_patch_attention(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, *, window: tuple[int, int], patch: tuple[int, int],
    offset: Pair = (0, 0), wrap: tuple[bool, bool] = (False, False), origin: Pair | None = None, scale: float | None = None,
    text_rope: tuple[Tensor, Tensor] | None = None, text_queries: TextQueries | None = "window",
    return_lse: Literal[False] = False, impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]: ...  # fmt: skip


@overload
def joint_neighborhood_patch_attention(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, *, window: tuple[int, int], patch: tuple[int, int],
    offset: Pair = (0, 0), wrap: tuple[bool, bool] = (False, False), origin: Pair | None = None, scale: float | None = None,
    text_rope: tuple[Tensor, Tensor] | None = None, text_queries: TextQueries | None = "window",
    return_lse: Literal[True], impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None, Tensor]: ...  # fmt: skip


def joint_neighborhood_patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    wrap: tuple[bool, bool] = (False, False),
    origin: tuple[int, int] | None = None,
    scale: float | None = None,
    text_rope: tuple[Tensor, Tensor] | None = None,
    text_queries: TextQueries | None = "window",
    return_lse: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Neighborhood patch attention with text tokens in the same softmax: image queries attend to text and to their window.

    Args:
        q, k, v, window, patch, offset, wrap, origin, scale, return_lse, impl: As in `neighborhood_patch_attention`, with D even if
            `text_rope` is given.
        text_q: Text queries `[B, T, H, D]`, with the dtype and device of q.
        text_k, text_v: Text keys and values `[B, T, G, D]`, likewise.
        text_rope: Tables (cos, sin), each `[patches_y, patches_x, D / 2]`, fp32 or fp64, with cos^2 + sin^2 = 1: angles by which text
            keys, and text queries under the rule `"window"`, are rotated for the window of each patch. Channels 2c and 2c + 1 are
            rotated by angle c. The authors use the rotary angle of the window's top-left token, which keeps the distances between text
            and image in the trained range.
        text_queries: What text queries attend to. `"window"`, the authors' rule: text and one window, averaged over all windows.
            `"global"`: text and all image tokens of k, without rotation. None: there is no text output. With `origin`, `"window"` averages
            over the windows of the given queries.

    Returns:
        The image output `[B, Y, X, H, D]`, and the text output `[B, T, H, D]` or None. With `return_lse`, also the log-sum-exp of the
        image queries over text and window, `[B, Y, X, H]`.

    Raises:
        ValueError: As `neighborhood_patch_attention`; also if text tensors or tables have other shapes, or the rule is unknown.
        TypeError: As `neighborhood_patch_attention`; also if `text_rope` is not a pair of tensors.
        NotImplementedError: As `neighborhood_patch_attention`.

    ScaleDiff, arXiv:2510.25818, section 3.2 and its released code for the text rule.
    """
    _check_image(q, k, v, origin)
    _check_text(q, k, text_q, text_k, text_v)
    window, patch, offset, wrap, origin, scale = _check_numbers(q, k, window, patch, offset, wrap, origin, scale)
    if text_queries not in (*get_args(TextQueries), None):
        raise ValueError(f"text_queries must be 'window', 'global' or None, got {text_queries=}")
    if text_rope is not None:
        _check_rope(q, text_rope, patch, offset, wrap)
    chosen = _choose(impl, (q, k, v, text_q, text_k, text_v), covers=False)
    how: dict[str, Any] = {"window": window, "patch": patch, "offset": offset, "wrap": wrap, "scale": scale, "origin": origin}
    how |= {"text_rope": text_rope}
    if chosen != "triton":
        attend = joint_neighborhood_patch_attention_reference if chosen == "reference" else joint_neighborhood_patch_attention_sdpa
        results = attend(q, k, v, text_q, text_k, text_v, **how, text_queries=text_queries)
        return (*results, window_log_sum_exp(*_as_cast(chosen, q, k, text_k), **how)) if return_lse else results
    numbers = (*(text_rope or (None, None)), window, patch, offset, wrap, scale, origin)
    image = (q, k, v, text_k, text_v, *numbers)
    out, *lse = op.image_attention_lse(*image) if return_lse else (op.image_attention(*image),)
    text = None
    if text_queries == "window":
        text = op.text_attention(text_q, k, v, text_k, text_v, *numbers, (q.shape[1], q.shape[2]))
    elif text_queries == "global":  # one window over the grid
        grid = (k.shape[1], k.shape[2])
        text = op.text_attention(text_q, k, v, text_k, text_v, None, None, grid, grid, (0, 0), (False, False), scale)
    return (out, text, *lse)


def check_impl(impl: str) -> None:
    """Check the name of an implementation, before any call.

    Raises:
        ValueError: The name is unknown.
        NotImplementedError: `"triton"` without the triton package.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl=}")
    if impl == "triton" and not has_triton():
        raise NotImplementedError("impl='triton' needs the triton package, which is not installed: use impl='auto', got impl='triton'")


def _choose(impl: str, tensors: tuple[Tensor, ...], *, covers: bool) -> str:
    """The implementation to run; raises NotImplementedError if a named one does not support the tensors."""
    check_impl(impl)
    if impl in ("reference", "sdpa"):
        return impl
    if impl == "triton":
        if refusal := op.refusal(tensors):
            raise NotImplementedError(f"impl='triton': {refusal}")
        return "triton"
    if tensors[0].device.type != "cuda" or covers or not has_triton() or op.refusal(tensors):
        return "sdpa"
    return "triton" if op.dtype_under_autocast(tensors[0]).itemsize == 2 else "sdpa"


def _as_cast(chosen: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the implementation sees them: torch's attention in the dtype of autocast."""
    return tensors if chosen == "reference" else tuple(x.to(op.dtype_under_autocast(x)) for x in tensors)


def _check_numbers(
    q: Tensor, k: Tensor, window: Pair, patch: Pair, offset: Pair, wrap: tuple[bool, bool], origin: Pair | None, scale: float | None
) -> tuple[Pair, Pair, Pair, tuple[bool, bool], Pair, float]:
    wrap = checked_wrap(wrap)
    if any(wrap) and origin is not None:
        raise NotImplementedError(f"wrap needs queries on the whole grid of k and v, without origin, got {wrap=} and {origin=}")
    window, patch, offset, origin = (
        _pair(name, value) for name, value in (("window", window), ("patch", patch), ("offset", offset), ("origin", origin or (0, 0)))
    )
    for axis in (0, 1):
        check_axis(q.shape[1 + axis], window[axis], patch[axis], offset[axis], keys=k.shape[1 + axis], origin=origin[axis])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not -math.inf < scale < math.inf:  # torch.compile traces comparisons, not math.isfinite
        raise ValueError(f"scale must be finite, got {scale=}")
    return window, patch, offset, wrap, origin, float(scale)


def _check_image(q: Tensor, k: Tensor, v: Tensor, origin: Pair | None) -> None:
    if q.ndim != 5 or 0 in q.shape:
        raise ValueError(f"q, k and v must be [B, Y, X, H, D] with no empty axis, got {tuple(q.shape)=}")
    same_grid = origin is not None or k.shape[1:3] == q.shape[1:3]
    if k.shape != v.shape or k.ndim != 5 or (k.shape[0], k.shape[4]) != (q.shape[0], q.shape[4]) or not same_grid:
        but = "" if origin is None else " and the grid, that of k and v being one"
        raise ValueError(
            f"q, k and v must have the same shape except for the heads{but}, got {tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}"
        )
    if k.shape[3] == 0 or q.shape[3] % k.shape[3]:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {q.shape[3]=}, {k.shape[3]=}")
    _check_kind("q, k and v", {"q": q, "k": k, "v": v})


def _check_text(q: Tensor, k: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor) -> None:
    batch, heads, groups, dim = q.shape[0], q.shape[3], k.shape[3], q.shape[4]
    tokens = text_q.shape[1] if text_q.ndim == 4 else 0
    expected = [(batch, tokens, n, dim) for n in (heads, groups, groups)]
    shapes = [tuple(x.shape) for x in (text_q, text_k, text_v)]
    if tokens == 0 or shapes != expected:
        raise ValueError(
            f"text_q must be [B, T, H, D] and text_k, text_v [B, T, G, D] with T >= 1 for B, H, G, D = {batch}, {heads}, {groups}, {dim}, "
            f"got {shapes[0]}, {shapes[1]}, {shapes[2]}"
        )
    _check_kind("image and text", {"q": q, "text_q": text_q, "text_k": text_k, "text_v": text_v})


def _check_kind(subject: str, tensors: dict[str, Tensor]) -> None:
    if len({x.dtype for x in tensors.values()}) > 1:
        raise ValueError(f"{subject} must have the same dtype, got " + ", ".join(f"{name}.dtype={x.dtype}" for name, x in tensors.items()))
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError(
            f"{subject} must be on the same device, got " + ", ".join(f"{name}.device={x.device}" for name, x in tensors.items())
        )
    first = next(iter(tensors.values()))
    if not first.is_floating_point():
        raise TypeError(f"{subject} must be floating point, got {first.dtype}")


def _check_rope(q: Tensor, rope: tuple[Tensor, Tensor], patch: tuple[int, int], offset: tuple[int, int], wrap: tuple[bool, bool]) -> None:
    if not isinstance(rope, tuple | list) or len(rope) != 2 or not all(isinstance(x, Tensor) for x in rope):
        raise TypeError(f"text_rope must be a pair of tensors (cos, sin), got {type(rope)}")
    patches = [patch_count(n, p, o, wrap=on) for n, p, o, on in zip(q.shape[1:3], patch, offset, wrap, strict=True)]
    expected = (*patches, q.shape[-1] // 2)
    if q.shape[-1] % 2 or any(tuple(x.shape) != expected for x in rope):
        raise ValueError(
            f"text_rope must be two tables [patches_y, patches_x, D / 2] = {expected} with an even D, "
            f"got {tuple(rope[0].shape)}, {tuple(rope[1].shape)}, D={q.shape[-1]}"
        )
    if any(x.device != q.device or x.dtype not in (torch.float32, torch.float64) for x in rope):
        raise ValueError(f"text_rope must be fp32 or fp64 on {q.device}, got {[(x.dtype, x.device) for x in rope]}")


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(n, int | torch.SymInt) for n in value):
        raise TypeError(f"{name} must be a pair of integers (Y, X), got {name}={value!r}")
    return value[0], value[1]
