"""Encode and decode in bands of rows, in a fraction of the memory, with the result of one piece up to rounding: no seams.

A band of a convolution needs a few rows around it, its halo. A band of a group norm needs the mean and the variance of the whole
activation. So the layers run band by band, as often as they have norms: every pass computes the statistics of the next norm, and the
last pass computes the output. Between groups of layers the activation is kept as a whole; inside a group nothing is kept. The layers at
the size of the picture, whose activations are the largest, are one group; with less memory they are joined by those of the next sizes,
which are then computed more often. The middle block runs as one piece, at the size of the latents, so that its attention sees all of them.
Where ranks share the rows of a picture out, each runs the bands of its rows, and receives the halo of every group from its neighbours.

Legend: B batch, C channels, G groups of a norm, Y x X rows and columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, distributed, nn

from scalediff.cascade.band_statistics import Statistics, Unknown
from scalediff.patching.bands import group_of_bands, over_ranks
from scalediff.patching.circular import wraps_rows
from scalediff_kernels.distributed.bands import neighbour_rows

ELEMENTS = 2**27  # of the widest activation in a band, without its halo
_STREAMED = "_scalediff_streamed"
_BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
_LAYERS = {"ResnetBlock2D", "Upsample2D", "Downsample2D"}
_OFFLOADED = ("_hf_hook", "_diffusers_hook")  # attributes of modules whose weights come to the device only for their own forward


@dataclass(frozen=True)
class _Layer:
    """A layer that sees only the rows around each row, apart from its norms.

    Attributes:
        run: Function from its input to its output, both `[B, C, Y, X]`.
        module: The layer.
        up, down: Factors by which it enlarges and reduces the rows.
    """

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    up: int = 1
    down: int = 1

    @property
    def radius(self) -> int:
        """Rows that the layer sees above and below, of its output if it enlarges, otherwise of its input."""
        return sum((one.kernel_size[0] - 1) * one.dilation[0] // 2 for one in _modules(self.module, nn.Conv2d))


def stream_obstacle(vae: Any) -> str:
    """Why an autoencoder cannot be streamed; empty if it can. Known are diffusers' AutoencoderKL and those with its encoder and decoder."""
    parts: tuple[tuple[Any, str], ...] = ((getattr(vae, "encoder", None), "Encoder"), (getattr(vae, "decoder", None), "Decoder"))
    for part, name in parts:
        if not any(f"{cls.__module__}.{cls.__name__}" == f"diffusers.models.autoencoders.vae.{name}" for cls in type(part).__mro__):
            return f"{type(vae).__name__} has no encoder and decoder of AutoencoderKL"
        blocks = _blocks(part)
        layers = [layer for block in blocks for layer in _layers_of(block)]
        unknown = {type(one).__name__ for one in blocks} - _BLOCKS | {type(one).__name__ for one in layers} - _LAYERS
        unknown |= {type(one).__name__ for one in _modules(nn.ModuleList(blocks), nn.ConvTranspose2d)}
        if not isinstance(part.conv_norm_out, nn.GroupNorm):
            unknown |= {type(part.conv_norm_out).__name__}
        if unknown:
            return f"{type(vae).__name__} has layers that may see the whole picture: {', '.join(sorted(unknown))}"
        if any(attribute in one.__dict__ for one in list(part.modules())[1:] for attribute in _OFFLOADED):
            return f"the layers of {type(vae).__name__} have hooks, such as those of offloading"
    return f"the first rows of {type(vae).__name__} need the last ones, because the picture wraps" if wraps_rows(vae) else ""


def sizes_of(vae: Any) -> int:
    """Number of sizes of activations, from that of the picture to that of the latents."""
    return len(_blocks(vae.decoder))


def is_streamed(vae: Any) -> bool:
    """Whether an autoencoder is streamed at present."""
    return _STREAMED in vae.__dict__


def rows_of_halo(vae: Any) -> int:
    """Rows of latents that a rank needs at least, so that its neighbours find every halo in them; 0 if an autoencoder is not streamed."""
    return vae.__dict__.get(_STREAMED, 0)  # type: ignore[no-any-return]


