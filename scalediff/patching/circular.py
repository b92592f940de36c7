"""Convolutions that continue on the other side of the picture, along the axes that wrap.

Beside windows, a network that draws a seamless picture needs convolutions whose padding is the other side of the picture instead of zeros.
As a patched denoiser, each of them gets a subclass of its class; copies and pickles have the original one. Weights, hooks and functions do
not change, and undoing it restores the class. For a run it holds in its thread alone, since pipelines may share an autoencoder.

Legend: B batch, C channels, Y x X pixels or latents.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.patching.subclass import ATTRIBUTE, patch_class, restore_class

Wrap = tuple[bool, bool]
NO_WRAP: Wrap = (False, False)

_TILED = ("_tiled_encode", "tiled_decode", "_tiled_decode")  # methods of diffusers' autoencoders that run in tiles
_RESAMPLERS = {"FirDownsample2D", "FirUpsample2D", "KDownsample2D", "KUpsample2D"}  # of diffusers, which pad by themselves


@dataclass(frozen=True)
class _Seam:
    """The mark in the `__dict__` of a module that wraps: the axes, and the thread in which it does; None means all threads."""

    wrap: Wrap
    thread: int | None = None

    @property
    def applies(self) -> bool:
        """Whether the module wraps in this thread. A compiled graph belongs to the thread that runs it."""
        return self.thread is None or torch.compiler.is_compiling() or self.thread == threading.get_ident()


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()  # of networks in `wrapped`
_LOCKS_LOCK = threading.Lock()


def check_convolutions(parts: Iterable[nn.Module], wrap: Wrap) -> None:
    """Check that all padding in some networks can continue on the other side.

    Raises:
        NotImplementedError: A network has modules whose padding cannot.
    """
    if wrap == NO_WRAP:
        return
    for part in parts:
        for name, module in part.named_modules():
            if why := _obstacle(module):
                raise NotImplementedError(f"wrap does not support {type(part).__name__}: {name or 'it'} is {why}, got {wrap=}")


def set_wrap(parts: Iterable[nn.Module], wrap: Wrap) -> None:
    """Let the padding of all convolutions in some networks continue on the other side along the axes of `wrap`, or of none again."""
    for part in parts:
        for module in _padding_modules(part):
            _set_seam(module, None if wrap == NO_WRAP else _Seam(wrap))


@contextmanager
def wrapped(parts: Sequence[nn.Module], wrap: Wrap) -> Iterator[None]:
    """As `set_wrap` in a `with` block and for this thread alone; every module is afterwards as it was before.

    Another thread that wraps one of the networks waits.

    Raises:
        NotImplementedError: As `check_convolutions`.
    """
    check_convolutions(parts, wrap)
    with ExitStack() as undo:
        for part in sorted(parts, key=id):  # in one order in all threads, so that none waits for another that waits for it
            undo.enter_context(_lock_of(part))
        for module in [module for part in parts for module in _padding_modules(part)]:
            before = module.__dict__.get(ATTRIBUTE)
            if before != _Seam(wrap):  # else it wraps in all threads already
                undo.callback(_set_seam, module, before)
                _set_seam(module, None if wrap == NO_WRAP else _Seam(wrap, threading.get_ident()))
        yield


def wraps_rows(part: nn.Module) -> bool:
    """Whether a network's rows continue on the other side at present, from the last to the first."""
    seams = (module.__dict__.get(ATTRIBUTE) for module in part.modules())
    return any(isinstance(seam, _Seam) and seam.applies and seam.wrap[0] for seam in seams)


def _lock_of(part: nn.Module) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(part, threading.RLock())


def _set_seam(module: nn.Module, seam: _Seam | None) -> None:
    now, kind = module.__dict__.get(ATTRIBUTE), _kind(module)
    if isinstance(now, _Seam):
        restore_class(module, now)
    if seam is not None:
        patch_class(module, seam, _methods(kind, seam.wrap))


def _wraps(module: Any) -> bool:
    """Whether a module of a subclass made here wraps; a copy does not."""
    seam = module.__dict__.get(ATTRIBUTE)
    return seam is not None and seam.applies


def _padding_modules(part: nn.Module) -> list[nn.Module]:
    return [module for module in part.modules() if _kind(module)]


def _kind(module: nn.Module) -> str:
    """How a module pads: `"convolution"`, `"downsampling"` (diffusers' with a column and a row of zeros) or `"tiles"`; empty if not."""
    if isinstance(module, nn.Conv2d):
        pads = module.padding_mode != "circular" and any(module._reversed_padding_repeated_twice)
        return "convolution" if pads else ""
    if type(module).__name__ == "Downsample2D" and getattr(module, "use_conv", False) and getattr(module, "padding", 1) == 0:
        return "downsampling"
    own_patch = module.__dict__.get(ATTRIBUTE)
    tiles = any(hasattr(module, name) for name in _TILED) and (own_patch is None or isinstance(own_patch, _Seam))
    return "tiles" if tiles else ""


