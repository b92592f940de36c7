"""A separable linear map in one pass: `out = sum_i b_i B_i + W_y (sum_i a_i A_i) W_x^T`.

For the reduction, W is `down` and the A are pictures; pixels that two tiles need are read by both. For the expansion, W is `up`, the only A
is the coarse grid, and the B and the result are pictures. A factor is given as tiles of rows, each with the columns that it reads, so a
program multiplies small dense matrices: fp32 by three TF32 products (exact fp32 on AMD). No intermediate picture or Fourier transform is
stored.

Every axis of a picture may have any stride. Packed latents are pictures too: pixel y = PACK * i + j of an axis is at
`i * outer + j * inner`. Offsets within a sample are 32-bit unless WIDE. A program processes several channels if channels, not columns, are
adjacent in memory.

Legend: B batch, C channels, Y x X pixels in, M rows x columns of an output tile, K pixels of a step, S span.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _offsets(strides, offs_c, offs_y, offs_x, PACK: tl.constexpr, WIDE: tl.constexpr):
    """Offsets `[Y, C, X]` in elements within a sample, from the strides of batch, channel, outer and inner row, outer and inner column."""
    if WIDE:
        offs_c, offs_y, offs_x = offs_c.to(tl.int64), offs_y.to(tl.int64), offs_x.to(tl.int64)
    y = offs_y // PACK * strides[2] + offs_y % PACK * strides[3]
    x = offs_x // PACK * strides[4] + offs_x % PACK * strides[5]
    return y[:, None, None] + (offs_c * strides[1])[None, :, None] + x[None, None, :]


@triton.jit
def _load(ref, strides, batch, offs_c, offs_y, offs_x, mask, PACK: tl.constexpr, WIDE: tl.constexpr):
    """Load `[Y, C, X]` of a picture in fp32, zero outside the mask."""
    ptrs = ref + batch.to(tl.int64) * strides[0] + _offsets(strides, offs_c, offs_y, offs_x, PACK, WIDE)
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weighted_sum(
    refs, weights, strides, batch, offs_c, offs_y, offs_x, mask, COUNT: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """`sum_i weights_i refs_i`, `[Y, C, X]` in fp32, zero outside the mask; one to three pictures."""
    b_sum = _load(refs[0], strides[0], batch, offs_c, offs_y, offs_x, mask, PACK, WIDE) * weights[0]
    if COUNT > 1:
        b_sum += _load(refs[1], strides[1], batch, offs_c, offs_y, offs_x, mask, PACK, WIDE) * weights[1]
    if COUNT > 2:
        b_sum += _load(refs[2], strides[2], batch, offs_c, offs_y, offs_x, mask, PACK, WIDE) * weights[2]
    return b_sum


@triton.jit
def separable_kernel(
    out_ptr,  # [B, C, rows_y, rows_x]
    inputs,  # COUNT times [B, C, Y, X]
    addends,  # ADDENDS times [B, C, rows_y, rows_x]
    starts_y_ptr,  # [tiles_y]
    weights_y_ptr,  # [tiles_y, TILE_Y, span_y]
    starts_x_ptr,  # [tiles_x]
    weights_x_ptr,  # [tiles_x, TILE_X, span_x]
    input_weights, addend_weights, out_strides, input_strides, addend_strides,
    channels, length_y, length_x, rows_y, rows_x, tiles_y, tiles_x, span_y, span_x,
    COUNT: tl.constexpr, ADDENDS: tl.constexpr, PACK: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    CHANNELS: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, ALIGN_X: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the result for CHANNELS channels.

    Consecutive programs are neighbours along x, then along y, channels and batch, so that programs that run at the same time share pixels.
    """
    pid = tl.program_id(0)
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    tile_y = pid % tiles_y
    pid = pid // tiles_y
    channel_tiles = tl.cdiv(channels, CHANNELS)
    offs_c = pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    batch = pid // channel_tiles
    start_y = tl.load(starts_y_ptr + tile_y)
    start_x = tl.multiple_of(tl.load(starts_x_ptr + tile_x), ALIGN_X)
    weights_y_ptr += tile_y.to(tl.int64) * TILE_Y * span_y
    weights_x_ptr += tile_x.to(tl.int64) * TILE_X * span_x
    offs_my, offs_mx = tl.arange(0, TILE_Y), tl.arange(0, TILE_X)

    out_y, out_x = tile_y * TILE_Y + offs_my, tile_x * TILE_X + offs_mx
    m_out = (out_y < rows_y)[:, None, None] & (offs_c < channels)[None, :, None] & (out_x < rows_x)[None, None, :]
    if ADDENDS > 0:  # loaded early, while the products are computed
        b_add = _weighted_sum(addends, addend_weights, addend_strides, batch, offs_c, out_y, out_x, m_out, ADDENDS, PACK, WIDE)

    acc = tl.zeros([TILE_Y * CHANNELS, TILE_X], tl.float32)
    for step_x in tl.range(0, span_x, STEP_X, num_stages=1):
        offs_x = start_x + step_x + tl.arange(0, STEP_X)
        acc_rows = tl.zeros([TILE_Y, CHANNELS * STEP_X], tl.float32)
        for step_y in tl.range(0, span_y, STEP_Y, num_stages=STAGES):
            offs_ky = step_y + tl.arange(0, STEP_Y)
            offs_y = start_y + offs_ky
            mask = (offs_y < length_y)[:, None, None] & (offs_c < channels)[None, :, None] & (offs_x < length_x)[None, None, :]
            b_in = _weighted_sum(inputs, input_weights, input_strides, batch, offs_c, offs_y, offs_x, mask, COUNT, PACK, WIDE)
            b_wy = tl.load(weights_y_ptr + offs_my[:, None] * span_y + offs_ky[None, :])  # [TILE_Y, STEP_Y]
            acc_rows = tl.dot(b_wy, b_in.reshape(STEP_Y, CHANNELS * STEP_X), acc_rows, input_precision=PRECISION)
        offs_kx = step_x + tl.arange(0, STEP_X)
        b_wx = tl.load(weights_x_ptr + offs_mx[None, :] * span_x + offs_kx[:, None])  # [STEP_X, TILE_X]
        acc = tl.dot(acc_rows.reshape(TILE_Y * CHANNELS, STEP_X), b_wx, acc, input_precision=PRECISION)

    b_out = acc.reshape(TILE_Y, CHANNELS, TILE_X)
    if ADDENDS > 0:
        b_out += b_add
    out_ptr += batch.to(tl.int64) * out_strides[0]
    tl.store(out_ptr + _offsets(out_strides, offs_c, out_y, out_x, PACK, WIDE), b_out.to(out_ptr.dtype.element_ty), mask=m_out)
