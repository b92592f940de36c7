"""The reduction and the expansion of a filter as torch operators: `torch.ops.scalediff.low_pass_coarse` and `low_pass_expand`.

Each is one opaque operator, so that torch.compile keeps a single graph and FakeTensors know the shapes. Autocast does not change them.

Legend: B batch, C channels, Y x X pixels; pictures may be packed, `[B, C, Y / P, P, X / P, P]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from scalediff_kernels._launch import device_name, on
from scalediff_kernels._ops import add_op_namespace_prefix
from scalediff_kernels.lowpass.geometry import coarse_length
from scalediff_kernels.lowpass.matmul import Axes, accumulator, coarse_matmul, expand_matmul
from scalediff_kernels.lowpass.operators import LowPass


@torch.library.custom_op(add_op_namespace_prefix("low_pass_coarse"), mutates_args=())
def low_pass_coarse(
    inputs: Sequence[Tensor], weights: Sequence[float], offset: Tensor | None, cutoff: float, kind: str, wrap: Sequence[bool], triton: bool
) -> Tensor:
    """Compute `offset + D_y (sum weights * inputs) D_x^T`, `[B, C, m_y, m_x]` in fp32, or in fp64 for fp64 inputs."""
    axes = _axes(picture_size(inputs[0]), cutoff, kind, wrap)
    if not triton:
        with _without_autocast(inputs[0]):
            return coarse_matmul([flat(x) for x in inputs], weights, axes, offset)
    from scalediff_kernels.lowpass.launch import separable_launch

    out = torch.empty(*inputs[0].shape[:2], axes[0].coarse, axes[1].coarse, dtype=torch.float32, device=inputs[0].device)
    addends = () if offset is None else (offset,)
    with on(out.device):
        separable_launch(out, inputs, weights, axes, "down", addends, (1.0,) * len(addends), device=device_name(out.device)).run()
    return out


@low_pass_coarse.register_fake
def _(
    inputs: Sequence[Tensor], weights: Sequence[float], offset: Tensor | None, cutoff: float, kind: str, wrap: Sequence[bool], triton: bool
) -> Tensor:
    x = inputs[0]
    coarse = [coarse_length(n, cutoff, kind, wrap=on) for n, on in zip(picture_size(x), wrap, strict=True)]  # type: ignore[arg-type]
    return x.new_empty(x.shape[0], x.shape[1], *coarse, dtype=accumulator(x))


@torch.library.custom_op(add_op_namespace_prefix("low_pass_expand"), mutates_args=())
def low_pass_expand(
    like: Tensor,
    coarse: Tensor,
    gain: float,
    addends: Sequence[Tensor],
    weights: Sequence[float],
    cutoff: float,
    kind: str,
    wrap: Sequence[bool],
    triton: bool,
) -> Tensor:
    """Compute `sum weights * addends + gain U_y coarse U_x^T`, a new picture with the shape, strides and dtype of `like`."""
    out = torch.empty_like(like)
    expand = _launch_expand if triton else _matmul_expand
    expand(out, coarse, gain, _axes(picture_size(like), cutoff, kind, wrap), addends, weights)
    return out


@low_pass_expand.register_fake
def _(
    like: Tensor,
    coarse: Tensor,
    gain: float,
    addends: Sequence[Tensor],
    weights: Sequence[float],
    cutoff: float,
    kind: str,
    wrap: Sequence[bool],
    triton: bool,
) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op(add_op_namespace_prefix("low_pass_expand_"), mutates_args=("out",))
def low_pass_expand_(
    out: Tensor,
    weight: float,
    coarse: Tensor,
    gain: float,
    addends: Sequence[Tensor],
    weights: Sequence[float],
    cutoff: float,
    kind: str,
    wrap: Sequence[bool],
    triton: bool,
) -> None:
    """In place: `out <- weight * out + sum weights * addends + gain U_y coarse U_x^T`."""
    expand = _launch_expand if triton else _matmul_expand
    expand(out, coarse, gain, _axes(picture_size(out), cutoff, kind, wrap), [out, *addends], [weight, *weights])


def _launch_expand(out: Tensor, coarse: Tensor, gain: float, axes: Axes, addends: Sequence[Tensor], weights: Sequence[float]) -> None:
    from scalediff_kernels.lowpass.launch import separable_launch

    with on(out.device):
        separable_launch(out, [coarse], [gain], axes, "up", addends, weights, device=device_name(out.device)).run()


def _matmul_expand(out: Tensor, coarse: Tensor, gain: float, axes: Axes, addends: Sequence[Tensor], weights: Sequence[float]) -> None:
    picture = out if out.ndim == 4 else torch.empty_like(flat(out))
    with _without_autocast(out):
        expand_matmul(picture, coarse, gain, axes, [flat(x) for x in addends], weights)
    if picture is not out:
        out.copy_(picture.view(out.shape))


def flat(x: Tensor) -> Tensor:
    """A picture as `[B, C, Y, X]`; a copy if it is packed."""
    return x.reshape(*x.shape[:2], *picture_size(x))


def picture_size(x: Tensor) -> tuple[int, int]:
    """Size (Y, X) of a picture, packed or not."""
    return (x.shape[2] * x.shape[3], x.shape[4] * x.shape[5]) if x.ndim == 6 else (x.shape[2], x.shape[3])


def _axes(size: tuple[int, int], cutoff: float, kind: str, wrap: Sequence[bool]) -> Axes:
    y, x = (LowPass(n, cutoff, kind, bool(on)) for n, on in zip(size, wrap, strict=True))  # type: ignore[arg-type]
    return y, x


def _without_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
