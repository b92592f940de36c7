"""Low-pass filtering, latent frequency mixing and structure guidance: the public functions.

Every filter is linear and separable, `LP(x) = A_y x A_x^T`, with DC gain 1, and factors into a reduction to a small grid and an expansion.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from scalediff_kernels._arguments import checked_wrap
from scalediff_kernels._launch import DTYPES, device_refusal, has_triton
from scalediff_kernels.lowpass import op
from scalediff_kernels.lowpass.geometry import Kind, coarse_length
from scalediff_kernels.lowpass.reference import low_pass_reference

Impl = Literal["auto", "reference", "matmul", "triton"]


def low_pass(x: Tensor, *, cutoff: float, kind: Kind = "resize", wrap: tuple[bool, bool] = (False, False), impl: Impl = "auto") -> Tensor:
    """Keep the low frequencies of a picture.

    Args:
        x: `[B, C, Y, X]` with any strides, or a view of packed latents, `[B, C, Y / P, P, X / P, P]` (`packed_view`); fp16, bf16, fp32
            or fp64. It is filtered in fp32, or in fp64 if it is fp64.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1]. The paper uses 0.125 for SDXL and 0.25 for FLUX.
        kind: The filter. `"resize"`, the paper's: antialiased bilinear down to `int(length * cutoff)` pixels, and bilinear up.
            `"gaussian"` and `"butterworth"`: the gain per axis at frequency f is `2^-(f / cutoff)^2` or `1 / (1 + (f / cutoff)^8)`, zero
            where this is below 1e-4, with mirrored borders.
        wrap: Whether the picture continues on the other side, per axis `(Y, X)`. Its borders are then neither repeated nor mirrored.
        impl: The implementation. `"triton"`: one kernel for the reduction and one for the expansion. `"matmul"`: the same matrices by
            torch, on any device. `"reference"`: `F.interpolate` or the Fourier transform. `"auto"`: Triton for fp16, bf16 and fp32 on a
            GPU, the reference if gradients are required, otherwise matmul.

    Returns:
        A picture with the shape and dtype of x, and its strides if x is dense.

    Raises:
        ValueError: The cutoff is outside (0, 1] or leaves no coarse pixel, x has another shape, or kind or impl is unknown.
        TypeError: x has another dtype, or `wrap` is not a pair of booleans.
        NotImplementedError: The named implementation cannot run on this device, with this dtype, or with gradients.

    ScaleDiff, arXiv:2510.25818.
    """
    check_picture("x", x)
    return _apply([x], [1.0], addend=None, gain=1.0, cutoff=cutoff, kind=kind, wrap=wrap, impl=impl)


def mix_frequencies(
    high: Tensor, low: Tensor, *, cutoff: float, kind: Kind = "resize", wrap: tuple[bool, bool] = (False, False), impl: Impl = "auto"
) -> Tensor:
    """Latent frequency mixing: high frequencies of one picture with low frequencies of another, `high + LP(low - high)`.

    Args:
        high: As x in `low_pass`. In the paper, the latents upsampled in RGB space.
        low: The same shape, dtype and device. In the paper, the latents upsampled directly.
        cutoff, kind, wrap, impl: As in `low_pass`.

    Returns:
        A picture like `high`. Sums are in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError: As `low_pass`, or high and low disagree in shape, dtype or device.
        TypeError: As `low_pass`.
        NotImplementedError: As `low_pass`.

    ScaleDiff, arXiv:2510.25818.
    """
    check_same("high", high, "low", low)
    return _apply([low, high], [1.0, -1.0], addend=high, gain=1.0, cutoff=cutoff, kind=kind, wrap=wrap, impl=impl)


def guide_structure(
    x0: Tensor,
    reference: Tensor,
    *,
    gamma: float,
    cutoff: float,
    kind: Kind = "resize",
    wrap: tuple[bool, bool] = (False, False),
    impl: Impl = "auto",
) -> Tensor:
    """Structure guidance: move the low frequencies of a predicted x0 towards a reference, `x0 + gamma (LP(reference) - LP(x0))`.

    In a sampling loop, use `GuidedStep`: it changes the model output instead, and computes the coarse grid of the reference once.

    Args:
        x0: As x in `low_pass`. The predicted clean latents at this step.
        reference: The same shape, dtype and device.
        gamma: Finite strength. 0 leaves x0 unchanged; 1 replaces its low frequencies, up to the roll-off of the filter.
        cutoff, kind, wrap, impl: As in `low_pass`.

    Returns:
        A picture like `x0`. Sums are in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError: As `low_pass`; also if x0 and reference disagree in shape, dtype or device, or gamma is not finite.
        TypeError: As `low_pass`.
        NotImplementedError: As `low_pass`.

    ScaleDiff, arXiv:2510.25818.
    """
    check_same("x0", x0, "reference", reference)
    check_gamma(gamma)
    return _apply([reference, x0], [1.0, -1.0], addend=x0, gain=gamma, cutoff=cutoff, kind=kind, wrap=wrap, impl=impl)


def packed_view(tokens: Tensor, *, grid: tuple[int, int], patch: int = 2) -> Tensor:
    """View packed latents (FLUX) as a picture, without a copy.

    Args:
        tokens: `[B, N, C * patch^2]`, where N is the product of `grid`. A token holds patch x patch pixels per channel, row by row.
        grid: Token grid, `(Y / patch, X / patch)`.
        patch: Pixels per token along an axis.

    Returns:
        A view `[B, C, Y / patch, patch, X / patch, patch]`, which all functions of this module accept as a picture.

    Raises:
        ValueError: The shape does not match grid and patch, or these are not positive.
    """
    if min(*grid, patch) < 1:
        raise ValueError(f"grid and patch must be positive, got {grid=} and {patch=}")
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or tokens.shape[2] % patch**2:
        raise ValueError(f"tokens must be [B, {grid[0] * grid[1]}, C * {patch**2}] for {grid=} and {patch=}, got {tuple(tokens.shape)=}")
    view: Tensor = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
    return view


def check_same(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Check that two pictures agree in shape, dtype and device; raises ValueError if not."""
    check_picture(a_name, a)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            f"{a_name} and {b_name} must agree in shape, dtype and device, "
            f"got {tuple(a.shape)} {a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}"
        )


