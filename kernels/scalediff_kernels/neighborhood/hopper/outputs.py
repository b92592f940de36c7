"""Device functions that store results: of image queries, and the sums of text queries.

Legend: B batch, H query heads, G key heads, Y x X token grid, T text tokens, D head dim, M x N query x key block of a consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from scalediff_kernels._common import LN_2, VECTOR

_async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # the second is the name in Triton before 3.8


@gluon.jit
def store_sums(outputs, b_out, top, total, tile, add, CONSUMER: gl.constexpr, C: gl.constexpr):
    """Add the result of a window to the sums of a tile, in memory: each element belongs to one thread.

    Of a part of the keys of one window: store the result and its log-sum-exp.
    """
    M: gl.constexpr = C.m
    BLOCK_D: gl.constexpr = C.block_d
    LAYOUT: gl.constexpr = C.out_layout
    rows = gl.cast(tile, gl.int64) * (C.consumers * M) + CONSUMER * M
    offs_m = gl.arange(0, M, layout=gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    ptrs = outputs.sums + rows * BLOCK_D + gl.expand_dims(offs_m * BLOCK_D, 1) + gl.expand_dims(offs_d, 0)
    if C.lse:  # there is one window
        gl.store(ptrs, b_out)
        gl.store(outputs.lse + rows + gl.arange(0, M, layout=top.type.layout), top + gl.log2(total))
    else:
        b_sum = gl.load(ptrs, mask=gl.full([M, BLOCK_D], 0, gl.int32, LAYOUT) < add, other=0.0)
        gl.store(ptrs, b_sum + b_out)


@gluon.jit
def store_image(outputs, smem, b_out, top, total, batch, y, x, head, window, sizes, CONSUMER: gl.constexpr, C: gl.constexpr):
    """Store the result by way of the queries' buffer, which is not needed any more."""
    M: gl.constexpr = C.m
    BLOCK_D: gl.constexpr = C.block_d
    COLUMNS: gl.constexpr = C.consumer_box[1]
    WIDE: gl.constexpr = C.wide_layout
    y += CONSUMER * C.split[0]
    x += CONSUMER * C.split[1]
    stop_y = gl.minimum((window // sizes.patches_x + 1) * C.patch[0] - sizes.offset_y, sizes.grid_y)
    stop_x = gl.minimum((window % sizes.patches_x + 1) * C.patch[1] - sizes.offset_x, sizes.grid_x)
    rows = smem.reshape([M, BLOCK_D])
    rows.store(b_out.to(smem.dtype))
    fence_async_shared()  # before the store, and before the load of the next tile's queries
    if C.store_boxes:  # no tile exceeds its patch; the store clips it at the grid
        _async_store(outputs.image, [batch, y, x, head, 0], smem)
        tma.store_wait(0)
    else:
        offs_m = gl.arange(0, M, layout=gl.SliceLayout(1, WIDE))
        offs_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, WIDE))
        offs_y = y + offs_m // COLUMNS
        offs_x = x + offs_m % COLUMNS
        m_m = (offs_y >= 0) & (offs_y < stop_y) & (offs_x >= 0) & (offs_x < stop_x)
        place = gl.cast(batch, gl.int64) * outputs.strides[0] + gl.cast(head, gl.int64) * outputs.strides[3]
        offs = offs_y.to(gl.int64) * outputs.strides[1] + offs_x.to(gl.int64) * outputs.strides[2]
        ptrs = outputs.image + place * VECTOR + gl.expand_dims(offs * VECTOR, 1) + gl.expand_dims(offs_d, 0)
        gl.store(ptrs, rows.load(WIDE), mask=gl.expand_dims(m_m, 1) & gl.expand_dims(offs_d < C.head_dim, 0))
    if C.lse:
        offs_m = gl.arange(0, M, layout=top.type.layout)
        offs_y = y + offs_m // COLUMNS
        offs_x = x + offs_m % COLUMNS
        m_m = (offs_y >= 0) & (offs_y < stop_y) & (offs_x >= 0) & (offs_x < stop_x)
        token = (gl.cast(batch, gl.int64) * sizes.grid_y + offs_y) * sizes.grid_x + offs_x
        gl.store(outputs.lse + token * sizes.heads + head, (top + gl.log2(total)) * LN_2, mask=m_m)
