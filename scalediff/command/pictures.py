"""Pictures of the command: check output files, open pictures, and put pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalediff.cascade.metadata import temporary
from scalediff.cascade.pictures import upright_rgb


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


def open_picture(path: Path, *, behind: str = "white") -> Any:
    """Load a picture as RGB, rotated upright by its EXIF data, with a colour behind what is transparent; the first of an animation.

    Raises:
        ValueError: The file is missing, is not a picture, or has more pixels than Pillow opens or levels of more than 16 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return upright_rgb(image, behind=behind)
    except FileNotFoundError as error:
        raise ValueError(f"the picture must be an existing file, got {path}") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the file must be a picture that Pillow reads, got {path}: {error}") from error


_COLUMNS = 4


def side_by_side(images: Sequence[Any], labels: Sequence[str]) -> Any:
    """Put PIL pictures of the same size side by side, four in a row, each with a label of one or more lines below it."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = images[0].size
    lines = [label.split("\n") for label in labels]
    size = max(11, height // 18)
    longest = max(ImageFont.load_default(size).getlength(line) for label in lines for line in label)
    size = size if longest <= width else max(8, int(size * width / longest))  # not below what can be read
    font, line_height, gap = ImageFont.load_default(size), 1.25 * size, max(4, height // 64)
    band = round(line_height * (max(map(len, lines)) + 0.75))
    columns = min(len(images), _COLUMNS)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = i % columns * (width + gap), i // columns * (height + band)
        sheet.paste(image, (left, top))
        for number, line in enumerate(lines[i]):
            place = left + width // 2, top + height + line_height * (number + 0.9)
            draw.text(place, line, fill="black", anchor="mm", font=font)
    return sheet
