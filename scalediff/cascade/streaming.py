"""Encode and decode in bands of rows, in a fraction of the memory, with the result of one piece up to rounding: no seams.

A band of a convolution needs a few rows around it, its halo. A band of a group norm needs the mean and the variance of the whole
activation. So the layers run band by band, as often as they have norms: every pass computes the statistics of the next norm, and the
last pass computes the output. Between groups of layers the activation is kept as a whole; inside a group nothing is kept. The layers at
the size of the picture, whose activations are the largest, are one group; with less memory they are joined by those of the next sizes,
which are then computed more often. The middle block runs as one piece, at the size of the latents, so that its attention sees all of them.

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
from torch import Tensor, nn

from scalediff.patching.circular import wraps_rows

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


class _Unknown(Exception):
    """The statistics of a norm are not known yet; those of this band have been added to them."""


class _Statistics:
    """Mean and variance of the inputs of norms over all bands, and the norms with these.

    Attributes:
        band: First row of the band, its end, and the number of rows, in the input of the group with its halo.
        whole: Whether this band is all there is, so that a norm is computed as usual.
        pending: The norm whose statistics are being collected; None if all that were needed were known.
    """

    def __init__(self) -> None:
        self.band, self.whole = (0, 0, 0), False
        self.forget()

    def forget(self) -> None:
        """Begin again, for another input."""
        self.pending: nn.GroupNorm | None = None
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._rows, self._mean, self._squares = 0, torch.empty(0), torch.empty(0)

    def normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """The norm of a band `[B, C, Y, X]`, by the statistics of all bands.

        Raises:
            _Unknown: They are not known yet.
        """
        if self.whole:
            return type(norm).forward(norm, x)
        if norm not in self._known:
            self._collect(norm, x)
            raise _Unknown
        scale, shift = self._known[norm]
        return x.mul(scale).add_(shift).to(x.dtype)

    def finish(self) -> None:
        """Make scale and shift of the pending norm from the statistics of all bands."""
        norm = self.pending
        assert norm is not None
        groups = norm.num_groups
        scale = (self._squares / self._rows + norm.eps).rsqrt().repeat_interleave(norm.num_channels // groups, dim=1)
        mean = self._mean.repeat_interleave(norm.num_channels // groups, dim=1)
        if norm.affine:
            scale = scale * norm.weight
        shift = -mean * scale + (norm.bias if norm.affine else 0)
        self._known[norm] = scale[..., None, None], shift[..., None, None]
        self.pending, self._rows = None, 0

    def _collect(self, norm: nn.GroupNorm, x: Tensor) -> None:
        """Add the rows of the band, without its halo, to mean and sum of squared deviations `[B, G]`: Chan et al. 1979, equation 2.1."""
        assert self.pending in (None, norm)
        start, stop, rows = self.band
        top, end = start * x.shape[2] // rows, stop * x.shape[2] // rows
        values = x[:, :, top:end].to(torch.promote_types(x.dtype, torch.float32)).reshape(len(x), norm.num_groups, -1)
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        new, before = end - top, self._rows
        if self.pending is None:
            self.pending, self._mean, self._squares = norm, torch.zeros_like(mean), torch.zeros_like(mean)
        delta, self._rows = mean - self._mean, before + new
        self._squares += variance * new + delta**2 * (before * new / self._rows)
        self._mean += delta * (new / self._rows)


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
        for part in (vae.encoder, vae.decoder):
            statistics = _Statistics()
            groups = _groups(part, statistics, joined)
            run = functools.partial(_run_groups, groups, elements=elements or ELEMENTS)
            outer = [part.conv_in, *part.down_blocks] if hasattr(part, "down_blocks") else [*part.up_blocks, *_tail(part)]
            runner = outer[-1] if hasattr(part, "down_blocks") else outer[0]
            for norm in _modules(nn.ModuleList(_blocks(part)), nn.GroupNorm):
                undo.enter_context(_forward_replaced(norm, functools.partial(statistics.normalise, norm)))
            for module in outer:
                undo.enter_context(_forward_replaced(module, functools.partial(run, statistics) if module is runner else _unchanged))
        vae.__dict__[_STREAMED] = True
        undo.callback(vae.__dict__.pop, _STREAMED)
        yield


def _unchanged(x: Tensor, *_: Any) -> Tensor:
    return x


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
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


def _groups(part: Any, statistics: _Statistics, joined: int) -> list[list[_Layer]]:
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
def _run_groups(groups: Sequence[Sequence[_Layer]], statistics: _Statistics, x: Tensor, *_: Any, elements: int) -> Tensor:
    """The output of all groups for the input of the first; what is between them is overwritten where its size stays."""
    try:
        for index, group in enumerate(groups):
            x = _run_group(group, statistics, x, elements, overwrite=index > 0)
    finally:
        statistics.forget()
    return x


def _run_group(group: Sequence[_Layer], statistics: _Statistics, x: Tensor, elements: int, *, overwrite: bool) -> Tensor:
    """The output of a group of layers: passes over the bands until the statistics of every norm are known, and one that computes it."""
    height, (rows, halo) = x.shape[2], _band(group, x, elements)
    while True:
        out: Tensor | None = None
        waiting: tuple[int, Tensor] | None = None  # a band is written when the next has been read, which needs its rows unchanged
        for start in _starts(height, rows, meta=x.is_meta):
            stop = min(start + rows, height)
            top, end = max(0, start - halo), min(height, stop + halo)
            statistics.band, statistics.whole = (start - top, stop - top, end - top), stop - start == height
            try:
                y = functools.reduce(lambda value, layer: layer.run(value), group, x[:, :, top:end])
            except _Unknown:
                continue
            if statistics.whole:
                return y
            scale = Fraction(y.shape[2], end - top)
            if out is None:
                size = len(x), y.shape[1], int(height * scale), y.shape[3]
                out = x if overwrite and size == x.shape and y.dtype == x.dtype else _empty(y, size)
            core = y[:, :, int((start - top) * scale) : int((stop - top) * scale)]
            _write(out, waiting)
            waiting = int(start * scale), core
        if statistics.pending is None:
            assert out is not None
            _write(out, waiting)
            return out
        statistics.finish()


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


def _band(group: Sequence[_Layer], x: Tensor, elements: int) -> tuple[int, int]:
    """Rows of a band in the input of a group, and rows of its halo. Both are multiples of what the group reduces to one row."""
    scale, widest, seen = Fraction(1), Fraction(x.shape[1]), Fraction(0)
    for layer in group:
        scale *= layer.up
        seen += layer.radius / scale
        channels = max((max(conv.in_channels, conv.out_channels) for conv in _modules(layer.module, nn.Conv2d)), default=0)
        widest = max(widest, channels * scale**2)
        scale /= layer.down
    multiple = math.prod(layer.down for layer in group)
    if x.shape[2] % multiple:  # such rows cannot be cut
        return x.shape[2], 0
    halo = math.ceil(seen / multiple) * multiple
    rows = int(elements / (widest * x.shape[3] * len(x))) // multiple * multiple
    return max(rows, halo, multiple), halo
