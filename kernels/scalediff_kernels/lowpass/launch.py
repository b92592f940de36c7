"""Kernel launches of the filters: strides, tiles of the factors, and the number of programs.

Legend: B batch, C channels, Y x X pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from scalediff_kernels._launch import Launch
from scalediff_kernels.lowpass.config import LaunchConfig, Problem, launch_config
from scalediff_kernels.lowpass.kernel import separable_kernel
from scalediff_kernels.lowpass.matmul import is_channels_last
from scalediff_kernels.lowpass.operators import LowPass, Side, band

ALIGN = 16  # tiles start at a multiple of this many columns, for aligned loads


def separable_launch(
    out: Tensor,
    inputs: Sequence[Tensor],
    input_weights: Sequence[float],
    axes: tuple[LowPass, LowPass],
    side: Side,
    addends: Sequence[Tensor] = (),
    addend_weights: Sequence[float] = (),
    *,
    device: str,
    config: LaunchConfig | None = None,
) -> Launch:
    """The launch of `out = sum addends + W_y (sum inputs) W_x^T`, with weighted sums; W is the factor `side` of each axis.

    Pictures are `[B, C, Y, X]`, or `[B, C, Y / P, P, X / P, P]` with the same P for all. `out` is dense, and may share memory with an
    addend. `config` replaces the configuration of the table, for tuning.
    """
    batch, channels = out.shape[:2]
    coarse, length = (axes[0].coarse, axes[1].coarse), (axes[0].length, axes[1].length)
    rows, columns = (coarse, length) if side == "down" else (length, coarse)
    pictures = out if side == "up" else inputs[0]
    pack = max(x.shape[3] if x.ndim == 6 else 1 for x in (out, *inputs, *addends))
    scattered = pack > 1 or pictures.stride(-2) % ALIGN != 0
    dense = any(axis.kind != "resize" or axis.wrap for axis in axes)
    problem = Problem(rows, columns, pictures.element_size(), batch * channels, channels, is_channels_last(pictures), scattered, dense)
    config = config or launch_config(problem, device)
    bands = [
        band(axis, side, out.device, torch.float32, rows=n, block=step, align=align)
        for axis, n, step, align in zip(axes, config.tile, config.steps, (1, ALIGN), strict=True)
    ]
    tiles = tuple(-(-n // t) for n, t in zip(rows, config.tile, strict=True))
    arguments: dict[str, Any] = {
        "out_ptr": out,
        "inputs": tuple(inputs),
        "addends": tuple(addends),
        "starts_y_ptr": bands[0].starts,
        "weights_y_ptr": bands[0].weights,
        "starts_x_ptr": bands[1].starts,
        "weights_x_ptr": bands[1].weights,
        "input_weights": tuple(map(float, input_weights)),
        "addend_weights": tuple(map(float, addend_weights)),
        "out_strides": _strides(out, pack),
        "input_strides": tuple(_strides(x, pack) for x in inputs),
        "addend_strides": tuple(_strides(x, pack) for x in addends),
        "channels": channels,
        "length_y": columns[0],
        "length_x": columns[1],
        "rows_y": rows[0],
        "rows_x": rows[1],
        "tiles_y": tiles[0],
        "tiles_x": tiles[1],
        "COUNT": len(inputs),
        "ADDENDS": len(addends),
        "PACK": pack,
        "TILE_Y": config.tile[0],
        "TILE_X": config.tile[1],
        "CHANNELS": config.channels,
        "span_y": bands[0].span,
        "span_x": bands[1].span,
        "STEP_Y": config.steps[0],
        "STEP_X": config.steps[1],
        "ALIGN_X": ALIGN,
        "PRECISION": config.precision,
        "STAGES": config.num_stages,
        "WIDE": any(_reach(x) >= 2**31 for x in (out, *inputs, *addends)),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(separable_kernel, batch * -(-channels // config.channels) * prod(tiles), arguments, config)


def _strides(x: Tensor, pack: int) -> tuple[int, ...]:
    """Strides of batch, channel, outer and inner row, outer and inner column. Those of axes with one element do not matter."""
    if x.ndim == 6:
        return x.stride()
    b, c, y, column = x.stride()
    return b, c, pack * y, y, pack * column, column


def _reach(x: Tensor) -> int:
    """The largest offset within one batch, in elements."""
    return sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
