"""Providers that others compiled, FlexAttention on tokens in two-dimensional tiles and NATTEN; and all providers by name.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim, S tokens of a tiled sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from bench.attention import sdpa
from bench.attention.providers import Provider, Ready, image_and_text, ours, scores_refusal
from bench.attention.shapes import Inputs, Pair, Task

BLOCK = 128  # tokens of a block of FlexAttention's mask, its own default
TILES = [(1 << i, BLOCK >> i) for i in range(1, 7)]


class Tiling(NamedTuple):
    """A grid cut into tiles of BLOCK tokens, each contiguous: text first, padded to whole blocks, then tile after tile."""

    tile: Pair
    text: int  # tokens, padded
    tiles: Pair

    @property
    def tokens(self) -> int:
        return self.text + BLOCK * prod(self.tiles)

    def tiled(self, image: Tensor, text: Tensor) -> Tensor:
        """`[B, Y, X, H, D]` and `[B, T, H, D]` to `[B, H, S, D]`."""
        (rows, columns), (height, width) = self.tiles, self.tile
        pad = (0, 0, 0, 0, 0, columns * width - image.shape[2], 0, rows * height - image.shape[1])
        x = rearrange(F.pad(image, pad) if any(pad) else image, "b (r y) (c x) h d -> b h (r c y x) d", y=height, x=width)
        joined: Tensor = torch.cat([F.pad(text.transpose(1, 2), (0, 0, 0, self.text - text.shape[1])), x], 2) if self.text else x
        return joined.contiguous()

    def untiled(self, x: Tensor, task: Task) -> tuple[Tensor, Tensor | None]:
        """`[B, H, S, D]` back to image and text."""
        text = x[:, :, : task.shape.text].transpose(1, 2) if self.text else None
        image = x[:, :, self.text :].unflatten(2, (*self.tiles, *self.tile))
        return rearrange(image, "b h r c y x d -> b (r y) (c x) h d")[:, : task.shape.grid[0], : task.shape.grid[1]], text


def tiling(task: Task) -> Tiling:
    """The tiles whose mask keeps the fewest blocks."""

    def kept(tile: Pair) -> int:
        return prod(int(_axis(task, axis, tile[axis])[0].sum()) for axis in (0, 1))

    tile = min(TILES, key=lambda t: (kept(t), max(t)))
    text = -(-task.shape.text // BLOCK) * BLOCK
    return Tiling(tile, text, (-(-task.shape.grid[0] // tile[0]), -(-task.shape.grid[1] // tile[1])))


def blocks(task: Task, tiles: Tiling) -> tuple[Tensor, Tensor]:
    """Blocks with a pair that attends, and blocks of such pairs alone, `[S / BLOCK, S / BLOCK]`: products of both axes' blocks."""
    (some_y, all_y), (some_x, all_x) = (_axis(task, axis, tiles.tile[axis]) for axis in (0, 1))
    n, count = tiles.text // BLOCK, tiles.tokens // BLOCK
    some, every = (torch.ones(count, count, dtype=torch.bool) for _ in range(2))
    some[n:, n:], every[n:, n:] = torch.kron(some_y, some_x), torch.kron(all_y, all_x)
    whole = [torch.arange(1, m + 1) * size <= length for m, size, length in zip(tiles.tiles, tiles.tile, task.shape.grid, strict=True)]
    every[:n, n:] = torch.kron(*whole)
    every[:, :n] = torch.arange(1, n + 1) * BLOCK <= task.shape.text
    return some, every


