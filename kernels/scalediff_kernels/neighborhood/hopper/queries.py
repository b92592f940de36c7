"""Device functions of the queries in shared memory: their rotation for text, and which of the two buffers a block needs.

Legend: T text tokens, D head dim, M x N query x key block of a consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared


@gluon.jit
def rotate(source, target, rotation, window, C: gl.constexpr):
    """Rotate adjacent channel pairs of queries `[M, BLOCK_D]` by the angles of a window; image queries by minus these angles."""
    M: gl.constexpr = C.m
    BLOCK_D: gl.constexpr = C.block_d
    WIDE: gl.constexpr = C.wide_layout
    cos_ptr, sin_ptr = rotation
    even, odd = gl.split(source.load(WIDE).to(gl.float32).reshape([M, BLOCK_D // 2, 2]))
    offs = gl.arange(0, BLOCK_D // 2, layout=gl.SliceLayout(0, even.type.layout))
    m_d = offs < C.head_dim // 2
    cos = gl.expand_dims(gl.load(cos_ptr + window * (C.head_dim // 2) + offs, mask=m_d, other=1.0), 0)
    sin = gl.expand_dims(gl.load(sin_ptr + window * (C.head_dim // 2) + offs, mask=m_d, other=0.0), 0)
    if not C.text_queries:
        sin = -sin
    target.store(gl.join(even * cos - odd * sin, odd * cos + even * sin).reshape([M, BLOCK_D]).to(target.dtype))
    fence_async_shared()


@gluon.jit
def queries_for(q_smem, is_text, CONSUMER: gl.constexpr, C: gl.constexpr):
    """The buffer of queries for a block: the rotated ones for text keys, or, of text queries, for image keys."""
    M: gl.constexpr = C.m
    BLOCK_D: gl.constexpr = C.block_d
    buffer = CONSUMER
    if C.rope:
        plain, rotated = CONSUMER, C.consumers + CONSUMER
        buffer = gl.where(is_text, plain, rotated) if C.text_queries else gl.where(is_text, rotated, plain)
    return q_smem.index(buffer).reshape([M, BLOCK_D])
