"""A consumer of the warp-specialised kernel: one warpgroup, which computes 64 query rows of every tile.

Legend: B batch, H query heads, G key heads, Y x X token grid, T text tokens, D head dim, M x N query x key block of a consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from scalediff_kernels.neighborhood.hopper.outputs import store_image, store_sums
from scalediff_kernels.neighborhood.hopper.places import key_place, place, text_token
from scalediff_kernels.neighborhood.hopper.queries import queries_for, rotate


@gluon.jit
def _scores(b_q, k_smem, C: gl.constexpr):
    """Issue the product of queries and keys."""
    M: gl.constexpr = C.m
    N: gl.constexpr = C.n
    BLOCK_D: gl.constexpr = C.block_d
    LAYOUT: gl.constexpr = C.scores_layout
    zero = gl.zeros([M, N], gl.float32, LAYOUT)
    return warpgroup_mma(b_q, k_smem.reshape([N, BLOCK_D]).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _mask(scores, j, sizes, C: gl.constexpr):
    """The scores of block j, with minus infinity at keys beyond the text and at keys that earlier boxes have."""
    N: gl.constexpr = C.n
    LAYOUT: gl.constexpr = C.scores_layout
    _, _, seen_y, seen_x = key_place(gl.maximum(j - sizes.text_blocks, 0), C)
    stop = gl.where(j < sizes.text_blocks, sizes.text - text_token(j, sizes, C), N)
    offs = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    keep = (offs // C.key_box[1] >= seen_y) & (offs % C.key_box[1] >= seen_x) & (offs < stop)
    return gl.where(gl.expand_dims(keep, 0), scores, float("-inf"))


@gluon.jit
def _softmax(scores, j, top, total, scale, sizes, MASKED: gl.constexpr, C: gl.constexpr):
    """One step of the online softmax: the weights of block j, and the factor of the sums so far. `scale` includes log2(e)."""
    if C.negate:
        scores = -scores
    if MASKED:
        scores = _mask(scores, j, sizes, C)
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)  # as scale > 0; the weights are one fused multiply-add an element
    weights = gl.exp2(scores * scale - gl.expand_dims(new_top, 1))
    shrink = gl.exp2(top - new_top)
    return new_top, total * shrink + gl.sum(weights, 1), shrink, weights


@gluon.jit
def _attend(n, taken, window, begin, end, buffers, bars, sizes, scale, CONSUMER: gl.constexpr, C: gl.constexpr):
    """Attend to the blocks of one window; `n` blocks and `taken` turns were before. Returns maxima, sums, result, and the new counts."""
    M: gl.constexpr = C.m
    N: gl.constexpr = C.n
    BLOCK_D: gl.constexpr = C.block_d
    STAGES: gl.constexpr = C.stages
    LAYOUT: gl.constexpr = C.out_layout
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    SCORES_ROWS: gl.constexpr = gl.SliceLayout(1, C.scores_layout)
    top = gl.full([M], float("-inf"), gl.float32, SCORES_ROWS)
    total = gl.full([M], 0.0, gl.float32, SCORES_ROWS)
    acc = gl.zeros([M, BLOCK_D], gl.float32, LAYOUT)

    stage = n % STAGES
    mbarrier.wait(bars.k_full.index(stage), n // STAGES & 1)
    scores = warpgroup_mma_wait(
        0, deps=[_scores(queries_for(buffers.q, begin < sizes.text_blocks, CONSUMER, C), buffers.k.index(stage), C)]
    )
    mbarrier.arrive(bars.k_empty.index(stage), count=1)
    top, total, shrink, weights = _softmax(scores, begin, top, total, scale, sizes, C.ragged_text or C.ragged_window, C)
    p = gl.convert_layout(weights.to(buffers.q.dtype), P_LAYOUT)
    mbarrier.wait(bars.k_full.index((n + 1) % STAGES), (n + 1) // STAGES & 1, pred=begin + 1 < end)
    for j in range(begin + 1, end):
        before, before_phase = stage, n // STAGES & 1
        n += 1
        stage = n % STAGES
        mbarrier.wait(bars.v_full.index(before), before_phase)
        if C.ping_pong:
            mbarrier.wait(bars.turns.index(CONSUMER), taken & 1)
            taken += 1
        next_scores = _scores(queries_for(buffers.q, j < sizes.text_blocks, CONSUMER, C), buffers.k.index(stage), C)
        next_acc = warpgroup_mma(p, buffers.v.index(before).reshape([N, BLOCK_D]), acc, is_async=True)
        if C.ping_pong:
            mbarrier.arrive(bars.turns.index(1 - CONSUMER), count=1)
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        mbarrier.arrive(bars.k_empty.index(stage), count=1)
        top, total, shrink, weights = _softmax(scores, j, top, total, scale, sizes, C.ragged_window, C)
        next_p = gl.convert_layout(weights.to(buffers.q.dtype), P_LAYOUT)
        # The wait for the next keys is a loop, over which ptxas moves nothing: so the softmax stays above the wait for P V.
        mbarrier.wait(bars.k_full.index((n + 1) % STAGES), (n + 1) // STAGES & 1, pred=j + 1 < end)
        acc, p = warpgroup_mma_wait(0, deps=[next_acc, next_p])
        mbarrier.arrive(bars.v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, ROWS), 1)
    mbarrier.wait(bars.v_full.index(stage), n // STAGES & 1)
    acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, buffers.v.index(stage).reshape([N, BLOCK_D]), acc, is_async=True)])
    mbarrier.arrive(bars.v_empty.index(stage), count=1)
    return top, total, acc / gl.expand_dims(gl.convert_layout(total, ROWS), 1), n + 1, taken


@gluon.jit
def consume(work, CONSUMER: gl.constexpr, C: gl.constexpr):
    """A consumer: compute the query rows CONSUMER of every tile."""
    M: gl.constexpr = C.m
    BLOCK_D: gl.constexpr = C.block_d
    buffers, bars, sizes, outputs, rotation, scale = work
    n = 0  # blocks so far
    tiles = 0  # tiles so far
    taken = 0  # turns at the tensor cores so far
    for tile in range(gl.program_id(0), sizes.tiles, gl.num_programs(0)):
        batch, head, y, x, first, last, begin, end = place(tile, sizes, C)
        mbarrier.wait(bars.q_full.index(CONSUMER), tiles & 1)
        for window in range(first, last):
            if C.rope:
                rotated = buffers.q.index(C.consumers + CONSUMER).reshape([M, BLOCK_D])
                rotate(buffers.q.index(CONSUMER).reshape([M, BLOCK_D]), rotated, rotation, window, C)
            top, total, b_out, n, taken = _attend(n, taken, window, begin, end, buffers, bars, sizes, scale, CONSUMER, C)
            if C.text_queries:
                store_sums(outputs, b_out, top, total, tile, window - first, CONSUMER, C)
            else:
                store_image(outputs, buffers.q.index(CONSUMER), b_out, top, total, batch, y, x, head, window, sizes, CONSUMER, C)
        mbarrier.arrive(bars.q_empty.index(CONSUMER), count=1)
        tiles += 1
