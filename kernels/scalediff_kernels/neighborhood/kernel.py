"""Neighborhood patch attention as flash attention: a query tile reads its window in place, with text in the same softmax.

A window is a box of the grid, and blocks of keys tile it. If they do not divide it evenly, the last block is moved back inside the window
and the keys that were already processed are masked, so that no key outside the window is read. Nothing is gathered or permuted, and only
the result and the sums of text queries are allocated.

There is one kernel for image queries, one for text queries, and a small one that averages the sums of the latter. The first two are
compiled for one of two paths: `"descriptor"` (TMA loads boxes into shared memory, zero-filled outside the grid and above the head dim)
and `"pointer"` (addresses and masks). Where an axis wraps, windows and patches may continue on the other side, which only addresses can
follow. Text keys have to be rotated by the angle of the window. Rotating the queries by minus this angle gives the same dot products, and
is done only once.

Legend: B batch, H query heads, G key heads, Y x X token grid, T text tokens, D head dim, M x N query x key block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scalediff_kernels._common import LN_2, VECTOR, around, load_box, load_box_around, load_text, rotate, softmax_step


@triton.jit
def _load(
    ref, strides, batch, head, box,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WRAP: tl.constexpr, BOXES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a box of tokens `[ROWS * COLUMNS, BLOCK_D]`: first row and column, their limits, and the grid."""
    y, x, limit_y, limit_x, grid_y, grid_x = box
    if WRAP[0] or WRAP[1]:
        return load_box_around(
            ref, strides, batch, y, x, head, limit_y, limit_x, grid_y, grid_x, ROWS, COLUMNS, D, BLOCK_D, WRAP, MASKED,
        )  # fmt: skip
    else:
        return load_box(ref, strides, batch, y, x, head, limit_y, limit_x, ROWS, COLUMNS, D, BLOCK_D, BOXES, MASKED)


