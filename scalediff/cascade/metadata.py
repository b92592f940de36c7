"""PNG files with metadata of the run that made the picture. A file is written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    with replacing(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote.

    Raises:
        ValueError: The file is missing, is not a picture, or has no metadata of scalediff.
    """
    from PIL.PngImagePlugin import PngImageFile

    try:
        image = PngImageFile(path)  # Image.open refuses large pictures
        with image:
            text = image.info if _KEY in image.info else image.text  # which reads the pixels, and the text behind them
            metadata: dict[str, Any] = json.loads(text[_KEY])
    except KeyError:
        raise ValueError(f"the file must be a picture written by scalediff, got {path}, which has no scalediff metadata") from None
    except (OSError, SyntaxError, json.JSONDecodeError) as error:  # SyntaxError of a file of another format
        raise ValueError(f"the file must be a picture written by scalediff, got {path}: {error}") from error
    return metadata


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the temporary file of a file, which takes its place at the end; after an error it is removed, and the file stays as it was.

    On Linux, temporary files of the same file are removed whose process has ended, if their process numbers are those of this system.
    """
    with suppress(PermissionError):  # of the folder, or of another user's file
        _remove_stale(path)
    part = temporary(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """The temporary name under which this process writes a file before renaming it. Other machines may see the folder."""
    return path.with_name(f".{path.name}.{_system()}-{os.getpid()}.part")


def _remove_stale(path: Path) -> None:
    """Remove the temporary files of a file whose process, among those that have a number here, has ended."""
    if not _numbering():
        return
    name = re.compile(rf"\.{re.escape(path.name)}\.{_system()}-(\d+)\.part")
    for file in path.parent.iterdir():
        match = name.fullmatch(file.name)
        if match and not _is_running(int(match[1])):
            file.unlink(missing_ok=True)


def _system() -> str:
    """A short hash of where this process has its number. Machines may have the same name, and containers the name of their machine."""
    return hashlib.sha256(f"{platform.node()} {_numbering()}".encode()).hexdigest()[:12]


def _numbering() -> str:
    """What names the set of processes in which a number is unique: the start of the kernel, and the namespace; empty where none is told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    """Whether a process with this number exists, of any user."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


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