def _axis(task: Task, axis: int, tile: int) -> tuple[Tensor, Tensor]:
    """Tiles of queries against tiles of keys along one axis: some pair attends, all do. A padded query is the last real one."""
    length = task.shape.grid[axis]
    count = -(-length // tile)
    attends = torch.zeros(count * tile, count * tile, dtype=torch.bool)
    for q0, q1, k0, k1 in task.spans[axis]:
        attends[q0:q1, k0:k1] = True
    attends[length:] = attends[length - 1]
    cut = attends.view(count, tile, count, tile)
    return cut.any(3).any(1), cut.all(3).all(1)


def mask_of(task: Task, tiles: Tiling) -> Callable[..., Tensor]:
    """The same mask token by token, in arithmetic that a compiler sees."""
    text, (height, width), columns = tiles.text, tiles.tile, tiles.tiles[1]
    grid, window, patch = task.shape.grid, task.window, task.shape.patch

    def place(i: Tensor) -> tuple[Tensor, Tensor]:
        n, rest = (i - text) // BLOCK, (i - text) % BLOCK
        return n // columns * height + rest // width, n % columns * width + rest % width

    def start(x: Tensor, axis: int) -> Tensor:
        x = torch.clamp(x, 0, grid[axis] - 1)
        return torch.clamp(x // patch[axis] * patch[axis] + patch[axis] // 2 - window[axis] // 2, 0, grid[axis] - window[axis])

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        (q_y, q_x), (k_y, k_x) = place(q), place(k)
        y, x = start(q_y, 0), start(q_x, 1)
        sees = (k_y >= y) & (k_y < y + window[0]) & (k_x >= x) & (k_x < x + window[1])
        if not text:
            return sees
        real = (k < task.shape.text) | ((k >= text) & (k_y < grid[0]) & (k_x < grid[1]))
        return torch.where((q < text) | (k < text), real, sees)

    return mask


def block_mask(task: Task, tiles: Tiling) -> Any:
    """FlexAttention's mask, made from lists of blocks: its own function would make all S x S pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = blocks(task, tiles)
    lists = list[Tensor]()
    for chosen in (some & ~every, every):
        order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
        lists += [x.to(task.device, torch.int32).contiguous()[None, None] for x in (chosen.sum(1), order)]
    count, order, full_count, full_order = lists
    return BlockMask.from_kv_blocks(count, order, full_count, full_order, BLOCK_SIZE=BLOCK, mask_mod=mask_of(task, tiles))


def flex(task: Task, *, pretiled: bool = False) -> Ready:
    """FlexAttention on tokens in tiles of the grid, one compiled graph; the mask is made once.

    With `pretiled` it takes and returns tiled tokens, as a model that tiles once would hold them; otherwise tiling is part of the call.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # or later shapes get one graph for all
    begun = time.perf_counter()
    tiles = tiling(task)
    mask = block_mask(task, tiles)
    backend, setup_ms = f"tiles {tiles.tile[0]}x{tiles.tile[1]}", 1000 * (time.perf_counter() - begun)
    # On a GPU blocks are chosen by measuring. Every row of the mask has a key; queries are scaled once; Hopper's unit loads tiles.
    options: Any = {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True, "USE_TMA": True} if task.device == "cuda" else None
    mode = "max-autotune-no-cudagraphs" if task.device == "cuda" else None

    def lay(inputs: Inputs) -> list[Tensor]:
        return [tiles.tiled(*pair) for pair in zip(inputs.image, inputs.text, strict=True)]

    def attend(laid: list[Tensor]) -> Any:
        q, k, v = laid
        grouped = q.shape[1] != k.shape[1]
        return flex_attention(q, k, v, block_mask=mask, scale=task.scale, enable_gqa=grouped, kernel_options=options)

    def untile(out: Tensor) -> tuple[Tensor, Tensor | None]:
        return tiles.untiled(out, task)

    if pretiled:
        run = torch.compile(attend, dynamic=False, fullgraph=True, mode=mode)
        return Ready(run, lay, lambda out: image_and_text(untile(out)), backend, setup_ms)
    whole = torch.compile(lambda inputs: untile(attend(lay(inputs))), dynamic=False, fullgraph=True, mode=mode)
    return Ready(whole, backend=backend, setup_ms=setup_ms)


def blocks_flops(task: Task) -> int:
    """Of FlexAttention, which computes whole blocks."""
    kept = int(blocks(task, tiling(task))[0].sum())
    return 4 * task.shape.batch * task.shape.heads * task.shape.head_dim * kept * BLOCK**2


def natten(task: Task) -> Ready:
    """`na2d(kernel_size=window, stride=patch)` with text as its additional keys, and text queries by SDPA."""
    from natten import na2d
    from natten.backends import choose_backend

    repeat = task.shape.heads // task.shape.key_heads
    stride = min(task.shape.patch[0], task.window[0]), min(task.shape.patch[1], task.window[1])

    def parts(inputs: Inputs) -> list[Tensor]:
        """Contiguous, as its kernels read them, with as many key heads as query heads."""
        q, k, v = inputs.image
        return [q.contiguous(), *(x.repeat_interleave(repeat, dim=-2).contiguous() for x in (k, v))]

    def run(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        keys, values = (x.repeat_interleave(repeat, dim=-2) for x in inputs.text[1:])
        more = {"additional_keys": keys, "additional_values": values} if task.rule else {}
        out: Tensor = na2d(*parts(inputs), kernel_size=task.window, stride=stride, scale=task.scale, **more)
        return out, sdpa.attend(sdpa.text_heads(inputs), task).transpose(1, 2) if task.rule else None

    return Ready(run, backend=str(choose_backend(*parts(task.inputs(0)), torch_compile=False)))


def natten_unavailable(task: Task) -> str:
    return "the natten package is not installed" if find_spec("natten") is None else scores_refusal(task)  # on a CPU it makes all scores


def _named(base: str, make: Callable[[Task], Ready], backends: Sequence[str], **more: Any) -> list[Provider]:
    """A provider for every backend of torch's attention, "" being its own choice."""
    return [Provider(f"{base}-{backend}" if backend else base, make, backend=backend, **more) for backend in backends]


_ONE_TEXT, _OWN_TEXT = ("", "global"), ("", "window")  # not rotated for every window; only beside its own window or view
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(ours("triton"), ours("sdpa"), ours("reference")),
        *_named("gather", sdpa.gather, ("", "cudnn", "flash"), work=sdpa.padded_flops),
        *_named("windows", partial(sdpa.gather, beforehand=True), ("cudnn", "flash"), work=sdpa.padded_flops),
        *_named("loop", sdpa.loop, ("", "cudnn")),
        *_named("full", sdpa.full, ("", "cudnn", "flash", "efficient", "math"), function="full", rules=_ONE_TEXT),
        Provider("flex", flex, rules=_ONE_TEXT, work=blocks_flops),
        Provider("flex-pretiled", partial(flex, pretiled=True), rules=_ONE_TEXT, work=blocks_flops),
        Provider("natten", natten, rules=_ONE_TEXT, unavailable=natten_unavailable, work=lambda task: None),  # its tiles are unknown
        *_named("multidiffusion", sdpa.multidiffusion, ("", "cudnn"), function="views", rules=_OWN_TEXT),
    )
}
QUICK = (
    "triton", "gather", "gather-cudnn", "windows-cudnn", "windows-flash", "full", "full-cudnn", "flex", "flex-pretiled", "natten",
    "multidiffusion-cudnn",
)  # fmt: skip
CPU = ("sdpa", "gather", "loop", "flex", "full", "natten", "multidiffusion")
