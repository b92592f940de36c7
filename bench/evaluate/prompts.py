"""A list of prompts from a file: text with one prompt a line, or a column of a CSV or of JSON lines."""

from __future__ import annotations

import csv
import io
import json
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
        prompts = _of_csv(path, text, column)
    elif path.suffix.lower() == ".jsonl":
        prompts = [_of_record(path, number, line, column) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"the file must hold at least one prompt, got {path} with none")
    return prompts


def _of_csv(path: Path, text: str, column: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(text))
    if column not in (columns := reader.fieldnames or ()):
        raise ValueError(f"{path} must have the column {column!r}, got {', '.join(columns) or 'no columns'}")
    return [_stripped(path, number, record[column]) for number, record in enumerate(reader, 1)]


def _of_record(path: Path, number: int, line: str, column: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} of {path} must be a JSON object, got {line[:60]!r}") from error
    if not isinstance(record, dict) or column not in record:
        raise ValueError(f"line {number} of {path} must be a JSON object with the key {column!r}, got {line[:60]!r}")
    return _stripped(path, number, record[column])


def _stripped(path: Path, number: int, prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"record {number} of {path} must have a text as prompt, got {prompt!r}")
    return prompt.strip()
