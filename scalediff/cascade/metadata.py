"""PNG files with metadata of the run that made the picture. A file is written completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEY = "scalediff"


def save_png(image: Any, path: Path, *, metadata: Mapping[str, Any]) -> None:
    """Write a PIL picture with its metadata to a PNG file.

    The metadata is stored as JSON in a text chunk, and in the chunk `parameters` that other tools read. The file is written under a
    temporary name and then renamed.

    Args:
        image: The PIL picture.
        path: The PNG file.
        metadata: Values that JSON can represent.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(_KEY, json.dumps(metadata, ensure_ascii=False))
    if metadata.get("prompt"):
        info.add_itxt("parameters", _parameters(image, metadata))
    part = temporary(path)
    try:
        image.save(part, format="PNG", pnginfo=info)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote.

    Raises:
        ValueError: The file is missing, is not a picture, or has no metadata of scalediff.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})[_KEY]
        metadata: dict[str, Any] = json.loads(text)
    except KeyError:
        raise ValueError(f"the file must be a picture written by scalediff, got {path}, which has no scalediff metadata") from None
    except (OSError, Image.DecompressionBombError, json.JSONDecodeError) as error:
        raise ValueError(f"the file must be a picture written by scalediff, got {path}: {error}") from error
    return metadata


def temporary(path: Path) -> Path:
    """The temporary name under which this process writes a file before renaming it."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _parameters(image: Any, metadata: Mapping[str, Any]) -> str:
    """The text of the chunk `parameters`, in the format of AUTOMATIC1111's web interface: prompt, negative prompt, settings."""
    settings = metadata.get("settings", {})
    facts = {
        "Steps": settings.get("steps"), "Sampler": metadata.get("scheduler"), "CFG scale": settings.get("guidance_scale"),
        "Seed": metadata.get("seed"), "Size": f"{image.width}x{image.height}", "Model": metadata.get("model"), "Version": "scalediff",
    }  # fmt: skip
    lines = [str(metadata["prompt"])]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)])