@contextmanager
def streamed(vae: Any, *, joined: int = 1, elements: int | None = None) -> Iterator[None]:
    """Make an autoencoder encode and decode in bands of rows; it is restored on exit.

    Args:
        vae: An autoencoder without `stream_obstacle`. Its tiling must be off, because tiles would be streamed one by one.
        joined: Number of sizes, from that of the picture down, whose layers are one group, up to `sizes_of`. More need less memory
            and more work.
        elements: Largest number of elements of an activation in a band, without its halo; `ELEMENTS` when None. A group of layers
            whose whole activations have no more runs as usual.

    Raises:
        NotImplementedError: The autoencoder cannot be streamed.
    """
    if obstacle := stream_obstacle(vae):
        raise NotImplementedError(f"an autoencoder in bands must have layers that see a few rows: {obstacle}")
    with ExitStack() as undo:
        vae.__dict__[_STREAMED] = 0
        undo.callback(vae.__dict__.pop, _STREAMED)
        for part in (vae.encoder, vae.decoder):
            statistics = Statistics()
            groups = _groups(part, statistics, joined)
            size = Fraction(2 ** (len(_blocks(part)) - 1) if hasattr(part, "down_blocks") else 1)  # in rows of latents
            for group in groups:
                vae.__dict__[_STREAMED] = max(vae.__dict__[_STREAMED], math.ceil(_halo(group) / size))
                size *= math.prod(Fraction(layer.up, layer.down) for layer in group)
            run = functools.partial(_run_groups, groups, elements=elements or ELEMENTS)
            outer = [part.conv_in, *part.down_blocks] if hasattr(part, "down_blocks") else [*part.up_blocks, *_tail(part)]
            runner = outer[-1] if hasattr(part, "down_blocks") else outer[0]
            for norm in _modules(nn.ModuleList(_blocks(part)), nn.GroupNorm):
                undo.enter_context(forward_replaced(norm, functools.partial(statistics.normalise, norm)))
            for module in outer:
                undo.enter_context(forward_replaced(module, functools.partial(run, statistics) if module is runner else _unchanged))
        yield


def _unchanged(x: Tensor, *_: Any) -> Tensor:
    return x


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward of one module."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _modules(root: nn.Module, kind: type[Any]) -> list[Any]:
    return [module for module in root.modules() if isinstance(module, kind)]


def _blocks(part: Any) -> list[Any]:
    """The blocks outside of the middle one, in the order of the forward pass."""
    return list(part.down_blocks if hasattr(part, "down_blocks") else part.up_blocks)


def _layers_of(block: Any) -> list[nn.Module]:
    return [*block.resnets, *(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())]


def _tail(part: Any) -> list[Any]:
    return [part.conv_norm_out, part.conv_act, part.conv_out]


def _groups(part: Any, statistics: Statistics, joined: int) -> list[list[_Layer]]:
    """The layers outside of the middle block in groups, between which the activation is kept.

    The `joined` blocks of the largest sizes are one group, with the layers between them and the picture. Of the others every residual
    layer is one, with the enlarging before it or the reducing after it.
    """
    blocks = [[_layer(layer) for layer in _layers_of(block)] for block in _blocks(part)]
    if hasattr(part, "down_blocks"):
        groups = [[_Layer(part.conv_in.forward, part.conv_in), *(layer for block in blocks[:joined] for layer in block)]]
        for layer in (layer for block in blocks[joined:] for layer in block):
            groups[-1].append(layer) if layer.down > 1 else groups.append([layer])
        return groups
    norm, act, conv = _tail(part)
    last = [_Layer(functools.partial(statistics.normalise, norm), norm), _Layer(act.forward, act), _Layer(conv.forward, conv)]
    groups, enlarging = [], list[_Layer]()
    for layer in (layer for block in blocks[:-joined] for layer in block):
        if layer.up > 1:
            enlarging = [layer]
        else:
            groups.append([*enlarging, layer])
            enlarging = []
    return [*groups, [*enlarging, *(layer for block in blocks[-joined:] for layer in block), *last]]


def _layer(module: Any) -> _Layer:
    name = type(module).__name__
    run = functools.partial(module, temb=None) if name == "ResnetBlock2D" else module
    return _Layer(run, module, up=2 if name == "Upsample2D" else 1, down=2 if name == "Downsample2D" else 1)


