"""Memory of encoding and decoding, in one piece and in parts, by running the autoencoder's code on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.cascade import streaming
from scalediff.cascade.latents import encoded_mode, is_video_vae
from scalediff.cascade.streaming import sizes_of, stream_obstacle
from scalediff.cost.stand_ins import runnable_on_meta
from scalediff.cost.tally import peak_bytes
from scalediff.patching.subclass import original_class

FRAGMENTATION = 1.1  # factor on the activations for gaps in the allocator's memory; not measured yet
_TILES = 1.8  # area of all tiles in pictures: they overlap by a quarter of a side


def vae_bytes(vae: Any, size: tuple[int, int], batch: int, *, tiled: bool, joined: int = 1) -> int:
    """Bytes of activations for encoding or decoding pictures of (height, width) pixels, whichever is larger.

    `tiled` means in parts: in bands where the autoencoder can be streamed and its tiling is off, otherwise in diffusers' tiles. `joined`
    is an argument of `streamed`.

    Raises:
        NotImplementedError: The autoencoder's code does not run on the meta device.
    """
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    dtype = torch.float32 if upcast else vae.dtype
    tile = getattr(vae, "tile_sample_min_size", getattr(vae, "tile_sample_min_height", None))
    in_bands = tiled and runs_in_bands(vae)
    if not tiled or in_bands or tile is None or max(size) <= tile:
        config = tuple(sorted((name, repr(value)) for name, value in vae.config.items()))
        key = original_class(type(vae)), config, size, batch, dtype, in_bands and (joined, streaming.ELEMENTS)
        if key not in _VAE_BYTES:
            _VAE_BYTES[key] = _vae_bytes(vae, size, batch, dtype, joined=joined if in_bands else 0)
        return _VAE_BYTES[key]
    one = vae_bytes(vae, (min(tile, size[0]), min(tile, size[1])), batch, tiled=False)
    picture = 3 * batch * size[0] * size[1] * dtype.itemsize
    return int(max(one + _TILES * picture, (_TILES + 2) * picture))  # at the last tile, or at the end, with both the rows and the result


_VAE_BYTES: dict[Any, int] = {}  # cache


def _vae_bytes(vae: Any, size: tuple[int, int], batch: int, dtype: torch.dtype, *, joined: int) -> int:
    with wrap_meta_errors(vae), ExitStack() as undo:
        twin = cast(meta_copy(vae), dtype)
        if joined:
            undo.enter_context(streaming.streamed(twin, joined=joined))
        frame = (1,) if is_video_vae(vae) else ()
        picture = torch.empty(batch, 3, *frame, *size, device="meta", dtype=dtype)
        latents: list[Tensor] = []
        encoding = peak_bytes(lambda: latents.append(encoded_mode(twin, picture)))
        decoding = peak_bytes(lambda: twin.decode(latents[0]).sample)
    return max(encoding, decoding)


def band_bytes(vae: Any, size: tuple[int, int], batch: int, ranks: int) -> int:
    """Bytes of activations for a band of pictures of (height, width) pixels, of which each of some ranks has as many rows, in one piece.

    Beside those of the band: a copy of its largest activation, with the rows of its neighbours; the keys and values of all bands; and the
    whole picture twice, while it is gathered.

    Raises:
        NotImplementedError: As `vae_bytes`.
    """
    band = vae_bytes(vae, (size[0] // ranks, size[1]), batch, tiled=False)
    channels, pixels = vae.config.block_out_channels, batch * size[0] * size[1]
    copied = channels[min(1, len(channels) - 1)] * pixels // ranks
    gathered = (2 * 2 * channels[-1] * pixels // 4 ** (len(channels) - 1), 2 * 3 * pixels)
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    return int(band + max(copied, *gathered) * (4 if upcast else vae.dtype.itemsize))


def runs_in_bands(vae: Any) -> bool:
    """Whether the parts of an autoencoder are bands, and not diffusers' tiles."""
    return not getattr(vae, "use_tiling", False) and not stream_obstacle(vae)


def join_sizes(vae: Any, size: tuple[int, int], batch: int, room: int) -> int:
    """The smallest argument `joined` of `streamed` with which activations need no more than `room` bytes, or the one that needs least."""
    if not runs_in_bands(vae):
        return 1
    needs = vae_bytes(vae, size, batch, tiled=True)
    for joined in range(1, sizes_of(vae)):
        more = vae_bytes(vae, size, batch, tiled=True, joined=joined + 1)
        if FRAGMENTATION * needs <= room or more >= needs:
            return joined
        needs = more
    return sizes_of(vae)


def meta_copy(network: Any) -> Any:
    """The same network on the meta device, without weights."""
    with torch.device("meta"):
        twin = original_class(type(network)).from_config(network.config)  # type: ignore[attr-defined]
    return runnable_on_meta(cast(twin, network.dtype))


def cast(twin: Any, dtype: torch.dtype) -> Any:
    """A network on the meta device in another dtype, for inference."""
    return nn.Module.to(twin, dtype).eval()  # not diffusers' `to`, whose warnings do not matter on the meta device


@contextmanager
def wrap_meta_errors(network: nn.Module) -> Iterator[None]:
    """Raise NotImplementedError where the network's code does not run on the meta device."""
    try:
        yield
    except Exception as error:  # the network's code may raise anything on the meta device
        raise NotImplementedError(f"the memory of {type(network).__name__} cannot be estimated: {error}") from error
