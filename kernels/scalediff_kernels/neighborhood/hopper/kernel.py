"""Neighborhood patch attention for sm_90 in Gluon: one warp loads, warpgroups compute.

A program takes one query tile after another. Its *producer*, a single warp, issues all loads by TMA: the queries of a tile, then keys
and values block by block into two rings of buffers. Each *consumer*, a warpgroup with 64 query rows of the tile, keeps two products in
flight: the tensor cores compute Q K^T of block j and P V of block j - 1; it waits for the first alone, and computes the softmax of block
j beside the second. Two consumers may take turns at issuing products, so that one computes its softmax while the tensor cores work for
the other.

Text keys are the first blocks of a tile, loaded into the same buffers. Instead of rotating them by the angle of the window, the queries
are rotated back into a second buffer, once. Tiles of text queries attend to one window after another, or to a part of the blocks of one
window over the grid; `kernel.mean_kernel` reduces their fp32 results in a fixed order.

Every buffer has two mbarriers: `full` counts the bytes that loads have written, `empty` the consumers that have read it.
docs/internals/kernels.md has a diagram.

Legend: B batch, H query heads, G key heads, Y x X token grid, T text tokens, D head dim, M x N query x key block of a consumer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from scalediff_kernels.neighborhood.hopper.constants import Barriers, Buffers, Descriptors, Outputs, Sizes
from scalediff_kernels.neighborhood.hopper.consume import consume
from scalediff_kernels.neighborhood.hopper.produce import produce


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """An mbarrier for each of `count` buffers."""
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


def _name(specialization):
    """Image and text queries have names of their own in a profile."""
    return "hopper_text_kernel" if specialization.constants["C"].text_queries else "hopper_image_kernel"


@gluon.jit(
    repr=_name,
    do_not_specialize=[
        "tiles", "rows", "columns", "skip_y", "skip_x", "grid_y", "grid_x", "offset_y", "offset_x", "keys_y", "keys_x", "base_y",
        "base_x", "patches_x", "heads", "windows", "part_windows", "blocks", "part_blocks", "text", "text_blocks",
    ],
)  # fmt: skip
def hopper_kernel(
    q_ref,  # descriptor of [B, Y, X, H, D], or of text queries [B, T, H, D]; a box is the rows of one consumer
    k_ref,  # descriptor of [B, keys_y, keys_x, G, D]
    v_ref,  # descriptor of [B, keys_y, keys_x, G, D]
    text_k_ref,  # descriptor of [B, T, G, D]
    text_v_ref,  # descriptor of [B, T, G, D]
    out_ref,  # [B, Y, X, H, D], a descriptor for `store_boxes`
    sums_ptr,  # [B, H, parts, tiles, TEXT_ROWS, BLOCK_D], fp32, of text queries
    lse_ptr,  # [B, Y, X, H], or of text queries [B, H, parts, tiles, TEXT_ROWS] in units of log2; fp32
    cos_ptr,  # [patches_y * patches_x, D / 2]
    sin_ptr,  # [patches_y * patches_x, D / 2]
    out_strides, tiles, rows, columns, skip_y, skip_x, grid_y, grid_x, offset_y, offset_x, keys_y, keys_x, base_y, base_x, patches_x,
    heads, windows, part_windows, blocks, part_blocks, text, text_blocks, scale,
    C: gl.constexpr,
):  # fmt: skip
    """Compute the query tiles `program_id`, `program_id + programs`, ... References that C does not need are not read."""
    CONSUMERS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.stages
    REGISTERS: gl.constexpr = C.registers
    Q_BUFFERS: gl.constexpr = 2 * C.consumers if C.rope else C.consumers
    q_smem = gl.allocate_shared_memory(q_ref.dtype, [Q_BUFFERS] + q_ref.block_type.shape, q_ref.layout)
    k_smem = gl.allocate_shared_memory(k_ref.dtype, [STAGES] + k_ref.block_type.shape, k_ref.layout)
    v_smem = gl.allocate_shared_memory(v_ref.dtype, [STAGES] + v_ref.block_type.shape, v_ref.layout)
    q_full, q_empty = _barriers(CONSUMERS, 1), _barriers(CONSUMERS, 1)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    turns = _barriers(2, 1)
    fence_async_shared()
    if C.ping_pong:
        mbarrier.arrive(turns.index(0), count=1)
    buffers = Buffers(q_smem, k_smem, v_smem)
    bars = Barriers(q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    sizes = Sizes(
        tiles, rows, columns, skip_y, skip_x, grid_y, grid_x, offset_y, offset_x, keys_y, keys_x, base_y, base_x, patches_x, heads,
        windows, part_windows, blocks, part_blocks, text, text_blocks,
    )  # fmt: skip
    descs = Descriptors(q_ref, k_ref, v_ref, text_k_ref, text_v_ref)
    work = (buffers, bars, sizes, Outputs(out_ref, sums_ptr, lse_ptr, out_strides), (cos_ptr, sin_ptr), scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(consume, (work, 0, C)), (consume, (work, 1, C)), (produce, (descs, buffers, bars, sizes, C))],
            [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (consume, (work, 0, C)), (consume, (work, 1, C)), (consume, (work, 2, C)),
                (produce, (descs, buffers, bars, sizes, C)),
            ],
            [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (work, 0, C)), (consume, (work, 1, C)), (consume, (work, 2, C)), (consume, (work, 3, C)),
                (produce, (descs, buffers, bars, sizes, C)),
            ],
            [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24],
        )  # fmt: skip
