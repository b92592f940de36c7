"""Numbers and paths of the command's options, parsed from their texts; a text that is none ends the parser with an error."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def per_stage(text: str) -> float | tuple[float, ...]:
    """Parse a number, or a comma-separated list with one number for each stage above the native size."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a number, or a comma-separated list with one number for each stage, got {text!r}"
        ) from error
    return numbers if len(numbers) > 1 else numbers[0]


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def gib(text: str) -> float:
    """Parse a number of GiB."""
    try:
        size = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number of GiB, got {text!r}") from error
    if not 0 < size * 2**30 < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of GiB, got {text!r}")
    return size


def path(text: str) -> Path:
    """Parse the path of a file or folder. An empty text is none: as a `Path` it is the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a file or folder, got an empty text")
    return Path(text)


def upsampler(text: str) -> str | Path:
    """Parse `demo`, which is no file, or the path of a file."""
    return text if text == "demo" else path(text)


def port(text: str) -> int:
    """Parse the number of a port; 0 is any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port must be an integer in [0, 65535], got {text!r}")
    return int(text)
