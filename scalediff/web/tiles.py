"""Tiles of a picture at half, a quarter, an eighth of its size and so on, so that a browser shows any part of it without the whole."""

from __future__ import annotations

import functools
import io
import threading
from pathlib import Path
from typing import Any

TILE = 256  # pixels of a tile's side, at every level
_PICTURES = 3  # decoded pictures in memory: as many as a comparison shows

_decoding = threading.Lock()  # several tiles of a new picture are asked for at once, and one of them decodes it


def levels(size: tuple[int, int]) -> int:
    """Number of levels of a picture of (height, width) pixels: level 0 is the picture, and the last level fits into one tile."""
    return max(0, (max(size) - 1) // TILE).bit_length() + 1


def tile(path: Path, level: int, x: int, y: int) -> bytes:
    """One tile as PNG: the pixels `[TILE * y, TILE * (y + 1))` by `[TILE * x, TILE * (x + 1))` of a level, cut to the picture.

    Args:
        path: The picture.
        level: 0 for the picture, k for the picture reduced by 2^k, with sides rounded up.
        x, y: Number of the tile along each axis, from 0.

    Raises:
        ValueError: The picture has no such level or tile.
    """
    with _decoding:
        pyramid = _pyramid(path, path.stat().st_mtime_ns)
    if not 0 <= level < len(pyramid):
        raise ValueError(f"level must lie in [0, {len(pyramid)}), got {level=}")
    image = pyramid[level]
    left, top = TILE * x, TILE * y
    if not (0 <= left < image.width and 0 <= top < image.height):
        raise ValueError(f"the tile must lie in the {image.height} x {image.width} pixels of level {level}, got {x=}, {y=}")
    out = io.BytesIO()
    box = (left, top, min(left + TILE, image.width), min(top + TILE, image.height))
    image.crop(box).save(out, format="PNG", compress_level=1)
    return out.getvalue()


@functools.lru_cache(maxsize=_PICTURES)
def _pyramid(path: Path, modified: int) -> list[Any]:
    """The levels of a picture. `modified` is the file's time, so that a file that changes is decoded again."""
    from PIL import Image

    with Image.open(path) as image:
        found = [image.convert("RGB")]
    for _ in range(levels((found[0].height, found[0].width)) - 1):
        found.append(found[-1].reduce(2))
    return found
