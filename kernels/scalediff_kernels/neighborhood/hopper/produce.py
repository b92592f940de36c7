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
def produce(descs, buffers, barriers, sizes, C: gl.constexpr):
    """The producer: load what the consumers need, as soon as there is an empty buffer for it."""
    CONSUMERS: gl.constexpr = C.consumers
    q_desc, k_desc, v_desc, text_k_desc, text_v_desc = descs
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    tiles, _, _, _, _, grid_y, grid_x, patches_x, offset_y, offset_x, _, _, _, _, _, _, text_blocks = sizes
    n = 0  # blocks so far
    turn = 0  # tiles so far
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        batch, head, y, x, first, last, begin, end = place(tile, sizes, C)
        group = head // C.group
        for window in range(first, last):
            start_y = window_start(window // patches_x, grid_y, offset_y, C.patch[0], C.window[0])
            start_x = window_start(window % patches_x, grid_x, offset_x, C.patch[1], C.window[1])
            for j in range(begin, end):
                stage = n % C.stages
                phase = n // C.stages & 1
                key_y, key_x, _, _ = key_place(gl.maximum(j - text_blocks, 0), C)
                key_y += start_y
                key_x += start_x
                token = text_token(j, text_blocks, C)
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                _load_block(k_desc, text_k_desc, k_smem.index(stage), k_full.index(stage), batch, group, token, key_y, key_x, C)
                if (window == first) & (j == begin):  # after the first keys, which need not wait for the end of the tile before
                    for part in gl.static_range(CONSUMERS):
                        mbarrier.wait(q_empty.index(part), turn & 1 ^ 1)
                        mbarrier.expect(q_full.index(part), q_desc.block_type.nbytes)
                        if C.text_queries:
                            first_query = [batch, y + part * C.split[1], head, 0]
                        else:
                            first_query = [batch, y + part * C.split[0], x + part * C.split[1], head, 0]
                        _async_load(q_desc, first_query, q_full.index(part), q_smem.index(part))
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                _load_block(v_desc, text_v_desc, v_smem.index(stage), v_full.index(stage), batch, group, token, key_y, key_x, C)
                n += 1
        turn += 1
