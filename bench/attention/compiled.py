"""FlexAttention on tokens tiled in two dimensions, and NATTEN: providers of `bench.attention` that others compiled.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim, S tokens of a tiled sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.attention.providers import Ours, Provider, Ready, as_is, heads_first, image_and_text, result_bytes
from bench.attention.sdpa import Full, Gather, Loop, MultiDiffusion, Windows
from bench.attention.shapes import Inputs, Pair, Task

BLOCK = 128  # tokens of a block of FlexAttention's mask, its own default
Heads = tuple[Tensor, Tensor, Tensor]
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
        x = (F.pad(image, pad) if any(pad) else image).unflatten(2, (columns, width)).unflatten(1, (rows, height))
        x = x.permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 5)
        if not self.text:
            tiled: Tensor = x.contiguous()
            return tiled
        joined: Tensor = torch.cat([F.pad(text.transpose(1, 2), (0, 0, 0, self.text - text.shape[1])), x], 2)
        return joined

    def untiled(self, x: Tensor, task: Task) -> tuple[Tensor, Tensor | None]:
        """`[B, H, S, D]` back to image and text."""
        text = x[:, :, : task.shape.text].transpose(1, 2) if self.text else None
        image = x[:, :, self.text :].unflatten(2, (*self.tiles, *self.tile)).permute(0, 2, 4, 3, 5, 1, 6)
        return image.flatten(3, 4).flatten(1, 2)[:, : task.shape.grid[0], : task.shape.grid[1]], text


class Blocks(NamedTuple):
    """Blocks that hold a pair which attends, and those that hold no other: `[S / BLOCK, S / BLOCK]`, bool."""

    some: Tensor
    all: Tensor


def tiling(task: Task) -> Tiling:
    """The tiles whose mask keeps the fewest blocks."""
    text = -(-task.shape.text // BLOCK) * BLOCK

    def kept(tile: Pair) -> int:
        return prod(int(_axis(task, axis, tile[axis])[0].sum()) for axis in (0, 1))

    tile = min(TILES, key=lambda t: (kept(t), max(t)))
    return Tiling(tile, text, (-(-task.shape.grid[0] // tile[0]), -(-task.shape.grid[1] // tile[1])))


def blocks(task: Task, tiles: Tiling) -> Blocks:
    """Windows are products of intervals, so the blocks are products of both axes' blocks: nothing of S x S tokens is ever made."""
    (some_y, all_y), (some_x, all_x) = (_axis(task, axis, tiles.tile[axis]) for axis in (0, 1))
    n, count = tiles.text // BLOCK, tiles.tokens // BLOCK
    some, every = (torch.ones(count, count, dtype=torch.bool) for _ in range(2))
    some[n:, n:], every[n:, n:] = torch.kron(some_y, some_x), torch.kron(all_y, all_x)
    whole = [torch.arange(1, m + 1) * size <= length for m, size, length in zip(tiles.tiles, tiles.tile, task.shape.grid, strict=True)]
    every[:n, n:] = torch.kron(*whole)
    every[:, :n] = torch.arange(1, n + 1) * BLOCK <= task.shape.text
    return Blocks(some, every)