def _obstacle(module: nn.Module) -> str:
    """Why the padding of a module cannot continue on the other side; empty if it can, or if the module has none."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d):
        if not any(module._reversed_padding_repeated_twice) or module.padding_mode == "circular":
            return ""
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"a convolution with padding={module.padding!r}, padding_mode={module.padding_mode!r}"
        return ""
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    other = isinstance(module, nn.Conv1d | nn.Conv3d) and any(module._reversed_padding_repeated_twice)
    padding = getattr(nn.modules.padding, name, None) is not None and "Circular" not in name
    return f"a {name}, which pads" if transposed or other or padding or name in _RESAMPLERS else ""


@functools.cache  # torch.compile can then reuse a graph in the next run
def _methods(kind: str, wrap: Wrap) -> Callable[[type], dict[str, Callable[..., Any]]]:
    """The function that makes the methods of a module's class, for `patch_class`."""
    make = {"convolution": _convolution, "downsampling": _downsampling, "tiles": _tiles}[kind]
    return lambda cls: make(cls, wrap)


def _convolution(cls: Any, wrap: Wrap) -> dict[str, Callable[..., Any]]:
    wrap_y, wrap_x = wrap

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _wraps(self):
            return cls._conv_forward(self, input, weight, bias)  # type: ignore[no-any-return]
        y, x = self.padding
        around = F.pad(input, (x * wrap_x, x * wrap_x, y * wrap_y, y * wrap_y), mode="circular")
        return F.conv2d(around, weight, bias, self.stride, (y * (not wrap_y), x * (not wrap_x)), self.dilation, self.groups)

    return {"_conv_forward": _conv_forward}


def _downsampling(cls: Any, wrap: Wrap) -> dict[str, Callable[..., Any]]:
    """Of diffusers' module that appends a row and a column of zeros: two of the other side before them, and one result less."""
    wrap_y, wrap_x = wrap

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _wraps(self):
            return cls.forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        around = F.pad(hidden_states, (0, 2 * wrap_x, 0, 2 * wrap_y), mode="circular")
        out: Tensor = cls.forward(self, around, *args, **kwargs)
        return out[..., : out.shape[-2] - wrap_y, : out.shape[-1] - wrap_x]

    return {"forward": forward}


def _tiles(cls: Any, wrap: Wrap) -> dict[str, Callable[..., Any]]:
    """Of an autoencoder that runs in tiles: it goes on beyond the border for as much as tiles overlap, and the two are blended."""

    def continued(name: str) -> Callable[..., Any]:
        original = getattr(cls, name)

        @functools.wraps(original)
        def run(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _wraps(self):
                return original(self, x, *args, **kwargs)
            of_pixels, of_latents = self.tile_sample_min_size, self.tile_latent_min_size
            overlap = max(1, int(of_latents * self.tile_overlap_factor)) * (of_pixels // of_latents if "encode" in name else 1)
            sizes = tuple(x.shape[-2:])
            margins = tuple(min(overlap, n) if on else 0 for n, on in zip(sizes, wrap, strict=True))
            for dim, margin in zip((-2, -1), margins, strict=True):
                x = torch.cat([x, x.narrow(dim, 0, margin)], dim=dim) if margin else x
            return _of_output(original(self, x, *args, **kwargs), functools.partial(_closed, sizes=sizes, margins=margins))

        return run

    return {name: continued(name) for name in _TILED if hasattr(cls, name)}


def _of_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of an autoencoder's method, a tensor, a tuple with it or an object with it as `sample`, with the tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


def _closed(out: Tensor, sizes: tuple[int, ...], margins: tuple[int, ...]) -> Tensor:
    """Cut a result that goes on beyond the end of a picture, and blend what is beyond it into the beginning.

    Args:
        out: `[B, C, Y, X]` of a picture of `sizes` and `margins` beyond it, in proportion.
        sizes, margins: `(Y, X)`.
    """
    for dim, size, margin in zip((-2, -1), sizes, margins, strict=True):
        if not margin:
            continue
        kept = out.shape[dim] * size // (size + margin)
        beyond = out.shape[dim] - kept
        share = ((torch.arange(beyond, device=out.device, dtype=torch.float64) + 0.5) / beyond).to(out.dtype)
        share = share.view(-1, *[1] * (-1 - dim))
        blended = share * out.narrow(dim, 0, beyond) + (1 - share) * out.narrow(dim, kept, beyond)
        out = torch.cat([blended, out.narrow(dim, beyond, kept - beyond)], dim=dim)
    return out
