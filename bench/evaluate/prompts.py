"""A list of prompts from a file: text with one prompt a line, or a column of a CSV or of JSON lines."""

from __future__ import annotations

import csv
import io
import json
from contextlib import suppress
from pathlib import Path


def read_prompts(path: Path, *, column: str = "prompt") -> list[str]:
    """The prompts of a file, in its order; surrounding blanks and empty lines are left out.

    `.csv` and `.jsonl` files have the prompts in `column`; any other file has one prompt a line.

    Raises:
        ValueError: The file is missing, has no prompts, lacks the column, or a record has no text there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts must be a readable text file in UTF-8, got {path}: {error}") from error
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        if column not in (columns := reader.fieldnames or ()):
            raise ValueError(f"{path} must have the column {column!r}, got {', '.join(columns) or 'no columns'}")
        prompts = [_text(path, number, record[column]) for number, record in enumerate(reader, 1)]
    elif path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        prompts = [_text(path, number, _value(path, number, line, column)) for number, line in lines]
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"the file must hold at least one prompt, got {path} with none")
    return prompts


def _value(path: Path, number: int, line: str, column: str) -> object:
    with suppress(json.JSONDecodeError, KeyError, TypeError):
        return json.loads(line)[column]
    raise ValueError(f"line {number} of {path} must be a JSON object with the key {column!r}, got {line[:60]!r}")


def _text(path: Path, number: int, prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"record {number} of {path} must have a text as prompt, got {prompt!r}")
    return prompt.strip()
