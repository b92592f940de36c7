"""What the warp-specialised kernel is compiled for, and the layouts that follow.

Legend: M x N query x key block of a consumer, D head dim.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Constants:
    """What the kernel is compiled for. Boxes, windows and patches are `(Y, X)` in tokens; a box of text is `(1, tokens)`."""

    query_box: tuple[int, int]
    key_box: tuple[int, int]
    window: tuple[int, int]
    patch: tuple[int, int]
    group: int  # H / G
    head_dim: int
    block_d: int  # power of two
    stages: int
    consumers: int
    registers: int  # of a consumer's thread
    text_queries: bool
    has_text: bool  # text keys
    rope: bool
    ragged_text: bool  # its first block reaches beyond the text
    negate: bool
    ping_pong: bool
    part: bool  # queries are a part of the grid of the keys
    store_boxes: bool
    lse: bool

    @property
    def cache_key(self) -> str:
        """What Triton's cache of binaries tells instances apart by. The properties below are part of the kernel's code, too."""
        return f"{self!r} {_SOURCE}"

    @property
    def tiles(self) -> tuple[int, int]:
        """Query tiles of a patch."""
        return -(-self.patch[0] // self.query_box[0]), -(-self.patch[1] // self.query_box[1])

    @property
    def split(self) -> tuple[int, int]:
        """Distance of the query boxes of two consumers: below each other, or side by side where a tile has too few rows."""
        rows, columns = self.query_box
        return (rows // self.consumers, 0) if rows >= self.consumers else (0, columns // self.consumers)

    @property
    def consumer_box(self) -> tuple[int, int]:
        """The part of a query tile that a consumer computes."""
        return self.split[0] or self.query_box[0], self.split[1] or self.query_box[1]

    @property
    def full(self) -> tuple[int, int]:
        """Key boxes that tile the window, along each axis."""
        return self.window[0] // self.key_box[0], self.window[1] // self.key_box[1]

    @property
    def boxes(self) -> tuple[int, int]:
        """Key boxes that cover the window, along each axis."""
        return -(-self.window[0] // self.key_box[0]), -(-self.window[1] // self.key_box[1])

    @property
    def ragged_window(self) -> bool:
        """Whether boxes of keys overlap, because they do not tile the window."""
        return self.boxes != self.full

    @property
    def m(self) -> int:
        return self.query_box[0] * self.query_box[1] // self.consumers

    @property
    def n(self) -> int:
        return self.key_box[0] * self.key_box[1]

    @property
    def scores_layout(self) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.n, 16])

    @property
    def out_layout(self) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.block_d, 16])

    @property
    def wide_layout(self) -> gl.BlockedLayout:
        """Rows of D elements in vectors of 16 bytes."""
        return gl.BlockedLayout([1, 8], [32 // (self.block_d // 8), self.block_d // 8], [4, 1], [1, 0])


class Sizes(NamedTuple):
    """Numbers that may differ from call to call without another compilation."""

    tiles: Any  # query tiles of all heads
    rows: Any  # query tiles of a head along y; of text queries all tiles of a head
    columns: Any  # query tiles of a head along x; of text queries the parts of the windows, or of the blocks, that they attend to
    skip_y: Any  # tiles of the first patches that are outside the grid
    skip_x: Any
    grid_y: Any
    grid_x: Any
    offset_y: Any
    offset_x: Any
    keys_y: Any
    keys_x: Any
    base_y: Any  # first token of patch 0 on the grid of the keys
    base_x: Any
    patches_x: Any
    heads: Any
    windows: Any
    part_windows: Any  # of a part
    blocks: Any  # of text and window
    part_blocks: Any  # of a part
    text: Any  # tokens
    text_blocks: Any


class Descriptors(NamedTuple):
    """Of the tensors that the producer reads."""

    q: Any
    k: Any
    v: Any
    text_k: Any
    text_v: Any


class Buffers(NamedTuple):
    """Shared memory: queries of each consumer, and rings of blocks of keys and values."""

    q: Any
    k: Any
    v: Any


class Barriers(NamedTuple):
    """Of each buffer, and the turns of two consumers."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turns: Any


class Outputs(NamedTuple):
    """Pointers, or a descriptor of the image, and the strides of the image."""

    image: Any
    sums: Any
    lse: Any
    strides: Any
