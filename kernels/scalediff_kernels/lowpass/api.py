"""Low-pass filtering, latent frequency mixing and structure guidance: what users call.

Every filter is linear and separable, `LP(x) = A_y x A_x^T`, with DC gain 1, and factors into a way down to a small grid and a way up.

Legend: B batch, C channels, Y x X grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from scalediff_kernels._launch import DTYPES, device_refusal, has_triton
from scalediff_kernels.lowpass import op
from scalediff_kernels.lowpass.geometry import Kind, coarse_length
from scalediff_kernels.lowpass.reference import low_pass_reference

Impl = Literal["auto", "reference", "matmul", "triton"]


def low_pass(x: Tensor, *, cutoff: float, kind: Kind = "resize", impl: Impl = "auto") -> Tensor:
    """Keep the low frequencies of a picture.

    Args:
        x: `[B, C, Y, X]` of any strides, or a view of packed latents, `[B, C, Y / P, P, X / P, P]` (`packed_view`). fp16, bf16, fp32
            or fp64; filtered in fp32, or in fp64 if it is fp64.
        cutoff: Kept fraction of the Nyquist frequency, in (0, 1]; the paper takes 0.125 for SDXL, 0.25 for FLUX.
        kind: `"resize"` is the paper's: antialiased bilinear down to `int(length * cutoff)` pixels, bilinear up.
            `"gaussian"`, `2^-(f / cutoff)^2`, and `"butterworth"`, `1 / (1 + (f / cutoff)^8)`, are gains per axis at
            frequency f, mirrored at the border; below 1e-4 they are zero.
        impl: `"triton"` is one kernel down and one up, `"matmul"` the same matrices through torch on any device, `"reference"`
            the definition through `F.interpolate` or the Fourier transform. `"auto"` takes the kernel for fp16, bf16 and fp32 on a GPU,
            the reference where gradients are required, else matmul.

    Returns:
        A picture of the shape and dtype of x, and of its strides where it is dense.

    Raises:
        ValueError: the cutoff is outside (0, 1] or leaves no coarse pixel, or x has another shape; unknown kind or impl.
        TypeError: x is of another dtype.
        NotImplementedError: a named implementation that cannot run here, or not with gradients.

    ScaleDiff, arXiv:2510.25818.
    """
    check_picture("x", x)
    return _apply([x], [1.0], addend=None, gain=1.0, cutoff=cutoff, kind=kind, impl=impl)


def mix_frequencies(high: Tensor, low: Tensor, *, cutoff: float, kind: Kind = "resize", impl: Impl = "auto") -> Tensor:
    """Latent frequency mixing: the high band of one picture with the low band of another, `high + LP(low - high)`.

    Args:
        high: As x in `low_pass`: the upsampled-in-RGB latent in the paper.
        low: The same shape, dtype and device; the latent upsampled as it is.
        cutoff, kind, impl: As in `low_pass`.

    Returns:
        A picture like high; summed in fp32 (fp64), rounded once.

    Raises:
        ValueError, TypeError, NotImplementedError: as `low_pass`; high and low disagree.

    ScaleDiff, arXiv:2510.25818.
    """
    check_same("high", high, "low", low)
    return _apply([low, high], [1.0, -1.0], addend=high, gain=1.0, cutoff=cutoff, kind=kind, impl=impl)


def guide_structure(x0: Tensor, reference: Tensor, *, gamma: float, cutoff: float, kind: Kind = "resize", impl: Impl = "auto") -> Tensor:
    """Structure guidance: draw the low band of a denoised estimate to a reference, `x0 + gamma (LP(reference) - LP(x0))`.

    In a sampling loop `GuidedStep` does the same to the model output, with the reference's coarse grid computed once.

    Args:
        x0: As x in `low_pass`: the estimate of the clean latent at this step.
        reference: The same shape, dtype and device.
        gamma: Strength, finite; 0 leaves x0 as it is, 1 replaces its low band (to the filter's own roll-off).
        cutoff, kind, impl: As in `low_pass`.

    Returns:
        A picture like x0; summed in fp32 (fp64), rounded once.

    Raises:
        ValueError, TypeError, NotImplementedError: as `low_pass`; x0 and reference disagree, or gamma is not finite.

    ScaleDiff, arXiv:2510.25818.
    """
    check_same("x0", x0, "reference", reference)
    check_gamma(gamma)
    return _apply([reference, x0], [1.0, -1.0], addend=x0, gain=gamma, cutoff=cutoff, kind=kind, impl=impl)


def packed_view(tokens: Tensor, *, grid: tuple[int, int], patch: int = 2) -> Tensor:
    """See packed latents (FLUX) as a picture, without a copy.

    Args:
        tokens: `[B, N, C * patch^2]` with N = the product of `grid`; token (i, j) holds, per channel, the patch's pixels row by row.
        grid: Tokens, `(Y / patch, X / patch)`.
        patch: Pixels of a token along an axis.

    Returns:
        A view `[B, C, Y / patch, patch, X / patch, patch]`, a picture for every function here.

    Raises:
        ValueError: the shape does not fit the grid and patch, or these are not positive.
    """
    if min(*grid, patch) < 1:
        raise ValueError(f"grid and patch must be positive, got {grid=} and {patch=}")
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or tokens.shape[2] % patch**2:
        raise ValueError(f"tokens must be [B, {grid[0] * grid[1]}, C * {patch**2}] for {grid=} and {patch=}, got {tuple(tokens.shape)=}")
    view: Tensor = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
    return view


def check_same(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    """Refuse two pictures of different shape, dtype or device."""
    check_picture(a_name, a)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            f"{a_name} and {b_name} must agree in shape, dtype and device, "
            f"got {tuple(a.shape)} {a.dtype} {a.device} and {tuple(b.shape)} {b.dtype} {b.device}"
        )


def check_gamma(gamma: float) -> None:
    if not -math.inf < gamma < math.inf:  # torch.compile traces comparisons, not math.isfinite
        raise ValueError(f"gamma must be finite, got {gamma=}")


def choose(impl: str, tensors: Sequence[Tensor]) -> str:
    """The implementation that runs; refuses a named one that cannot."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl=}")
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    gradients = forward_mode or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    if gradients and impl in ("matmul", "triton"):
        raise NotImplementedError(f"{impl=} has no derivative and one is wanted: use torch.no_grad() or impl='auto'")
    refused = "the kernel takes fp16, bf16 and fp32" if any(x.dtype not in DTYPES for x in tensors) else device_refusal(tensors[0].device)
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
    impl: Impl,
) -> Tensor:
    """`addend + gain LP(sum weights * inputs)`, like the last input."""
    like = inputs[-1]
    for length in op.picture_size(like):
        coarse_length(length, cutoff, kind)
    chosen = choose(impl, inputs)
    if chosen == "reference":
        terms = [w * op.flat(x).to(torch.promote_types(x.dtype, torch.float32)) for x, w in zip(inputs, weights, strict=True)]
        out = gain * low_pass_reference(sum(terms[1:], terms[0]), cutoff=cutoff, kind=kind)
        out = out if addend is None else op.flat(addend) + out
        return torch.empty_like(like).copy_(out.reshape(like.shape))
    triton = chosen == "triton"
    coarse = op.low_pass_coarse(inputs, weights, None, cutoff, kind, triton)
    addends = [] if addend is None else [addend]
    picture: Tensor = op.low_pass_expand(like, coarse, gain, addends, [1.0] * len(addends), cutoff, kind, triton)
    return picture


def check_picture(name: str, x: Tensor) -> None:
    """Refuse what is no picture."""
    packed = x.ndim == 6 and x.shape[3] == x.shape[5]
    if (x.ndim != 4 and not packed) or 0 in x.shape:
        raise ValueError(f"{name} must be [B, C, Y, X], or [B, C, Y / P, P, X / P, P], with no empty axis, got {tuple(x.shape)=}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{name} must be floating point (fp16, bf16, fp32 or fp64), got {x.dtype=}")
