"""A picture as a PNG file: written whole or not at all, with the run that made it inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEY = "scalediff"


def save_png(image: Any, path: Path, *, metadata: Mapping[str, Any]) -> None:
    """Write a PIL picture with its metadata as JSON in a text chunk, and in the one that other tools read; the file appears by rename."""
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


def temporary(path: Path) -> Path:
    """Where a picture is written before it gets its name; another process writes to another place."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


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
