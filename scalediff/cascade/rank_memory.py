"""Estimate the memory of one rank of a mesh, by an upper bound: how large it is depends on the rank, and on the order of its messages.

It is that of a picture with the rows of a band, and the largest copy that a layer makes to see beside its band: a convolution of its input
with two rows more, a group norm of a part of its input in fp32, attention of keys and values with those of the halo. In the base stage, a
rank is taken to compute the whole picture.

Legend: B batch, H heads, S tokens, D head dim, C channels, Y x X rows and columns of a band.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from scalediff.cascade.autoencoder_memory import band_bytes, meta_copy, vae_bytes, wrap_meta_errors
from scalediff.cascade.borrowing import sample_of
from scalediff.cascade.memory import Estimate, estimate, first_denoiser_call, images_per_call, joined_sizes
from scalediff.cascade.pipeline import cascade_of, native_size, size_multiple
from scalediff.cascade.splitting import has_bands, split_obstacle
from scalediff.cost.flops import set_attributes
from scalediff.cost.tally import peak_bytes
from scalediff.patching.networks import denoiser_of
from scalediff.patching.splits import Shares
from scalediff_kernels.distributed.bands import NORM_ELEMENTS


def estimate_rank(pipe: Any, arguments: Mapping[str, Any], size: tuple[int, int], shares: Shares) -> Estimate:
    """Estimate the memory of one rank, by an upper bound; arguments and errors as in `estimate`, and the shares of the denoiser."""
    native = native_size(pipe)
    base = estimate(pipe, arguments, native)
    if size[0] * size[1] <= native[0] * native[1]:
        return base
    multiple = size_multiple(pipe)
    band = -(-size[0] // (shares.rows * multiple)) * multiple, size[1]
    halo = min(2 * native[0] / band[0], shares.rows - 1)
    args, kwargs, batch = first_denoiser_call(pipe, arguments, band)
    denoiser = denoiser_of(pipe)
    twin = meta_copy(denoiser)
    set_attributes(twin, cascade_of(pipe).attributes(pipe, *size))
    run = functools.partial(twin, *args, **kwargs)
    with wrap_meta_errors(denoiser):
        held = peak_bytes(run) if shares.rows == 1 else band_peak(run, halo)
    sample = sample_of(args, kwargs)
    held += 3 * shares.rows * sample.numel() * sample.element_size()  # the output, while it is gathered
    halves = base.halves if shares.samples == 1 else 1
    if sample.shape[0] % shares.samples == 0:
        held //= shares.samples
    ranks = ranks_of_autoencoder(pipe, size, shares)
    whole = vae_bytes(pipe.vae, size, batch, tiled=False) if ranks == 1 else band_bytes(pipe.vae, size, batch, ranks)
    in_parts = vae_bytes(pipe.vae, size, batch, tiled=True, joined=joined_sizes(pipe, size, images_per_call(arguments)))
    return Estimate(base.weights, max(held, base.denoiser), halves, max(whole, base.vae), max(in_parts, base.vae_tiled))


def ranks_of_autoencoder(pipe: Any, size: tuple[int, int], shares: Shares) -> int:
    """Number of ranks that share the rows of pictures of (height, width) pixels out in the autoencoder; 1 where each computes all."""
    bands = has_bands(pipe.vae, size, native_size(pipe), shares.pictures) and not split_obstacle(pipe.vae)
    return shares.pictures if bands else 1


def band_peak(run: Callable[[], Any], halo: float) -> int:
    """Peak bytes of a pass of one band on the meta device, at most.

    Args:
        run: Calls the denoiser with the latents of the band.
        halo: Rows that attention receives, in bands.
    """
    copies = _Copies(halo)

    def counted() -> None:
        with copies:
            run()

    return peak_bytes(counted) + copies.largest


class _Copies(TorchFunctionMode):
    """Watches the layers of a pass for the bytes that one of them needs for more than its band; `largest` is the most of any."""

    def __init__(self, halo: float) -> None:
        self._halo, self.largest = halo, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d:
            self._note(_convolution(*args[:2]))
        elif function is F.group_norm:
            self._note(_norm(*args[:2]))
        elif function is F.scaled_dot_product_attention:
            self._note(self._attention(*[kwargs[name] for name in ("query", "key")] if "key" in kwargs else args[:2]))
        return function(*args, **kwargs)

    def _note(self, size: float) -> None:
        self.largest = max(self.largest, int(size))

    def _attention(self, q: Tensor, k: Tensor) -> float:
        """Of queries and keys `[B, H, S, D]`: keys and values in one piece, what is received and sent, and a part of the output."""
        return (2 * (1 + 2 * self._halo) * k.numel() + q.numel()) * k.element_size()


def _convolution(x: Tensor, weight: Tensor) -> float:
    """Of `[B, C, Y, X]`: the band with a row above and below."""
    return x.numel() * x.element_size() * (1 + 2 / x.shape[-2]) if weight.shape[-2] > 1 else 0


def _norm(x: Tensor, groups: int) -> float:
    """Of `[B, C, ...]`: some groups in fp32, twice."""
    return 2 * 4 * min(x.numel(), max(NORM_ELEMENTS, x.numel() // groups))
