"""The producer of the warp-specialised kernel: one warp that issues all loads.

Legend: B batch, H query heads, G key heads, Y x X token grid, T text tokens, D head dim, M x N query x key block of a consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from scalediff_kernels.neighborhood.hopper.places import key_place, place, text_token, window_start

_async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the second is the name in Triton before 3.8


@gluon.jit
def _load_block(desc, text_desc, smem, full, batch, head, token, y, x, C: gl.constexpr):
    """Load a block of keys or values: of the text from `token` on, or of the grid if that is negative."""
    N: gl.constexpr = C.n
    BLOCK_D: gl.constexpr = C.block_d
    mbarrier.expect(full, desc.block_type.nbytes)
    if C.has_text:
        if token >= 0:
            _async_load(text_desc, [batch, token, head, 0], full, smem.reshape([1, N, 1, BLOCK_D]))
        else:
            _async_load(desc, [batch, y, x, head, 0], full, smem)
    else:
        _async_load(desc, [batch, y, x, head, 0], full, smem)


@gluon.jit
def produce(descs, buffers, bars, sizes, C: gl.constexpr):
    """The producer: load what the consumers need, as soon as there is an empty buffer for it."""
    CONSUMERS: gl.constexpr = C.consumers
    n = 0  # blocks so far
    turn = 0  # tiles so far
    for tile in range(gl.program_id(0), sizes.tiles, gl.num_programs(0)):
        batch, head, y, x, first, last, begin, end = place(tile, sizes, C)
        group = head // C.group
        for window in range(first, last):
            start_y, start_x = window_start(window, sizes, C)
            for j in range(begin, end):
                stage = n % C.stages
                phase = n // C.stages & 1
                key_y, key_x, _, _ = key_place(gl.maximum(j - sizes.text_blocks, 0), C)
                key_y += start_y
                key_x += start_x
                token = text_token(j, sizes, C)
                mbarrier.wait(bars.k_empty.index(stage), phase ^ 1)
                _load_block(descs.k, descs.text_k, buffers.k.index(stage), bars.k_full.index(stage), batch, group, token, key_y, key_x, C)
                if (window == first) & (j == begin):  # after the first keys, which need not wait for the end of the tile before
                    for part in gl.static_range(CONSUMERS):
                        mbarrier.wait(bars.q_empty.index(part), turn & 1 ^ 1)
                        mbarrier.expect(bars.q_full.index(part), descs.q.block_type.nbytes)
                        if C.text_queries:
                            first_query = [batch, y + part * C.split[1], head, 0]
                        else:
                            first_query = [batch, y + part * C.split[0], x + part * C.split[1], head, 0]
                        _async_load(descs.q, first_query, bars.q_full.index(part), buffers.q.index(part))
                mbarrier.wait(bars.v_empty.index(stage), phase ^ 1)
                _load_block(descs.v, descs.text_v, buffers.v.index(stage), bars.v_full.index(stage), batch, group, token, key_y, key_x, C)
                n += 1
        turn += 1