@torch.no_grad()
def _run_groups(groups: Sequence[Sequence[_Layer]], statistics: Statistics, x: Tensor, *_: Any, elements: int) -> Tensor:
    """The output of all groups for the input of the first; what is between them is overwritten where its size stays.

    Where ranks share a picture out, these are a rank's own rows.
    """
    ranks = group_of_bands()
    try:
        with over_ranks(None):
            for index, group in enumerate(groups):
                x = _run_group(group, statistics, x, elements, ranks, overwrite=index > 0)
    finally:
        statistics.forget()
    return x


def _run_group(group: Sequence[_Layer], statistics: Statistics, x: Tensor, elements: int, ranks: Any, *, overwrite: bool) -> Tensor:
    """The output of a group of layers: passes over the bands until the statistics of every norm are known, and one that computes it."""
    height, (rows, halo), above = x.shape[2], _band(group, x, elements), 0
    if ranks is not None:
        upper, lower = distributed.get_rank(ranks) > 0, distributed.get_rank(ranks) < distributed.get_world_size(ranks) - 1
        parts = neighbour_rows(x, halo, halo, ranks)
        x, above, overwrite = torch.cat(parts[1 - upper : 2 + lower], dim=2), halo * upper, True
    own = x[:, :, above : above + height]
    while True:
        out: Tensor | None = None
        waiting: tuple[int, Tensor] | None = None  # a band is written when the next has been read, which needs its rows unchanged
        for start in _starts(height, rows, meta=x.is_meta):
            stop = min(start + rows, height)
            top, end = max(0, above + start - halo), min(x.shape[2], above + stop + halo)
            statistics.band, statistics.whole = (
                (above + start - top, above + stop - top, end - top),
                stop - start == height and ranks is None,
            )
            try:
                y = functools.reduce(lambda value, layer: layer.run(value), group, x[:, :, top:end])
            except Unknown:
                continue
            if statistics.whole:
                return y
            scale = Fraction(y.shape[2], end - top)
            if out is None:
                size = len(x), y.shape[1], int(height * scale), y.shape[3]
                out = own if overwrite and size == own.shape and y.dtype == x.dtype else _empty(y, size)
            core = y[:, :, int((above + start - top) * scale) : int((above + stop - top) * scale)]
            _write(out, waiting)
            waiting = int(start * scale), core
        if statistics.pending is None:
            assert out is not None
            _write(out, waiting)
            return out
        statistics.finish(ranks)


def _empty(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """An empty tensor of another size with the dtype, device and memory format of one, by which layers choose their algorithm."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _write(out: Tensor, band: tuple[int, Tensor] | None) -> None:
    if band is not None:
        start, core = band
        out[:, :, start : start + core.shape[2]] = core


def _starts(height: int, rows: int, *, meta: bool) -> list[int]:
    """First rows of the bands. On the meta device, where only memory is counted, the first two stand for all."""
    return list(range(0, height, rows))[: 2 if meta else None]


def _halo(group: Sequence[_Layer]) -> int:
    """Rows above and below a band that a group of layers sees, of its input; a multiple of what the group reduces to one row."""
    scale, seen = Fraction(1), Fraction(0)
    for layer in group:
        scale *= layer.up
        seen += layer.radius / scale
        scale /= layer.down
    multiple = math.prod(layer.down for layer in group)
    return math.ceil(seen / multiple) * multiple


def _band(group: Sequence[_Layer], x: Tensor, elements: int) -> tuple[int, int]:
    """Rows of a band in the input of a group, and rows of its halo. Both are multiples of what the group reduces to one row."""
    scale, widest = Fraction(1), Fraction(x.shape[1])
    for layer in group:
        scale *= layer.up
        channels = max((max(conv.in_channels, conv.out_channels) for conv in _modules(layer.module, nn.Conv2d)), default=0)
        widest = max(widest, channels * scale**2)
        scale /= layer.down
    multiple, halo = math.prod(layer.down for layer in group), _halo(group)
    if x.shape[2] % multiple:  # such rows cannot be cut
        return x.shape[2], 0
    rows = int(elements / (widest * x.shape[3] * len(x))) // multiple * multiple
    return max(rows, halo, multiple), halo