def check_gamma(gamma: float) -> None:
    """Check that gamma is finite; raises ValueError if not."""
    if not -math.inf < gamma < math.inf:  # torch.compile traces comparisons, not math.isfinite
        raise ValueError(f"gamma must be finite, got {gamma=}")


def choose(impl: str, tensors: Sequence[Tensor]) -> str:
    """The implementation to run; raises NotImplementedError if a named one cannot run."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl=}")
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    gradients = forward_mode or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    if gradients and impl in ("matmul", "triton"):
        raise NotImplementedError(f"{impl=} does not support gradients: use torch.no_grad() or impl='auto'")
    refused = (
        "the kernel supports fp16, bf16 and fp32" if any(x.dtype not in DTYPES for x in tensors) else device_refusal(tensors[0].device)
    )
    if impl == "triton" and (refused or not has_triton()):
        raise NotImplementedError(f"impl='triton': {refused or 'the triton package is not installed'}, got {tensors[0].dtype=}")
    if impl != "auto":
        return impl
    if gradients:
        return "reference"
    return "triton" if tensors[0].device.type == "cuda" and not refused and has_triton() else "matmul"


def _apply(
    inputs: Sequence[Tensor],
    weights: Sequence[float],
    *,
    addend: Tensor | None,
    gain: float,
    cutoff: float,
    kind: Kind,
    wrap: tuple[bool, bool],
    impl: Impl,
) -> Tensor:
    """Compute `addend + gain LP(sum weights * inputs)`, with the shape, strides and dtype of the last input."""
    like = inputs[-1]
    wrap = checked_wrap(wrap)
    for length in op.picture_size(like):
        coarse_length(length, cutoff, kind)
    chosen = choose(impl, inputs)
    if chosen == "reference":
        terms = [w * op.flat(x).to(torch.promote_types(x.dtype, torch.float32)) for x, w in zip(inputs, weights, strict=True)]
        out = gain * low_pass_reference(sum(terms[1:], terms[0]), cutoff=cutoff, kind=kind, wrap=wrap)
        out = out if addend is None else op.flat(addend) + out
        return torch.empty_like(like).copy_(out.reshape(like.shape))
    triton = chosen == "triton"
    coarse = op.low_pass_coarse(inputs, weights, None, cutoff, kind, wrap, triton)
    addends = [] if addend is None else [addend]
    picture: Tensor = op.low_pass_expand(like, coarse, gain, addends, [1.0] * len(addends), cutoff, kind, wrap, triton)
    return picture


def check_picture(name: str, x: Tensor) -> None:
    """Check the shape and dtype of a picture; raises ValueError or TypeError."""
    packed = x.ndim == 6 and x.shape[3] == x.shape[5]
    if (x.ndim != 4 and not packed) or 0 in x.shape:
        raise ValueError(f"{name} must be [B, C, Y, X], or [B, C, Y / P, P, X / P, P], with no empty axis, got {tuple(x.shape)=}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{name} must be floating point (fp16, bf16, fp32 or fp64), got {x.dtype=}")
