"""The folder of pictures that the page writes and shows. A picture is known by its file name, and only names of this folder are served."""

from __future__ import annotations

import functools
import io
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalediff.cascade.metadata import read_metadata, save_png

LISTED = 60  # newest pictures in the gallery
COMPANIONS = {"full": "full attention", "direct": "direct inference"}  # by the ending of the name: what was drawn to compare with
_NAME = re.compile(rf"[a-z0-9-]+(?:\.(?:{'|'.join(COMPANIONS)}))?\.png")
_THUMBNAIL = 288  # pixels


class Gallery:
    """Pictures with metadata in one folder.

    Args:
        folder: The folder. It is made with the first picture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lock = threading.Lock()

    def new_name(self, prompt: str, seed: int) -> str:
        """A name for a new picture that no file has yet. The file is made, empty, so that the name stays free for its picture."""
        stem = f"{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:48].strip('-') or 'picture'}-{seed}"
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = 1
            while (path := self.folder / f"{stem}{f'-{number}' if number > 1 else ''}.png").exists():
                number += 1
            path.touch()
        return path.name

    def save(self, image: Any, name: str, metadata: Mapping[str, Any]) -> None:
        """Write a picture with its metadata under a name from `new_name`, or under that of a companion."""
        save_png(image, self.folder / name, metadata=metadata)

    def drop(self, name: str) -> None:
        """Give up a name from `new_name` whose picture was never saved."""
        path = self.folder / name
        if path.is_file() and not path.stat().st_size:
            path.unlink()

    def path(self, name: str) -> Path:
        """The file of a picture.

        Raises:
            ValueError: The name is none of a picture of this gallery.
        """
        path = self.folder / name
        if not _NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise ValueError(f"the picture must be one of the gallery, got {name!r}")
        _read(path)  # a file that something else has put here is not shown
        return path

    def names(self) -> list[str]:
        """The newest pictures, newest first, without companions."""
        files = [path for path in self.folder.glob("*.png") if _NAME.fullmatch(path.name) and companion_of(path.name) is None]
        found: list[str] = []
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                found.append(self.path(path.name).name)
            except ValueError:
                continue
            if len(found) == LISTED:
                break
        return found

    def companions(self, name: str) -> dict[str, str]:
        """What was drawn to compare a picture with: names of the companions that exist, by what they are."""
        names = {kind: f"{name.removesuffix('.png')}.{kind}.png" for kind in COMPANIONS}
        return {kind: one for kind, one in names.items() if (self.folder / one).is_file()}

    def metadata(self, name: str) -> dict[str, Any]:
        """The metadata of a picture; raises as `path`."""
        return _read(self.path(name))

    def thumbnail(self, name: str) -> bytes:
        """A small JPEG of a picture; raises as `path`."""
        path = self.path(name)
        return _thumbnail(path, path.stat().st_mtime_ns)


def companion_of(name: str) -> str | None:
    """What a companion is, by its name; None for a picture that is none."""
    parts = name.split(".")
    return parts[1] if len(parts) == 3 else None


def _read(path: Path) -> dict[str, Any]:
    """The metadata of a picture, which has the picture's size."""
    metadata = read_metadata(path)
    if not all(isinstance(metadata.get(side), int) for side in ("height", "width")):
        raise ValueError(f"the file must be a picture that scalediff has drawn, got {path.name}")
    return metadata


@functools.lru_cache(maxsize=256)
def _thumbnail(path: Path, modified: int) -> bytes:
    """`modified` is the file's time, so that a file that changes gets another thumbnail."""
    from PIL import Image

    with Image.open(path) as image:
        return as_jpeg(image, _THUMBNAIL)


def as_jpeg(image: Any, side: int) -> bytes:
    """A PIL picture as JPEG, made smaller until no side is longer than `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=88)
    return out.getvalue()
