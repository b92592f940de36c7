"""The producer of the warp-specialised kernel: one warp that issues all loads.

Legend: B batch, H query heads, G key heads, Y x X token grid, T text tokens, D head dim, M x N query x key block of a consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from scalediff_kernels.neighborhood.hopper.places import key_place, place, text_token, window_start

_async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the second is the name in Triton before 3.8


@gluon.jit
def _load_block(desc, text_desc, ring, full, empty, n, j, start_y, start_x, batch, head, sizes, C: gl.constexpr):
    """Load block j of a window, of keys or of values, into the buffer of block n, once that is empty."""
    N: gl.constexpr = C.n
    BLOCK_D: gl.constexpr = C.block_d
    stage = n % C.stages
    y, x, _, _ = key_place(gl.maximum(j - sizes.text_blocks, 0), C)
    mbarrier.wait(empty.index(stage), n // C.stages & 1 ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    if C.has_text:  # a constant, which cannot be joined with the condition below
        if j < sizes.text_blocks:
            text_place = [batch, text_token(j, sizes, C), head, 0]
            _async_load(text_desc, text_place, full.index(stage), ring.index(stage).reshape([1, N, 1, BLOCK_D]))
        else:
            _async_load(desc, [batch, start_y + y, start_x + x, head, 0], full.index(stage), ring.index(stage))
    else:
        _async_load(desc, [batch, start_y + y, start_x + x, head, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _load_queries(desc, buffers, bars, tiles, batch, y, x, head, C: gl.constexpr):
    """Load the queries of a tile, for each consumer once it has stored the result of the tile before."""
    CONSUMERS: gl.constexpr = C.consumers
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.wait(bars.q_empty.index(consumer), tiles & 1 ^ 1)
        mbarrier.expect(bars.q_full.index(consumer), desc.block_type.nbytes)
        if C.text_queries:
            first_query = [batch, y + consumer * C.split[1], head, 0]
        else:
            first_query = [batch, y + consumer * C.split[0], x + consumer * C.split[1], head, 0]
        _async_load(desc, first_query, bars.q_full.index(consumer), buffers.q.index(consumer))


@gluon.jit
def produce(descs, buffers, bars, sizes, C: gl.constexpr):
    """The producer: load what the consumers need, as soon as there is an empty buffer for it.

    Keys are loaded one block ahead of values, because consumers release them earlier. The queries of a tile come after its first blocks:
    their buffer holds the result of the tile before until that is stored.
    """
    n = 0  # blocks so far
    tiles = 0  # tiles so far
    for tile in range(gl.program_id(0), sizes.tiles, gl.num_programs(0)):
        batch, head, y, x, first, last, begin, end = place(tile, sizes, C)
        group = head // C.group
        for window in range(first, last):
            start_y, start_x = window_start(window, sizes, C)
            _load_block(descs.k, descs.text_k, buffers.k, bars.k_full, bars.k_empty, n, begin, start_y, start_x, batch, group, sizes, C)
            for j in range(begin, end):
                if j + 1 < end:
                    _load_block(
                        descs.k, descs.text_k, buffers.k, bars.k_full, bars.k_empty, n + 1, j + 1, start_y, start_x, batch, group, sizes, C
                    )
                _load_block(descs.v, descs.text_v, buffers.v, bars.v_full, bars.v_empty, n, j, start_y, start_x, batch, group, sizes, C)
                if (window == first) & (j == begin):
                    _load_queries(descs.q, buffers, bars, tiles, batch, y, x, head, C)
                n += 1
        tiles += 1
