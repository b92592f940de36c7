"""Folders of pictures: those that `generate` drew, and others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_ORIENTATION = 0x0112  # in EXIF; from 5 on with height and width exchanged


@dataclass(frozen=True)
class Folder:
    """Pictures in the order of their names."""

    path: Path
    files: list[Path]
    run: dict[str, Any]  # what `generate` wrote about the run; empty for pictures of other software
    name: str  # of its rows

    def __len__(self) -> int:
        return len(self.files)


def open_folder(path: Path) -> Folder:
    """The pictures of a folder; ValueError where it is missing or empty, or does not hold the pictures of its run."""
    if not path.is_dir():
        raise ValueError(f"pictures must be in an existing folder, got {path}")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not files:
        raise ValueError(f"the folder must hold pictures ({', '.join(SUFFIXES)}), got {path} with none")
    try:
        run = json.loads((path / "run.json").read_text()) if (path / "run.json").exists() else {}
    except ValueError as error:
        raise ValueError(f"{path / 'run.json'} must be the one that `generate` wrote, got {error}") from error
    if len(files) < run.get("pictures", 0):
        raise ValueError(f"{path} must hold all {run['pictures']} pictures of its run, got {len(files)}: repeat the same generate command")
    if len(files) > run.get("pictures", len(files)):
        raise ValueError(f"{path} must hold no other pictures than the {run['pictures']} of its run, got {len(files)}")
    return Folder(path, files, run, path.name)


def open_folders(paths: Sequence[Path]) -> list[Folder]:
    """Folders to compare, named by the last parts of their paths, as many as tell them apart; ValueError if one is given twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"folders must be different, each is a row, got {', '.join(map(str, paths))}")
    folders, parts = [open_folder(path) for path in paths], [Path(os.path.abspath(path)).parts[1:] for path in paths]
    count = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return [replace(folder, name="/".join(part[-count:])) for folder, part in zip(folders, parts, strict=True)]


def common_size(folders: Sequence[Folder]) -> tuple[int, int]:
    """The (height, width) of all pictures; ValueError where numbers or names of pictures, prompts or sizes differ."""
    first = folders[0]
    for folder in folders[1:]:
        if len(folder) != len(first):
            raise ValueError(
                f"folders must have as many pictures, which are paired, got {len(first)} in {first.path} and {len(folder)} in {folder.path}"
            )
        if [file.stem for file in folder.files] != [file.stem for file in first.files]:
            raise ValueError(f"folders must have pictures of the same names, which pair them, got others in {first.path} and {folder.path}")
        if folder.run.get("prompts") != first.run.get("prompts"):
            raise ValueError(f"folders must be of the same prompts, or all without run.json, got others in {first.path} and {folder.path}")
    sizes = {size_of(file): file for folder in folders for file in folder.files}
    if len(sizes) > 1:
        two = " and ".join(f"{y} x {x} in {file}" for (y, x), file in list(sizes.items())[:2])
        raise ValueError(f"all pictures must be of one size, got {two}")
    return next(iter(sizes))


def comparison_size(size: tuple[int, int], reference: Folder) -> tuple[int, int]:
    """The largest size of the shape of `size`, and not above it, that every reference picture can be reduced to."""
    scale = min(1.0, *(min(y / size[0], x / size[1]) for y, x in map(size_of, reference.files)))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def size_of(file: Path) -> tuple[int, int]:
    """(height, width) of a picture, from its header; raises as `read_picture`."""
    with _opened(file) as image:
        return image.size if image.getexif().get(_ORIENTATION, 1) >= 5 else (image.height, image.width)


def read_picture(file: Path) -> Image.Image:
    """A picture in RGB, turned upright by its EXIF data; ValueError where the file cannot be read as a picture."""
    with _opened(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the file must be a complete picture that Pillow reads, got {file}: {error}") from error
