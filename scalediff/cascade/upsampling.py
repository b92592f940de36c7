"""The upsampling of pictures between stages: bicubic, or a function or super-resolution network that the user chooses.

Legend: B batch, y x x picture, k factor of a network.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.arguments import wrong_type
from scalediff.cascade.pictures import around, upsampled
from scalediff.cascade.workdir import digest, fingerprint_weights
from scalediff.families.grid import Grid

# From pictures [B, 3, y, x] in [0, 1] to larger ones.
Upsampler = Callable[[Tensor], Tensor]

TILE = 256  # pixels per side of a tile, before the network enlarges it
MARGIN = 32  # pixels around a tile that the network sees too, so that borders of tiles do not show


def upsampled_picture(
    picture: Tensor, size: Grid, upsampler: Upsampler | None = None, *, wrap: tuple[bool, bool] = (False, False)
) -> Tensor:
    """Enlarge pictures `[B, 3, y, x]` in [-1, 1] to exactly (height, width) = `size`, across the border along axes that wrap.

    Without an upsampler this is bicubic interpolation. An upsampler is applied to the picture clamped to [0, 1], again and again until the
    picture is at least as large as `size`; bicubic interpolation, antialiased where it shrinks, then makes it that size.

    Raises:
        ValueError: The upsampler does not return larger pictures `[B, 3, Y, X]`.
        TypeError: It does not return a tensor.
    """
    if upsampler is None:
        return upsampled(picture, size, wrap=wrap)
    larger = picture.clamp(-1, 1) / 2 + 0.5
    while larger.shape[-2] < size[0] or larger.shape[-1] < size[1]:
        larger = _applied(upsampler, larger, wrap)
    larger = (2 * larger - 1).to(picture)
    if tuple(larger.shape[-2:]) == tuple(size):
        return larger
    return upsampled(larger, size, wrap=wrap, antialias=True)


def _applied(upsampler: Upsampler, picture: Tensor, wrap: tuple[bool, bool]) -> Tensor:
    """The enlarged picture. Along axes that wrap, the upsampler also sees some of the other side, which is cut off again.

    The noise of a network is that of the picture alone, and continues on the other side as the picture does.
    """
    margins = [MARGIN if on else 0 for on in wrap]
    noise = [upsampler.noise(picture)] if isinstance(upsampler, NetworkUpsampler) and upsampler.noise is not None else []
    for axis, margin in enumerate(margins):
        picture, *noise = [around(x, axis, margin) if margin else x for x in (picture, *noise)]
    larger = _checked(upsampler, picture, *noise)
    for dim, margin in zip((-2, -1), margins, strict=True):
        factor, rest = divmod(larger.shape[dim], picture.shape[dim])
        if margin and rest:
            raise ValueError(
                f"upsampler must enlarge by a whole number along an axis that wraps, got {tuple(larger.shape)} of {tuple(picture.shape)}"
            )
        larger = larger.narrow(dim, margin * factor, larger.shape[dim] - 2 * margin * factor)
    return larger


def _checked(upsampler: Callable[..., Any], picture: Tensor, *noise: Tensor) -> Tensor:
    found = upsampler(picture, *noise)
    if not isinstance(found, Tensor):
        raise TypeError(f"upsampler must return a tensor, got {type(found).__name__}")
    (batch, channels, y, x), shape = picture.shape, tuple(found.shape)
    if len(shape) != 4 or shape[:2] != (batch, channels) or shape[2] <= y or shape[3] <= x:
        raise ValueError(f"upsampler must return larger pictures [B, 3, Y, X] of {tuple(picture.shape)}, got {shape}")
    return found


@dataclass(frozen=True)
class NetworkUpsampler:
    """A super-resolution network that enlarges pictures `[B, 3, y, x]` in [0, 1] by `factor`, in fp32 and in tiles.

    Attributes:
        network: Function from a picture to the enlarged one, with `.to(device)`; as spandrel loads it.
        factor: How much larger the picture becomes along an axis.
        tile: Pixels per side of a tile; None runs the network on the whole picture.
        fingerprint: A hash of the weights.
        noise: Function from a picture to the noise `[B, C, y, x]` that the network also takes; None if it takes the picture alone.
    """

    network: Any
    factor: int
    tile: int | None = TILE
    fingerprint: str = ""
    noise: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, picture: Tensor, noise: Tensor | None = None) -> Tensor:
        """The enlarged picture, with this noise in place of `noise(picture)`."""
        self.network.to(picture.device)
        if noise is None and self.noise is not None:
            noise = self.noise(picture)
        given, k = [x.float() for x in (picture, noise) if x is not None], self.factor
        (y, x), tile = picture.shape[-2:], self.tile or max(picture.shape[-2:])
        whole = given[0].new_empty(*picture.shape[:2], k * y, k * x)
        for top in range(0, y, tile):
            for left in range(0, x, tile):
                bottom, right = min(top + tile, y), min(left + tile, x)
                y0, x0 = max(top - MARGIN, 0), max(left - MARGIN, 0)
                seen = self.network(*(one[..., y0 : bottom + MARGIN, x0 : right + MARGIN] for one in given))
                part = seen[..., k * (top - y0) : k * (bottom - y0), k * (left - x0) : k * (right - x0)]
                whole[..., k * top : k * bottom, k * left : k * right] = part
        return whole.to(picture.dtype)


def load_upsampler(path: str | PathLike[str]) -> NetworkUpsampler:
    """Load a single-image super-resolution network of any architecture that the package spandrel knows, or the embedded model's.

    Args:
        path: A file of weights: `.safetensors`, or `.pth`, which is read with `weights_only`, so that it cannot run code. `"demo"` is the
            network of `scalediff.demo.upsampler`, which needs no spandrel.

    Raises:
        ValueError: The file is missing or corrupted, its architecture is not known, it is not for single pictures of 3 channels, or
            it does not enlarge them.
        ImportError: spandrel is not installed (`pip install "scalediff[upsampler]"`).
    """
    if str(path) == "demo":
        return _load_demo_upsampler()
    file = Path(path)
    weights = _read_weights(file)
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # torchvision, which it imports, raises RuntimeError beside a torch of another build
        raise ImportError(f'an upsampler from a file needs spandrel: pip install "scalediff[upsampler]" ({error})') from error
    try:
        found = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(dict(weights)))
    except spandrel.UnsupportedModelError as error:
        raise ValueError(f"upsampler must be weights of an architecture that spandrel knows, got {file}") from error
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:  # what architectures raise for weights that do not fit them
        raise ValueError(f"upsampler must be complete weights of one network, got {file}: {_first_line(error)}") from error
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.purpose != "SR":
        raise ValueError(f"upsampler must be a network for super-resolution of a single picture, got {file} for {found.purpose}")
    if (found.input_channels, found.output_channels) != (3, 3):
        channels = f"{found.input_channels} to {found.output_channels}"
        raise ValueError(f"upsampler must map pictures of 3 channels to 3 channels, got {file} from {channels}")
    if found.scale < 2:
        raise ValueError(f"upsampler must enlarge pictures, got {file} with factor {found.scale}")
    tile = None if found.tiling is spandrel.ModelTiling.INTERNAL else TILE
    return NetworkUpsampler(found.eval(), found.scale, tile, _hash(file))


def _load_demo_upsampler() -> NetworkUpsampler:
    from scalediff.demo.upsampler import WEIGHTS, SceneUpsampler, noise_of

    network = SceneUpsampler()
    network.load_state_dict(_read_weights(WEIGHTS))
    return NetworkUpsampler(network.eval(), 2, None, _hash(WEIGHTS), noise_of)


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def resolve_upsampler(upsampler: str | PathLike[str] | Upsampler | None) -> Upsampler | None:
    """The function behind the argument `upsampler`: a path is loaded; raises as `load_upsampler`."""
    return load_upsampler(upsampler) if isinstance(upsampler, str | PathLike) else upsampler


def check_upsampler(name: str, value: Any) -> None:
    """Check for a path or a function."""
    if not isinstance(value, str | PathLike) and not callable(value):
        raise wrong_type(name, "the path of a network's weights, or a function from pictures to larger ones", value)


def identify_upsampler(upsampler: Upsampler | None) -> str | None:
    """What tells two upsamplers apart: a hash of the weights of a network, the name of another function."""
    if isinstance(upsampler, nn.Module):
        return fingerprint_weights([upsampler])
    return None if upsampler is None else getattr(upsampler, "fingerprint", "") or digest(upsampler)


def _read_weights(file: Path) -> Mapping[str, Any]:
    suffix = file.suffix.lower()
    if suffix not in (".safetensors", ".pth"):
        raise ValueError(f"upsampler must be a .safetensors or .pth file, got {file}")
    if not file.is_file():
        raise ValueError(f"upsampler must be an existing file, got {file}")
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds for files that are not theirs
        why = _first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # the first line is advice to load the file without a check
            code = any(phrase in str(error) for phrase in ("was not an allowed global", "is blocked"))
            why = "it holds more than weights" if code else "torch cannot read weights from it"
        raise ValueError(f"upsampler must be a readable file of weights, got {file}: {why}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"upsampler must be a file of weights by name, got {file} with a {type(found).__name__}")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
