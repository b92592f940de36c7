"""The autoencoder over the ranks of a mesh: each encodes and decodes a band of rows, and all hold the whole result, with the same bits.

Convolutions receive the rows beside the band, group norms the statistics of all bands, as in a U-Net (`scalediff.patching.bands`).
Attention receives the keys and values of all bands. A reducing layer, which pads with a row below the picture, receives that below the
band.

Legend: B batch, C channels, Y x X rows and columns of one rank, S tokens of one rank.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from scalediff.cascade.borrowing import is_tiled
from scalediff.cascade.streaming import forward_replaced, rows_of_halo, stream_obstacle
from scalediff.cascade.workdir import digest, fingerprint_weights
from scalediff.patching.bands import group_of_bands, over_ranks
from scalediff.patching.rows import tensor_facts
from scalediff.patching.subclass import is_patched
from scalediff_kernels.distributed.bands import gather_bands, neighbour_rows
from scalediff_kernels.distributed.groups import check_agreement

_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "XFormersAttnProcessor",
}  # of diffusers, whose keys and values are those of `to_k`, `to_v`


def split_obstacle(vae: Any) -> str:
    """Why the rows of an autoencoder cannot be split over ranks; empty if they can."""
    if obstacle := stream_obstacle(vae):
        return obstacle
    name = type(vae).__name__
    for part in (vae.encoder, vae.decoder):
        if is_patched(part):
            return f"the attention of {name} is patched"
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in part.modules()):
            return f"parts of {name} are compiled"
        processors = {type(module.processor).__name__ for module in part.modules() if hasattr(module, "processor")}
        if processors - _PROCESSORS:
            return f"{name} has attention processors that may see one band alone: {', '.join(sorted(processors - _PROCESSORS))}"
    return ""


def has_bands(vae: Any, size: tuple[int, int], native: tuple[int, int], ranks: int) -> bool:
    """Whether pictures of (height, width) pixels have equal bands of latents for ranks, and more than the native area."""
    return size[0] % (ranks * _factor(vae)) == 0 and size[0] * size[1] > native[0] * native[1]


def _factor(vae: Any) -> int:
    """Pixels per latent along an axis."""
    return 2 ** (len(vae.encoder.down_blocks) - 1) if hasattr(getattr(vae, "encoder", None), "down_blocks") else 1


class AutoencoderSplit:
    """An autoencoder whose pictures are split by rows.

    Args:
        vae: The autoencoder.
        groups: The process groups of a mesh; rows are split over the first.
        native: (height, width) in pixels; a picture of no larger area is computed whole on every rank.
    """

    def __init__(self, vae: Any, groups: tuple[Any, ...], native: tuple[int, int]) -> None:
        self.vae, self.group, self._groups, self._native = vae, groups[0], groups, native
        self.factor, self.obstacle = _factor(vae), split_obstacle(vae)

    def ranks_at(self, height: int, width: int) -> int:
        """Number of ranks that share a picture of these pixels out; 1 where each computes all of it."""
        ranks = distributed.get_world_size(self.group)
        return ranks if not self.obstacle and has_bands(self.vae, (height, width), self._native, ranks) else 1

    def run(self, forward: Callable[..., Tensor], pixels: int, x: Tensor, *args: Any) -> Tensor:
        """The result of an encoder or decoder, `[B, C, Y, X]`, of which a row or column is `pixels` of the picture's.

        Raises:
            ValueError: The ranks have different inputs.
        """
        height, width = x.shape[2] * pixels, x.shape[3] * pixels
        ranks, least = self.ranks_at(height, width), self.factor * rows_of_halo(self.vae)
        if ranks == 1 or getattr(self.vae, "use_tiling", False) or height < ranks * least:
            return forward(x, *args)
        check_agreement(self._groups, tensor_facts({"the input of the autoencoder": x}))
        with over_ranks(self.group):
            band = forward(x.chunk(ranks, dim=2)[distributed.get_rank(self.group)], *args)
        return gather_bands(band, self.group)


@contextmanager
def split_autoencoder(vae: Any, groups: tuple[Any, ...], native: tuple[int, int], options: Mapping[str, Any]) -> Iterator[AutoencoderSplit]:
    """Split the pictures of an autoencoder over the ranks of a group in this thread, if its layers allow it; it is restored on exit.

    Args:
        vae, groups, native: As in `AutoencoderSplit`.
        options: Options of the run that all ranks must have, by name.

    Raises:
        ValueError: The ranks have different autoencoders or options.
    """
    split = AutoencoderSplit(vae, groups, native)
    facts = {
        **{name: repr(value) for name, value in options.items()},
        "the autoencoder": f"{type(vae).__name__} {digest(dict(vae.config))}",
        "the digest of the autoencoder's weights": fingerprint_weights([vae]),
        "the tiling of the autoencoder": str(is_tiled(vae)),
        "the split of the autoencoder": split.obstacle or "by rows",
    }
    check_agreement(groups, facts)
    with ExitStack() as undo:
        if not split.obstacle:
            for part, pixels in ((vae.encoder, 1), (vae.decoder, split.factor)):
                for module, forward in _replacements(part):
                    undo.enter_context(forward_replaced(module, forward))
                run = torch.compiler.disable(functools.partial(split.run, part.forward, pixels))
                undo.enter_context(forward_replaced(part, _in_this_thread(part.forward, run)))
        yield split


def _replacements(part: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """The layers of an encoder or decoder that see more than a band in other ways than by convolutions and norms, and their forwards."""
    for module in part.modules():
        if type(module).__name__ == "Downsample2D" and module.use_conv and module.padding == 0:
            yield module, functools.partial(_reduced, module, module.forward)
        for name in ("to_k", "to_v"):
            if isinstance(layer := getattr(module, name, None), nn.Module):
                yield layer, functools.partial(_gathered, layer.forward)


def _in_this_thread(whole: Callable[..., Tensor], run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` in the thread that calls this function, and `whole` in others, whose pipelines may have the same autoencoder."""
    thread = threading.get_ident()
    return lambda *args: (run if threading.get_ident() == thread else whole)(*args)


def _reduced(module: Any, forward: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """The output `[B, C, Y / 2, X / 2]` of diffusers' reducing layer, which pads with a row below and a column on the right."""
    group = group_of_bands()
    if group is None:
        return forward(x, *args)
    x = F.pad(torch.cat(neighbour_rows(x, 0, 1, group), dim=2), (0, 1))
    with over_ranks(None):
        out: Tensor = module.conv(x)
    return out


def _gathered(forward: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The keys or values of all bands, `[B, S of all ranks, C]`."""
    out, group = forward(x), group_of_bands()
    return out if group is None else gather_bands(out.transpose(1, 2), group).transpose(1, 2)
