"""Pictures on disk: written whole or not at all, with the run that made them inside; and pictures side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_KEY = "scalediff"


def check_writable(path: Path) -> None:
    """Refuse a target that could not be written, before anything is computed.

    Raises:
        ValueError: the file is no PNG, or its folder is missing or not writable.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"the output must be a .png file, got {path}")
    part = _part(path)
    try:
        part.touch()  # permissions and file systems say more by doing than by os.access
        part.unlink()
    except OSError as error:
        raise ValueError(f"the output must be a file in an existing, writable folder, got {path}: {error.strerror}") from error
    if path.is_dir():
        raise ValueError(f"the output must be a file, got the folder {path}")


def _part(path: Path) -> Path:
    """Where a picture is written before it gets its name; another process writes to another place."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def save_png(image: Any, path: Path, *, metadata: Mapping[str, Any]) -> None:
    """Write a PIL picture with its metadata as JSON in a text chunk, and in the one that other tools read; the file appears by rename."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(_KEY, json.dumps(metadata, ensure_ascii=False))
    if metadata.get("prompt"):
        info.add_itxt("parameters", _parameters(image, metadata))
    part = _part(path)
    try:
        image.save(part, format="PNG", pnginfo=info)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def open_picture(path: Path) -> Any:
    """A PIL picture, loaded, in RGB, upright.

    Raises:
        ValueError: the file is missing or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"there is no picture {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"the file must be a picture that Pillow reads, got {path}: {error}") from error


def _parameters(image: Any, metadata: Mapping[str, Any]) -> str:
    """The run in the words of the chunk `parameters`, which AUTOMATIC1111's web interface made common: prompt, negative prompt, facts."""
    settings = metadata.get("settings", {})
    facts = {
        "Steps": settings.get("steps"), "Sampler": metadata.get("scheduler"), "CFG scale": settings.get("guidance_scale"),
        "Seed": metadata.get("seed"), "Size": f"{image.width}x{image.height}", "Model": metadata.get("model"), "Version": "scalediff",
    }  # fmt: skip
    lines = [str(metadata["prompt"])]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)])


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote.

    Raises:
        ValueError: the file is missing, no picture, or carries no such metadata.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})[_KEY]
        metadata: dict[str, Any] = json.loads(text)
    except KeyError:
        raise ValueError(f"expected a picture written by scalediff, got {path}: it has no scalediff metadata") from None
    except (OSError, Image.DecompressionBombError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a picture written by scalediff, got {path}: {error}") from error
    return metadata


def side_by_side(images: Sequence[Any], labels: Sequence[str]) -> Any:
    """One PIL picture: the given ones of one size in a row, each with its label below."""
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
