"""Compiled providers of other projects: FlexAttention and NATTEN.

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

from bench.attention import providers, sdpa
from bench.attention.providers import Provider, Ready, image_and_text, scores_refusal
from bench.attention.shapes import Inputs, Pair, Task

BLOCK = 128  # tokens of a block of FlexAttention's mask, its own default
TILES = [(1 << i, BLOCK >> i) for i in range(1, 7)]


class Tiling(NamedTuple):
    """A grid cut into tiles of BLOCK tokens, each contiguous: text first, padded to whole blocks, then tile after tile."""

    task: Task
    tile: Pair

    @property
    def text(self) -> int:
        """Text tokens, padded."""
        return -(-self.task.shape.text // BLOCK) * BLOCK

    @property
    def tiles(self) -> Pair:
        return -(-self.task.shape.grid[0] // self.tile[0]), -(-self.task.shape.grid[1] // self.tile[1])

    @property
    def tokens(self) -> int:
        return self.text + BLOCK * prod(self.tiles)

    @property
    def blocks(self) -> int:
        """Blocks of the mask with a pair that attends: of windows a product of both axes' tiles, and those of text."""
        axes, text = [], self.text // BLOCK
        for spans, tile, count in zip(self.task.spans, self.tile, self.tiles, strict=True):
            seen = [[span for span in spans if span.query_start < (n + 1) * tile and span.query_stop > n * tile] for n in range(count)]
            axes.append(sum(-(-some[-1].key_stop // tile) - some[0].key_start // tile for some in seen))
        return prod(axes) + text * (2 * prod(self.tiles) + text)

    def tiled(self, image: Tensor, text: Tensor) -> Tensor:
        """`[B, Y, X, H, D]` and `[B, T, H, D]` to `[B, H, S, D]`."""
        (rows, columns), (height, width) = self.tiles, self.tile
        pad = (0, 0, 0, 0, 0, columns * width - image.shape[2], 0, rows * height - image.shape[1])
        x = rearrange(F.pad(image, pad) if any(pad) else image, "b (r y) (c x) h d -> b h (r c y x) d", y=height, x=width)
        joined: Tensor = torch.cat([F.pad(text.transpose(1, 2), (0, 0, 0, self.text - text.shape[1])), x], 2) if self.text else x
        return joined.contiguous()

    def untiled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, H, S, D]` back to image and text."""
        s = self.task.shape
        text = x[:, :, : s.text].transpose(1, 2) if self.text else None
        image = x[:, :, self.text :].unflatten(2, (*self.tiles, *self.tile))
        return rearrange(image, "b h r c y x d -> b (r y) (c x) h d")[:, : s.grid[0], : s.grid[1]], text

    def attends(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q attends to key k, in arithmetic that a compiler sees. A padded query is the last real one."""
        s, sees, inside = self.task.shape, k >= self.text, k >= self.text
        for q_n, k_n, length, window, patch in zip(self.place(q), self.place(k), s.grid, self.task.window, s.patch, strict=True):
            centre = torch.clamp(q_n, 0, length - 1) // patch * patch + patch // 2
            start = torch.clamp(centre - window // 2, 0, length - window)
            sees, inside = sees & (k_n >= start) & (k_n < start + window), inside & (k_n < length)
        return torch.where((q < self.text) | (k < self.text), (k < s.text) | inside, sees) if self.text else sees

    def place(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column in the grid of tiled token i."""
        n, rest = (i - self.text) // BLOCK, (i - self.text) % BLOCK
        columns, (height, width) = self.tiles[1], self.tile
        return n // columns * height + rest // width, n % columns * width + rest % width


def tiling(task: Task) -> Tiling:
    """The tiles whose mask keeps the fewest blocks."""
    return min((Tiling(task, tile) for tile in TILES), key=lambda tiles: (tiles.blocks, max(tiles.tile)))


def flex(task: Task, *, pretiled: bool = False) -> Ready:
    """FlexAttention on tokens in tiles of the grid, one compiled graph; the mask is made once.

    With `pretiled` it takes and returns tiled tokens, as a model that tiles once would hold them; otherwise tiling is part of the call.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # or later shapes get one graph for all
    begun = time.perf_counter()
    tiles = tiling(task)
    mask = create_block_mask(
        lambda b, h, q, k: tiles.attends(q, k), None, None, tiles.tokens, tiles.tokens,
        device=task.device, BLOCK_SIZE=BLOCK, _compile=task.device == "cuda",  # compiled it does not make all pairs of tokens
    )  # fmt: skip
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

    if pretiled:
        run = torch.compile(attend, dynamic=False, fullgraph=True, mode=mode)
        return Ready(run, lay, lambda out: image_and_text(tiles.untiled(out)), backend, setup_ms)
    whole = torch.compile(lambda inputs: tiles.untiled(attend(lay(inputs))), dynamic=False, fullgraph=True, mode=mode)
    return Ready(whole, backend=backend, setup_ms=setup_ms)


def blocks_flops(task: Task) -> int:
    """Of FlexAttention, which computes whole blocks."""
    return 4 * task.shape.batch * task.shape.heads * task.shape.head_dim * tiling(task).blocks * BLOCK**2


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
        Provider("triton", partial(providers.ours, impl="triton"), unavailable=providers.no_triton, work=providers.tiled_flops),
        Provider("triton-plain", providers.second_choice, unavailable=providers.no_second_choice, work=providers.plain_flops),
        Provider("sdpa", partial(providers.ours, impl="sdpa")),
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
    "triton", "triton-plain", "gather", "gather-cudnn", "windows-cudnn", "windows-flash", "full", "full-cudnn", "flex", "flex-pretiled",
    "natten", "multidiffusion-cudnn",
)  # fmt: skip
CPU = ("sdpa", "gather", "loop", "flex", "full", "natten", "multidiffusion")
