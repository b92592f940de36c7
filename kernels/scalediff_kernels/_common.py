"""Device functions of several kernels: loading tokens, one step of the online softmax, and rotation.

Strides are in units of VECTOR elements, which tells the compiler that it can load 16 bytes at a time.

Legend: B batch, H heads, Y x X token grid, T text tokens, D head dim, M x N query x key block.
"""

import triton
import triton.language as tl

VECTOR = tl.constexpr(8)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(
    b_q,  # [M, D]
    b_k,  # [N, D]
    b_v,  # [N, D]
    keep,  # [N], read where MASKED
    top,  # [M], running maximum, in units of log2
    total,  # [M], running sum
    acc,  # [M, D]
    scale,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Process one block of keys by the online softmax. `scale` includes log2(e). fp32, with the weights rounded to v's dtype."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
    else:  # the maximum of the scaled scores is the scaled maximum, scale >= 0: one fused multiply-add an element
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _load_rows(ptrs, m_n, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load `[N, BLOCK_D]`; zero above D and, if MASKED, outside of `m_n`."""
    if MASKED and D == BLOCK_D:
        return tl.load(ptrs, mask=m_n[:, None], other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=m_n[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def load_box(
    ref, strides, batch, y, x, head, limit_y, limit_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BOXES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load `[ROWS * COLUMNS, BLOCK_D]` of one head at (y, x); zero above D and, if MASKED, outside `[0, limit)`."""
    if BOXES:
        return ref.load([batch, y, x, head, 0]).reshape(ROWS * COLUMNS, BLOCK_D)
    else:
        offs_y = tl.arange(0, ROWS * COLUMNS) // COLUMNS
        offs_x = tl.arange(0, ROWS * COLUMNS) % COLUMNS
        offs_d = tl.arange(0, BLOCK_D)
        place = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3] + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
        offs = offs_y.to(tl.int64) * strides[1] + offs_x.to(tl.int64) * strides[2]
        ptrs = ref + place * VECTOR + (offs * VECTOR)[:, None] + offs_d[None, :]
        m_n = (y + offs_y >= 0) & (y + offs_y < limit_y) & (x + offs_x >= 0) & (x + offs_x < limit_x)
        return _load_rows(ptrs, m_n, offs_d, D, BLOCK_D, MASKED)


@triton.jit
def around(token, length, WRAP: tl.constexpr):
    """Tokens of an axis that continues on the other side, from `[-length, 2 length)` to `[0, length)`; unchanged if it does not."""
    if WRAP:
        token = tl.where(token < 0, token + length, token)
        token = tl.where(token >= length, token - length, token)
    return token


@triton.jit
def load_box_around(
    ref, strides, batch, y, x, head, limit_y, limit_x, grid_y, grid_x,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WRAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As `load_box` by addresses, of a grid whose axes continue on the other side where WRAP. There, a box may begin before token 0."""
    offs_y = y + tl.arange(0, ROWS * COLUMNS) // COLUMNS
    offs_x = x + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    offs_d = tl.arange(0, BLOCK_D)
    m_n = (offs_y < limit_y) & (offs_x < limit_x) & (WRAP[0] | (offs_y >= 0)) & (WRAP[1] | (offs_x >= 0))
    place = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    offs = around(offs_y, grid_y, WRAP[0]).to(tl.int64) * strides[1] + around(offs_x, grid_x, WRAP[1]).to(tl.int64) * strides[2]
    ptrs = ref + place * VECTOR + (offs * VECTOR)[:, None] + offs_d[None, :]
    return _load_rows(ptrs, m_n, offs_d, D, BLOCK_D, MASKED)


@triton.jit
def load_text(
    ref, strides, batch, t, head, text,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """Load `[N, BLOCK_D]` of one head, from text token t on; zero after the text and above D."""
    if BOXES:
        return ref.load([batch, t, head, 0]).reshape(N, BLOCK_D)
    else:
        offs_t = t + tl.arange(0, N)
        offs_d = tl.arange(0, BLOCK_D)
        place = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
        ptrs = ref + place * VECTOR + (offs_t.to(tl.int64) * strides[1] * VECTOR)[:, None] + offs_d[None, :]
        if D == BLOCK_D:
            return tl.load(ptrs, mask=(offs_t < text)[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=(offs_t < text)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def rotate(b_q, cos_ptr, sin_ptr, window, INVERSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate adjacent channel pairs of `[M, D]` by the angles of one window, or by minus these angles if INVERSE."""
    offs = tl.arange(0, BLOCK_D // 2)
    cos = tl.load(cos_ptr + window * (D // 2) + offs, mask=offs < D // 2, other=1.0)[None, :]
    sin = tl.load(sin_ptr + window * (D // 2) + offs, mask=offs < D // 2, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    even, odd = tl.split(b_q.to(tl.float32).reshape(b_q.shape[0], BLOCK_D // 2, 2))
    return tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(b_q.shape[0], BLOCK_D).to(b_q.dtype)