def _axis(task: Task, axis: int, tile: int) -> tuple[Tensor, Tensor]:
    """Tiles of queries against tiles of keys along one axis: some pair attends, all do. A padded query is the last real one."""
    length, spans = task.shape.grid[axis], task.spans[axis]
    count = -(-length // tile)
    attends = torch.zeros(count * tile, count * tile, dtype=torch.bool)
    for q0, q1, k0, k1 in spans:
        attends[q0:q1, k0:k1] = True
    attends[length:] = attends[length - 1]
    cut = attends.view(count, tile, count, tile)
    return cut.any(3).any(1), cut.all(3).all(1)


def mask_of(task: Task, tiles: Tiling) -> Callable[..., Tensor]:
    """The same mask token by token, in arithmetic that a compiler sees."""
    text, (height, width), columns, t = tiles.text, tiles.tile, tiles.tiles[1], task.shape.text
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
        real = (k < t) | ((k >= text) & (k_y < grid[0]) & (k_x < grid[1]))
        return torch.where((q < text) | (k < text), real, sees)

    return mask


class Flex(Provider):
    """FlexAttention, compiled, on tokens in tiles of the grid; the mask is made once. By its own choice of blocks, or tuned.

    `pretiled` takes and returns tiled tokens, as a model would have them that tiled once; otherwise tiling is part of the call, and where
    that is tuned, of one graph with it. With `options` it is told what is true of these masks and what its kernels can do.
    """

    def __init__(self, name: str, *, tuned: bool = False, pretiled: bool = False, options: bool = False) -> None:
        self.name, self.tuned, self.pretiled, self.options = name, tuned, pretiled, options

    def refusal(self, task: Task) -> str | None:
        if task.rule == "window":
            return "one mask has one text: it cannot be turned for every window, nor queries of text averaged; see the rule 'global'"
        return None

    def memory(self, task: Task) -> int:
        s = task.shape
        copies = task.dtype.itemsize * s.batch * s.head_dim * tiling(task).tokens * (3 * s.heads + 2 * s.key_heads)
        return 2 * copies + result_bytes(task) + 24 * (tiling(task).tokens // BLOCK) ** 2

    def executed(self, task: Task) -> int | None:
        kept = int(blocks(task, tiling(task)).some.sum())
        return 4 * task.shape.batch * task.shape.heads * task.shape.head_dim * kept * BLOCK**2

    def prepare(self, task: Task) -> Ready:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # or later shapes get one graph for all
        begun = time.perf_counter()
        tiles = tiling(task)
        mask = block_mask(task, tiles)
        if task.device == "cuda":
            torch.cuda.synchronize()
        setup = 1000 * (time.perf_counter() - begun)
        options = _kernel_options() if self.options else None

        def attend(laid: Heads) -> Tensor:
            q, k, v = laid
            grouped = q.shape[1] != k.shape[1]
            out: Tensor = flex_attention(q, k, v, block_mask=mask, scale=task.scale, enable_gqa=grouped, kernel_options=options)
            return out

        def tiled(image: Heads, text: Heads) -> Heads:
            q, k, v = (tiles.tiled(*pair) for pair in zip(image, text, strict=True))
            return q, k, v

        def whole(image: Heads, text: Heads) -> tuple[Tensor, Tensor | None]:
            return tiles.untiled(attend(tiled(image, text)), task)

        def compiled(function: Any) -> Any:
            return torch.compile(function, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs" if self.tuned else None)

        words = f"tiles {tiles.tile[0]}x{tiles.tile[1]}"
        if self.pretiled:

            def lay(inputs: Inputs) -> Heads:
                return tiled(inputs.image, inputs.text)

            return Ready(lay, compiled(attend), lambda out: image_and_text(tiles.untiled(out, task)), lambda laid: words, setup)
        if self.tuned:
            whole = compiled(whole)
        else:
            attend = compiled(attend)
        return Ready(as_is, lambda inputs: whole(inputs.image, inputs.text), image_and_text, lambda laid: words, setup)


def _kernel_options() -> Any:
    """Every row of these masks sees a key; scaling queries once is cheaper; tiles are loaded by Hopper's unit where torch knows how."""
    from torch.nn.attention import flex_attention

    known = getattr(getattr(flex_attention, "FlexKernelOptions", None), "__annotations__", {})
    return {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True} | ({"USE_TMA": True} if "USE_TMA" in known else {})


def block_mask(task: Task, tiles: Tiling) -> Any:
    """FlexAttention's mask from lists of blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = blocks(task, tiles)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
        return tuple(x.to(task.device, torch.int32).contiguous()[None, None] for x in (chosen.sum(1), order))  # type: ignore[return-value]

    return BlockMask.from_kv_blocks(*listed(some & ~every), *listed(every), BLOCK_SIZE=BLOCK, mask_mod=mask_of(task, tiles))


class Natten(Provider):
    """NATTEN as it is called: `na2d(kernel_size=window, stride=patch)`; text keys as its additional keys, text queries by SDPA."""

    name = "natten"

    def refusal(self, task: Task) -> str | None:
        if find_spec("natten") is None:
            return "the natten package is not installed"
        if task.rule == "window":
            return "additional keys are the same for every window: text cannot be turned; see the rule 'global'"
        return None

    def memory(self, task: Task) -> int:
        s = task.shape
        if task.device == "cuda":
            return 10 * result_bytes(task)  # permuted q, k, v, results of image and of text, and merging
        tokens = s.tokens  # on a CPU all scores are made, by eager FlexAttention
        return 6 * s.batch * s.heads * tokens**2 * 4

    def executed(self, task: Task) -> int | None:
        return None  # by its tiles, which it does not tell

    def prepare(self, task: Task) -> Ready:
        from natten import na2d
        from natten.backends import choose_backend

        repeat, text = task.shape.heads // task.shape.key_heads, task.shape.text
        stride = min(task.shape.patch[0], task.window[0]), min(task.shape.patch[1], task.window[1])

        def grouped(x: Tensor) -> Tensor:
            return x.repeat_interleave(repeat, dim=-2) if repeat > 1 else x

        def run(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
            q, k, v = inputs.image
            more = {}
            if text:
                _, text_k, text_v = inputs.text
                more = {"additional_keys": grouped(text_k), "additional_values": grouped(text_v)}
            # Its kernels read contiguous tensors.
            parts = (q.contiguous(), grouped(k).contiguous(), grouped(v).contiguous())
            out: Tensor = na2d(*parts, kernel_size=task.window, stride=stride, scale=task.scale, **more)
            if not text:
                return out, None
            q, k, v = (heads_first(x) for x in (inputs.sequences[0][:, :text], *inputs.sequences[1:]))
            joined = F.scaled_dot_product_attention(q, k, v, scale=task.scale, enable_gqa=repeat > 1)
            return out, joined.transpose(1, 2)

        def backend(inputs: Inputs) -> str:
            q, k, v = (grouped(x) if x.shape[3] != task.shape.heads else x for x in inputs.image)
            return str(choose_backend(q, k, v, torch_compile=False))

        return Ready(as_is, run, image_and_text, backend)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours("triton"), Ours("sdpa"), Ours("reference"),
        Gather(), Gather("cudnn"), Gather("flash"), Windows("cudnn"), Windows("flash"), Loop(), Loop("cudnn"),
        Full(), Full("cudnn"), Full("flash"), Full("efficient"), Full("math"),
        Flex("flex"), Flex("flex-tuned", tuned=True), Flex("flex-pretiled", tuned=True, pretiled=True),
        Flex("flex-options", tuned=True, pretiled=True, options=True),
        Natten(), MultiDiffusion(), MultiDiffusion("cudnn"),
    )
}  # fmt: skip
QUICK = (
    "triton", "gather", "gather-cudnn", "windows-cudnn", "windows-flash", "full", "full-cudnn", "flex-tuned", "flex-pretiled", "natten",
    "multidiffusion-cudnn",
)  # fmt: skip
CPU = ("sdpa", "gather", "loop", "flex", "full", "natten", "multidiffusion")
