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
        ValueError: The file is missing, has no prompts, or a record has no text in the column.
    """
    try:
        lines = list(io.StringIO(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts must be a readable text file in UTF-8, got {path}: {error}") from error
    if path.suffix.lower() not in (".csv", ".jsonl"):
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = []
        try:
            for record in csv.DictReader(lines) if path.suffix.lower() == ".csv" else map(json.loads, filter(str.strip, lines)):
                prompts.append(record[column].strip())
        except (AttributeError, KeyError, TypeError, csv.Error, json.JSONDecodeError) as error:
            where = f"record {len(prompts) + 1} of {path}"
            raise ValueError(f"{where} must have a text in {column!r}, the column of --column, got {error!r}") from error
    if not all(prompts) or not prompts:
        got = f"{len(prompts)} prompts in {path}, {prompts.count('')} of them empty"
        raise ValueError(f"the file must hold at least one prompt and no empty ones, got {got}")
    return prompts
