"""Device functions of integers: which queries a tile has, which windows and blocks of keys it attends to, and where these start.

Legend: Y x X token grid.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place(tile, sizes, C: gl.constexpr):
    """Batch and head of a tile, its first token, its windows, and its blocks of keys.

    Tiles of image queries are ordered along x, y, heads and batch; those outside the grid are not among them. Text tokens are counted
    along y, and parts of the windows and blocks that they attend to take the place of x.
    """
    plane = tile // (sizes.rows * sizes.columns)
    if C.text_queries:
        y = tile % sizes.rows * C.query_box[1]
        x = 0
        part = tile // sizes.rows % sizes.columns
        block_parts = (sizes.blocks + sizes.part_blocks - 1) // sizes.part_blocks
        first = part // block_parts * sizes.part_windows
        last = gl.minimum(first + sizes.part_windows, sizes.windows)
        begin = part % block_parts * sizes.part_blocks
        end = gl.minimum(begin + sizes.part_blocks, sizes.blocks)
    else:
        row = tile // sizes.columns % sizes.rows + sizes.skip_y
        column = tile % sizes.columns + sizes.skip_x
        y = row // C.tiles[0] * C.patch[0] + row % C.tiles[0] * C.query_box[0] - sizes.offset_y
        x = column // C.tiles[1] * C.patch[1] + column % C.tiles[1] * C.query_box[1] - sizes.offset_x
        first = row // C.tiles[0] * sizes.patches_x + column // C.tiles[1]
        last = first + 1
        begin = 0
        end = sizes.blocks
    return plane // sizes.heads, plane % sizes.heads, y, x, first, last, begin, end


@gluon.jit
def _axis_start(patch, length, base, PATCH: gl.constexpr, WINDOW: gl.constexpr):
    return gl.maximum(gl.minimum(patch * PATCH + base + PATCH // 2 - WINDOW // 2, length - WINDOW), 0)


@gluon.jit
def window_start(window, sizes, C: gl.constexpr):
    """First key of a window along both axes: it is centred on its patch, then clamped into the grid of the keys.

    The producer has few registers: without a part, these are numbers that it has already.
    """
    if C.part:
        y = _axis_start(window // sizes.patches_x, sizes.keys_y, sizes.base_y, C.patch[0], C.window[0])
        x = _axis_start(window % sizes.patches_x, sizes.keys_x, sizes.base_x, C.patch[1], C.window[1])
    else:
        y = _axis_start(window // sizes.patches_x, sizes.grid_y, -sizes.offset_y, C.patch[0], C.window[0])
        x = _axis_start(window % sizes.patches_x, sizes.grid_x, -sizes.offset_x, C.patch[1], C.window[1])
    return y, x


@gluon.jit
def key_place(i, C: gl.constexpr):
    """The token of the window at which box i starts, and how many of its first rows and columns earlier boxes have.

    First the boxes that tile the window; then its last column and row of boxes, moved back inside.
    """
    block_y = i // C.full[1]
    block_x = i % C.full[1]
    if C.ragged_window:
        FAR_COLUMN: gl.constexpr = C.boxes[0] if C.boxes[1] > C.full[1] else 0  # number of boxes in it, including the corner
        far = i - C.full[0] * C.full[1]
        in_column = far < FAR_COLUMN
        block_y = gl.where(far < 0, block_y, gl.where(in_column, far, C.boxes[0] - 1))
        block_x = gl.where(far < 0, block_x, gl.where(in_column, C.boxes[1] - 1, far - FAR_COLUMN))
    y = gl.minimum(block_y * C.key_box[0], C.window[0] - C.key_box[0])
    x = gl.minimum(block_x * C.key_box[1], C.window[1] - C.key_box[1])
    return y, x, block_y * C.key_box[0] - y, block_x * C.key_box[1] - x


@gluon.jit
def text_token(j, sizes, C: gl.constexpr):
    """The first text token of block j. The last tokens come first: only block 0 may reach beyond the text, which no loop has to check."""
    return (sizes.text_blocks - 1 - j) * C.n
