"""Pictures from the browser: what a file is, and how large it would be, is read from its header before anything is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalediff.cascade.changing import has_aspect_ratio
from scalediff.cascade.pictures import upright_rgb

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**26  # 8192 x 8192: as RGB 192 MiB
_FORMATS = ("PNG", "JPEG", "WEBP")
_WHITE = 128  # the least grey level that is white in a mask, as in diffusers


def open_upload(path: Path, *, behind: str = "white", max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Any:
    """Load an uploaded picture as RGB, rotated upright by its EXIF data; the first one of an animation.

    Args:
        path: The file.
        behind: Colour behind what is transparent.
        max_bytes: Largest file.
        max_pixels: Largest picture, height times width, by the header of the file.

    Raises:
        ValueError: The file is no picture of a known format, is broken, or is too large.
    """
    from PIL import Image, UnidentifiedImageError

    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"a picture file must have at most {max_bytes / 2**20:g} MiB, got {size / 2**20:.1f} MiB")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(
                    f"a picture must have at most {max_pixels / 1e6:.1f} million pixels, got {height} x {width}, "
                    f"{width * height / 1e6:.1f} million"
                )
            return upright_rgb(image, behind=behind)
    except Image.DecompressionBombError as error:  # raised by Pillow itself while it reads the header
        raise ValueError(f"a picture must have at most {max_pixels / 1e6:.1f} million pixels: {error}") from error
    except UnidentifiedImageError as error:  # its message has the file's path on the server
        raise ValueError(f"the file must be a picture in one of the formats {', '.join(_FORMATS)}, got none of these") from error
    except (OSError, SyntaxError, EOFError) as error:  # broken PNG files raise SyntaxError
        raise ValueError(f"the file must be a whole picture, got a broken one: {error}") from error


def white_of(mask: Any) -> Any:
    """A mask as a PIL picture of the levels 0 and 255."""
    return mask.convert("L").point(lambda level: 255 if level >= _WHITE else 0)


def check_mask(mask: Any, picture: Any) -> None:
    """Check the mask of an uploaded picture, which is white where the picture is drawn anew.

    Raises:
        ValueError: It has another aspect ratio than the picture, or nothing in it is white.
    """
    if not has_aspect_ratio((mask.height, mask.width), (picture.height, picture.width)):
        sizes = f"{picture.height} x {picture.width}, got {mask.height} x {mask.width}"
        raise ValueError(f"the mask must have the aspect ratio of the picture, {sizes}")
    if white_of(mask).getbbox() is None:
        raise ValueError("the mask must be white where the picture is drawn anew, got a mask without white")
