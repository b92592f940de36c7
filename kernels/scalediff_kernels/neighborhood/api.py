"""Neighborhood patch attention: what users call. Meaning and checks here, integers in geometry, truth in reference.

Legend: B batch, H heads, Y x X token grid, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.neighborhood.reference import neighborhood_patch_attention_reference
from scalediff_kernels.neighborhood.windowed_sdpa import neighborhood_patch_attention_sdpa

Impl = Literal["auto", "reference", "sdpa", "triton"]


def neighborhood_patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int],
    patch: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend from every query patch to the one clamped key/value window around it.

    Args:
        q, k, v: `[B, Y, X, H, D]`, one shape, floating dtype and device for the three, any strides.
        window: Key/value window in tokens, `(Y, X)`; shifted into the grid at its borders, and the whole grid where it is
            larger: then the result is that of `F.scaled_dot_product_attention`.
        patch: Query patch in tokens, `(Y, X)`, at most the window. The paper takes half the window.
        offset: How far the patch grid is moved towards the origin, `(Y, X)` in `[0, patch)`. Border patches are smaller.
        scale: Factor on the scores; `D ** -0.5` when None.
        impl: `"reference"` is eager torch (fp64 stays fp64), `"sdpa"` one SDPA per window, `"auto"` the fastest there is
            for the device, `"triton"` the fused kernel. A named implementation is used or refused, never replaced.

    Returns:
        `[B, Y, X, H, D]` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices disagree, patch exceeds window, offset outside the patch, scale not finite.
        TypeError: a tensor is not floating point.
        NotImplementedError: `impl="triton"`.

    ScaleDiff, arXiv:2510.25818, section 3.2; equal to NATTEN's generalized neighborhood attention with
    kernel_size=window, stride=patch (arXiv:2504.16922) at offset 0.
    """
    _check_tensors(q, k, v)
    window, patch, offset = _pair("window", window), _pair("patch", patch), _pair("offset", offset)
    for axis in (0, 1):
        windows(q.shape[1 + axis], window[axis], patch[axis], offset[axis])
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale=}")
    check_impl(impl)
    run = neighborhood_patch_attention_reference if impl == "reference" else neighborhood_patch_attention_sdpa
    return run(q, k, v, window=window, patch=patch, offset=offset, scale=float(scale))


def check_impl(impl: str) -> None:
    """Refuse an implementation that cannot run, for callers who name it long before the first call.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: `"triton"`.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl=}")
    if impl == "triton":
        raise NotImplementedError("the fused Triton kernel is not in this version: use impl='sdpa' or impl='auto', got impl='triton'")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 5 or 0 in q.shape:
        raise ValueError(f"q, k and v must be [B, Y, X, H, D] with no empty axis, got {tuple(q.shape)=}")
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k and v must have one shape, got {tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype=}, {k.dtype=}, {v.dtype=}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device=}, {k.device=}, {v.device=}")
    if not q.is_floating_point():
        raise TypeError(f"q, k and v must be floating point, got {q.dtype=}")


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(n, int) for n in value):
        raise TypeError(f"{name} must be a pair of integers (Y, X), got {name}={value!r}")
    return value[0], value[1]