@triton.jit
def _window_block(
    b_q, state, refs, strides, place, block_y, block_x, scale,
    BOX: tl.constexpr, WINDOW: tl.constexpr, WRAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BOXES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Process one box of keys at token (`block_y`, `block_x`) of the window. MASKED: it may exceed the window's end."""
    ROWS: tl.constexpr = BOX[0]
    COLUMNS: tl.constexpr = BOX[1]
    WINDOW_Y: tl.constexpr = WINDOW[0]
    WINDOW_X: tl.constexpr = WINDOW[1]
    OVERHANG: tl.constexpr = (ROWS > WINDOW_Y) or (COLUMNS > WINDOW_X)
    batch, head, start_y, start_x, grid_y, grid_x = place
    y, x = block_y, block_x
    if MASKED:  # move back inside the window; keys of earlier blocks are masked
        y = tl.maximum(tl.minimum(block_y, WINDOW_Y - ROWS), 0)
        x = tl.maximum(tl.minimum(block_x, WINDOW_X - COLUMNS), 0)
    limit_y, limit_x = start_y + WINDOW_Y, start_x + WINDOW_X
    box = (start_y + y, start_x + x, limit_y, limit_x, grid_y, grid_x)
    b_k = _load(refs[0], strides[0], batch, head, box, ROWS, COLUMNS, D, BLOCK_D, WRAP, BOXES, OVERHANG)
    b_v = _load(refs[1], strides[1], batch, head, box, ROWS, COLUMNS, D, BLOCK_D, WRAP, BOXES, OVERHANG)
    key_y = y + tl.arange(0, ROWS * COLUMNS) // COLUMNS
    key_x = x + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    keep = (key_y >= block_y) & (key_y < WINDOW_Y) & (key_x >= block_x) & (key_x < WINDOW_X)
    return softmax_step(b_q, b_k, b_v, keep, state[0], state[1], state[2], scale, MASKED, PRECISION)


@triton.jit
def _attend_window(
    b_q, state, refs, strides, place, scale,
    BOX: tl.constexpr, WINDOW: tl.constexpr, WRAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BOXES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process all keys of a window: first the boxes that are inside, without a mask, then the last column and row of boxes."""
    FULL_Y: tl.constexpr = WINDOW[0] // BOX[0]
    FULL_X: tl.constexpr = WINDOW[1] // BOX[1]
    BLOCKS_Y: tl.constexpr = (WINDOW[0] + BOX[0] - 1) // BOX[0]
    BLOCKS_X: tl.constexpr = (WINDOW[1] + BOX[1] - 1) // BOX[1]
    FAR_COLUMN: tl.constexpr = BLOCKS_Y if BLOCKS_X > FULL_X else 0  # number of boxes in it, including the corner
    FAR_ROW: tl.constexpr = FULL_X if BLOCKS_Y > FULL_Y else 0
    top, total, acc = state
    for i in tl.range(0, FULL_Y * FULL_X, num_stages=STAGES):
        top, total, acc = _window_block(
            b_q, (top, total, acc), refs, strides, place, i // FULL_X * BOX[0], i % FULL_X * BOX[1], scale,
            BOX, WINDOW, WRAP, D, BLOCK_D, BOXES, PRECISION, False,
        )  # fmt: skip
    if FAR_COLUMN + FAR_ROW > 0:
        for i in tl.range(0, FAR_COLUMN + FAR_ROW, num_stages=1):
            block_y = tl.where(i < FAR_COLUMN, i, BLOCKS_Y - 1) * BOX[0]
            block_x = tl.where(i < FAR_COLUMN, BLOCKS_X - 1, i - FAR_COLUMN) * BOX[1]
            top, total, acc = _window_block(
                b_q, (top, total, acc), refs, strides, place, block_y, block_x, scale,
                BOX, WINDOW, WRAP, D, BLOCK_D, BOXES, PRECISION, True,
            )  # fmt: skip
    return top, total, acc


@triton.jit
def _attend_text(
    b_q, state, refs, strides, batch, head, text, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOXES: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process all text keys; masked only if the last block is not full."""
    top, total, acc = state
    for t in tl.range(0, text, N, num_stages=STAGES):
        b_k = load_text(refs[0], strides[0], batch, t, head, text, N, D, BLOCK_D, BOXES)
        b_v = load_text(refs[1], strides[1], batch, t, head, text, N, D, BLOCK_D, BOXES)
        keep = t + tl.arange(0, N) < text
        top, total, acc = softmax_step(b_q, b_k, b_v, keep, top, total, acc, scale, RAGGED, PRECISION)
    return top, total, acc


@triton.jit
def _start(M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Running maximum, sum and accumulator before the first key."""
    return tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, BLOCK_D], tl.float32)


@triton.jit
def _window_start(patch, length, base, PATCH: tl.constexpr, WINDOW: tl.constexpr, WRAP: tl.constexpr):
    """First key of a patch's window along one axis of `length` keys: centred on the patch, then clamped into the grid of the keys, or
    taken modulo its length.

    `base` is the first token of patch 0 on that grid.
    """
    start = patch * PATCH + base + PATCH // 2 - WINDOW // 2
    if WRAP:
        return (start % length + length) % length
    else:
        return tl.maximum(tl.minimum(start, length - WINDOW), 0)


@triton.jit
def _patch_limits(length, offset, WRAP: tl.constexpr):
    """First token of the first patch inside the grid, and the end of the last one."""
    if WRAP:
        return -offset, length - offset
    else:
        return 0, length


@triton.jit(
    do_not_specialize=[
        "grid_y", "grid_x", "offset_y", "offset_x", "keys_y", "keys_x", "base_y", "base_x", "patches_y", "patches_x", "heads", "text",
    ],
)  # fmt: skip
def image_kernel(
    q_ref,  # [B, Y, X, H, D]
    k_ref,  # [B, keys_y, keys_x, G, D]
    v_ref,  # [B, keys_y, keys_x, G, D]
    out_ref,  # [B, Y, X, H, D]
    text_k_ref,  # [B, T, G, D]
    text_v_ref,  # [B, T, G, D]
    cos_ptr,  # [patches_y * patches_x, D / 2]
    sin_ptr,  # [patches_y * patches_x, D / 2]
    lse_ptr,  # [B, Y, X, H], fp32, written where LSE
    q_strides, k_strides, v_strides, out_strides, text_k_strides, text_v_strides,
    grid_y, grid_x, offset_y, offset_x, keys_y, keys_x, base_y, base_x, patches_y, patches_x, heads, text, scale,
    QUERY_BOX: tl.constexpr, TILES: tl.constexpr, KEY_BOX: tl.constexpr, WINDOW: tl.constexpr, PATCH: tl.constexpr, GROUP: tl.constexpr,
    WRAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TEXT_BLOCK: tl.constexpr, HAS_TEXT: tl.constexpr,
    RAGGED_TEXT: tl.constexpr, ROPE: tl.constexpr, NEGATE: tl.constexpr, BOXES: tl.constexpr, STORE_BOXES: tl.constexpr,
    LSE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one query tile of one patch.

    Consecutive programs are tiles of a patch, then patches along x and y, heads and batch, so that programs that run at the same time
    share windows in L2.
    """
    ROWS: tl.constexpr = QUERY_BOX[0]
    COLUMNS: tl.constexpr = QUERY_BOX[1]
    M: tl.constexpr = ROWS * COLUMNS
    pid = tl.program_id(0)
    tile = pid % (TILES[0] * TILES[1])
    pid = pid // (TILES[0] * TILES[1])
    patch_x = pid % patches_x
    pid = pid // patches_x
    patch_y = pid % patches_y
    pid = pid // patches_y
    head = pid % heads
    batch = pid // heads
    y = patch_y * PATCH[0] - offset_y + tile // TILES[1] * ROWS
    x = patch_x * PATCH[1] - offset_x + tile % TILES[1] * COLUMNS
    low_y, end_y = _patch_limits(grid_y, offset_y, WRAP[0])
    low_x, end_x = _patch_limits(grid_x, offset_x, WRAP[1])
    if (y + ROWS <= low_y) | (y >= end_y) | (x + COLUMNS <= low_x) | (x >= end_x):
        return  # a cut patch at the border has tiles outside the grid

    state = _start(M, BLOCK_D)
    box = (y, x, end_y, end_x, grid_y, grid_x)
    b_q = _load(q_ref, q_strides, batch, head, box, ROWS, COLUMNS, D, BLOCK_D, WRAP, BOXES, True)
    if NEGATE:
        b_q = -b_q
    if HAS_TEXT:
        if ROPE:
            b_q = rotate(b_q, cos_ptr, sin_ptr, patch_y * patches_x + patch_x, True, D, BLOCK_D)
        state = _attend_text(
            b_q, state, (text_k_ref, text_v_ref), (text_k_strides, text_v_strides), batch, head // GROUP, text, scale,
            TEXT_BLOCK, D, BLOCK_D, BOXES, PRECISION, RAGGED_TEXT, STAGES,
        )  # fmt: skip
        if ROPE:  # loaded again, because keeping it would cost registers, and L2 has it
            b_q = _load(q_ref, q_strides, batch, head, box, ROWS, COLUMNS, D, BLOCK_D, WRAP, BOXES, True)
            if NEGATE:
                b_q = -b_q
    start_y = _window_start(patch_y, keys_y, base_y, PATCH[0], WINDOW[0], WRAP[0])
    start_x = _window_start(patch_x, keys_x, base_x, PATCH[1], WINDOW[1], WRAP[1])
    place = (batch, head // GROUP, start_y, start_x, keys_y, keys_x)
    state = _attend_window(
        b_q, state, (k_ref, v_ref), (k_strides, v_strides), place, scale,
        KEY_BOX, WINDOW, WRAP, D, BLOCK_D, BOXES, PRECISION, STAGES,
    )  # fmt: skip
    b_out = (state[2] / state[1][:, None]).to(b_q.dtype)

    offs_y = y + tl.arange(0, M) // COLUMNS
    offs_x = x + tl.arange(0, M) % COLUMNS
    stop_y = tl.minimum((patch_y + 1) * PATCH[0] - offset_y, end_y)
    stop_x = tl.minimum((patch_x + 1) * PATCH[1] - offset_x, end_x)
    m_m = (offs_y >= low_y) & (offs_y < stop_y) & (offs_x >= low_x) & (offs_x < stop_x)
    offs_y, offs_x = around(offs_y, grid_y, WRAP[0]), around(offs_x, grid_x, WRAP[1])
    if STORE_BOXES:  # no tile exceeds its patch; the store clips it at the grid
        out_ref.store([batch, y, x, head, 0], b_out.reshape(1, ROWS, COLUMNS, 1, BLOCK_D))
    else:
        offs_d = tl.arange(0, BLOCK_D)
        place = batch.to(tl.int64) * out_strides[0] + head.to(tl.int64) * out_strides[3]
        offs = offs_y.to(tl.int64) * out_strides[1] + offs_x.to(tl.int64) * out_strides[2]
        ptrs = out_ref + place * VECTOR + (offs * VECTOR)[:, None] + offs_d[None, :]
        tl.store(ptrs, b_out, mask=m_m[:, None] & (offs_d < D)[None, :])
    if LSE:
        token = (batch.to(tl.int64) * grid_y + offs_y) * grid_x + offs_x
        tl.store(lse_ptr + token * heads + head, (state[0] + tl.log2(state[1])) * LN_2, mask=m_m)


@triton.jit(do_not_specialize=["keys_y", "keys_x", "base_y", "base_x", "patches_y", "patches_x", "heads", "text", "part_windows"])
def text_kernel(
    text_q_ref,  # [B, T, H, D]
    k_ref,  # [B, keys_y, keys_x, G, D]
    v_ref,  # [B, keys_y, keys_x, G, D]
    text_k_ref,  # [B, T, G, D]
    text_v_ref,  # [B, T, G, D]
    cos_ptr,  # [patches_y * patches_x, D / 2]
    sin_ptr,  # [patches_y * patches_x, D / 2]
    sums_ptr,  # [B, H, parts, tiles, TEXT_ROWS, BLOCK_D], fp32: a tile for every program
    text_q_strides, k_strides, v_strides, text_k_strides, text_v_strides,
    keys_y, keys_x, base_y, base_x, patches_y, patches_x, heads, text, scale, part_windows,
    TEXT_ROWS: tl.constexpr, KEY_BOX: tl.constexpr, WINDOW: tl.constexpr, PATCH: tl.constexpr, GROUP: tl.constexpr,
    WRAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TEXT_BLOCK: tl.constexpr, RAGGED_TEXT: tl.constexpr,
    ROPE: tl.constexpr, NEGATE: tl.constexpr, BOXES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend from text queries to text and one window at a time; `mean_kernel` averages over the windows. One window over the whole grid
    is the global rule.

    A program processes `part_windows` windows and adds each result to its tile of sums. Every element is written by one program, so there
    are no atomics and the result is deterministic. The sums are in memory (L2), not in registers, so tiles can be as large as those of
    image queries. Their layout makes every address a constant offset from the first one.
    """
    pid = tl.program_id(0)
    offs = tl.arange(0, TEXT_ROWS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sums_ptrs = sums_ptr + pid.to(tl.int64) * (TEXT_ROWS * BLOCK_D) + offs
    tiles = tl.cdiv(text, TEXT_ROWS)
    t = pid % tiles * TEXT_ROWS
    pid = pid // tiles
    parts = tl.cdiv(patches_y * patches_x, part_windows)
    first = pid % parts * part_windows
    pid = pid // parts
    head = pid % heads
    batch = pid // heads
    for i in range(first, tl.minimum(first + part_windows, patches_y * patches_x)):
        b_q = load_text(text_q_ref, text_q_strides, batch, t, head, text, TEXT_ROWS, D, BLOCK_D, BOXES)
        if NEGATE:
            b_q = -b_q
        if ROPE:
            b_q = rotate(b_q, cos_ptr, sin_ptr, i, False, D, BLOCK_D)
        start_y = _window_start(i // patches_x, keys_y, base_y, PATCH[0], WINDOW[0], WRAP[0])
        start_x = _window_start(i % patches_x, keys_x, base_x, PATCH[1], WINDOW[1], WRAP[1])
        place = (batch, head // GROUP, start_y, start_x, keys_y, keys_x)
        state = _attend_window(
            b_q, _start(TEXT_ROWS, BLOCK_D), (k_ref, v_ref), (k_strides, v_strides), place, scale,
            KEY_BOX, WINDOW, WRAP, D, BLOCK_D, BOXES, PRECISION, STAGES,
        )  # fmt: skip
        b_q = load_text(text_q_ref, text_q_strides, batch, t, head, text, TEXT_ROWS, D, BLOCK_D, BOXES)
        if NEGATE:
            b_q = -b_q
        state = _attend_text(
            b_q, state, (text_k_ref, text_v_ref), (text_k_strides, text_v_strides), batch, head // GROUP, text, scale,
            TEXT_BLOCK, D, BLOCK_D, BOXES, PRECISION, RAGGED_TEXT, STAGES,
        )  # fmt: skip
        b_sum = tl.load(sums_ptrs, mask=tl.zeros_like(offs) < i - first, other=0.0)  # zero before the first window
        tl.store(sums_ptrs, b_sum + state[2] / state[1][:, None])
        tl.debug_barrier()  # another thread may load what this one stored, for the next window


@triton.jit(do_not_specialize=["heads", "text", "parts", "count"])
def mean_kernel(
    sums_ptr,  # [B, H, parts, tiles, TEXT_ROWS, BLOCK_D], fp32
    lse_ptr,  # [B, H, parts, tiles, TEXT_ROWS], fp32, in units of log2; read where WEIGHTED
    out_ptr,  # [B, T, H, D]
    out_strides, heads, text, parts, count,
    TEXT_ROWS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of the mean over `count` windows from the sums of all parts, added in a fixed order and rounded once.

    WEIGHTED: The parts are of the keys of one window, so each has the weight of its keys.
    """
    pid = tl.program_id(0)
    first = pid % (TEXT_ROWS // ROWS) * ROWS
    pid = pid // (TEXT_ROWS // ROWS)
    tiles = tl.cdiv(text, TEXT_ROWS)
    tile = pid % tiles
    pid = pid // tiles
    offs_m = first + tl.arange(0, ROWS)
    offs_t = tile * TEXT_ROWS + offs_m
    offs_d = tl.arange(0, BLOCK_D)
    offs = offs_m[:, None] * BLOCK_D + offs_d[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if WEIGHTED:
        for part in range(0, parts):
            place = (pid.to(tl.int64) * parts + part) * tiles + tile
            top = tl.maximum(top, tl.load(lse_ptr + place * TEXT_ROWS + offs_m))
    b_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for part in range(0, parts):
        place = (pid.to(tl.int64) * parts + part) * tiles + tile
        b_part = tl.load(sums_ptr + place * (TEXT_ROWS * BLOCK_D) + offs)
        if WEIGHTED:
            weight = tl.exp2(tl.load(lse_ptr + place * TEXT_ROWS + offs_m) - top)
            b_sum += weight[:, None] * b_part
            total += weight
        else:
            b_sum += b_part
    if WEIGHTED:
        b_out = b_sum / total[:, None]
    else:
        b_out = b_sum / count
    place = (pid // heads).to(tl.int64) * out_strides[0] + (pid % heads).to(tl.int64) * out_strides[2]
    ptrs = out_ptr + place * VECTOR + (offs_t.to(tl.int64) * out_strides[1] * VECTOR)[:, None] + offs_d[None, :]
    tl.store(ptrs, b_out.to(out_ptr.dtype.element_ty), mask=(offs_t < text)[:, None] & (offs_d < D)[None, :])
