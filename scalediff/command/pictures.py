"""Pictures of the command: check output files, open pictures, and put pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalediff.cascade.metadata import temporary


def check_writable(path: Path) -> None:
    """Check that an output file can be written, before anything is computed.

    Raises:
        ValueError: The file is not a .png file, or its folder is missing or not writable.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"the output must be a .png file, got {path}")
    part = temporary(path)
    try:
        part.touch()  # os.access is not reliable on all file systems
        part.unlink()
    except OSError as error:
        raise ValueError(f"the output must be a file in an existing, writable folder, got {path}: {error.strerror}") from error
    if path.is_dir():
        raise ValueError(f"the output must be a file, got the folder {path}")


def open_picture(path: Path) -> Any:
    """Load a picture as RGB, rotated upright by its EXIF data.

    Raises:
        ValueError: The file is missing or is not a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"the picture must be an existing file, got {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"the file must be a picture that Pillow reads, got {path}: {error}") from error


def side_by_side(images: Sequence[Any], labels: Sequence[str]) -> Any:
    """Put PIL pictures of the same size side by side, each with a label below it."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = images[0].size
    text = max(11, height // 18)
    gap = max(4, height // 64)
    sheet = Image.new("RGB", (len(images) * (width + gap) - gap, height + 2 * text), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = i * (width + gap)
        sheet.paste(image, (left, 0))
        draw.text((left + width // 2, height + text), label, fill="black", anchor="mm", font=ImageFont.load_default(text))
    return sheet
