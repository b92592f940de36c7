"""Folders of pictures: those that `generate` drew, with their manifest, and others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bench.evaluate.drawing import MANIFEST, RUN

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Folder:
    """Pictures of one kind. Without a manifest all that follows the files is empty."""

    path: Path
    files: list[Path]  # by name
    prompts: list[str]  # of each
    seeds: list[int]  # of each
    run: dict[str, Any]  # what `generate` wrote about the run
    seconds: list[float]  # drawing time of each

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return len(self.files)


def open_folder(path: Path) -> Folder:
    """The pictures of a folder; with a manifest, those of its lines.

    Raises:
        ValueError: The folder is missing or empty, its run is not finished, or its manifest is not readable.
    """
    if not path.is_dir():
        raise ValueError(f"pictures must be in an existing folder, got {path}")
    if (path / RUN).exists():
        return _generated(path)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not files:
        raise ValueError(f"the folder must hold pictures ({', '.join(SUFFIXES)}), got {path} with none")
    return Folder(path, files, [], [], {}, [])


def _generated(path: Path) -> Folder:
    try:
        run = json.loads((path / RUN).read_text())
        lines = (path / MANIFEST).read_text(encoding="utf-8").splitlines() if (path / MANIFEST).exists() else []
        records = [json.loads(line) for line in lines]
        wanted = int(run["pictures"])
        files, prompts = [path / record["file"] for record in records], [str(record["prompt"]) for record in records]
        seeds, seconds = [int(record["seed"]) for record in records], [float(record["seconds"]) for record in records]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{RUN} and {MANIFEST} must be those that `generate` wrote, got {path}: {error!r}") from error
    if len(records) != wanted:
        raise ValueError(f"{path} must hold all {wanted} pictures of its run, got {len(records)}: repeat the same generate command")
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{path} must hold every picture of its manifest, got no {missing[0]} ({len(missing)} missing)")
    return Folder(path, files, prompts, seeds, run, seconds)


def check_comparable(folders: Sequence[Folder]) -> None:
    """Check that folders can be scored side by side: different names, the same number, prompts, seeds and size.

    Raises:
        ValueError: They differ.
    """
    first = folders[0]
    for i, folder in enumerate(folders[1:], 1):
        if folder.name in {other.name for other in folders[:i]}:
            raise ValueError(f"folders need different names, which are their rows, got {folder.name!r} twice")
        if len(folder) != len(first):
            raise ValueError(f"folders must hold as many pictures, got {len(first)} in {first.path} and {len(folder)} in {folder.path}")
        if bool(folder.prompts) != bool(first.prompts):
            raise ValueError(f"folders must all have a manifest or none, got {first.path} and {folder.path}")
        ours, theirs = (list(zip(one.prompts, one.seeds, strict=True)) for one in (folder, first))
        if differing := sum(a != b for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(f"folders must have the same prompts and seeds, got {differing} different in {first.path} and {folder.path}")
        if not folder.prompts and [file.stem for file in folder.files] != [file.stem for file in first.files]:
            raise ValueError(f"folders without a manifest must have the same file names, got others in {first.path} and {folder.path}")
    sizes = {folder.name: size_of(folder.files[0]) for folder in folders}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"folders must have pictures of one size, got {', '.join(f'{y} x {x} in {n}' for n, (y, x) in sizes.items())}")


def size_of(file: Path) -> tuple[int, int]:
    """(height, width) of a picture, from its header; raises as `read_picture`."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations with height and width exchanged
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error


def read_picture(file: Path, *, size: tuple[int, int] | None = None) -> Tensor:
    """`[3, Y, X]` uint8 of a picture, turned upright by its EXIF data.

    Raises:
        ValueError: The file cannot be read as a picture, or is not of `size`.
    """
    try:
        with Image.open(file) as image:
            picture = _pixels(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error
    if size is not None and picture.shape[1:] != size:
        got = f"{picture.shape[1]} x {picture.shape[2]} in {file}"
        raise ValueError(f"every picture of the folder must be {size[0]} x {size[1]}, got {got}")
    return picture


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"the file must be a complete picture that Pillow reads, got {file}: {error}")


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A `[3, Y, X]` uint8 picture at another size: Pillow's bicubic filter, which has antialias, rounded to 256 levels."""
    return _pixels(_image(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def fitted(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centred part of a `[3, Y, X]` picture with the shape of `size`, resized to it."""
    return _pixels(ImageOps.fit(_image(picture), (size[1], size[0]), Image.Resampling.BICUBIC))


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def common_size(size: tuple[int, int], reference: Folder) -> tuple[int, int]:
    """The largest size of the shape of `size`, and not above it, that every reference picture can be reduced to."""
    scale = min(1.0, *(min(y / size[0], x / size[1]) for y, x in map(size_of, reference.files)))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
