"""Markdown tables from data frames, and pages whose tables are generated while the text around them is written by hand.

A page has `<!-- begin NAME -->` and `<!-- end NAME -->` around everything that is generated.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness.rows import write_text

if TYPE_CHECKING:
    from pandas import DataFrame


def page_parser(name: str, title: str, what: str) -> argparse.ArgumentParser:
    """The parser of a benchmark that makes pages: --write and --check."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=title)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--write", action="store_true", help=f"write {what}")
    way.add_argument("--check", action="store_true", help="fail where these files differ")
    return parser


def has_pandas() -> bool:
    """Whether tables can be written: measuring needs no pandas."""
    return find_spec("pandas") is not None


def require_pandas() -> None:
    """Exit with a message where pandas is not installed."""
    if not has_pandas():
        raise SystemExit('this needs pandas: pip install -e ".[bench]"')


def table(frame: DataFrame, *, text: Collection[str]) -> list[str]:
    """Lines of a markdown table; columns named in `text` are aligned left, the others right; columns without any content are left out."""
    cells = frame.astype(object).where(frame.notna(), "").map(lambda cell: str(cell).replace("|", "/"))
    cells = cells.loc[:, [name in text or bool((cells[name] != "").any()) for name in cells]]
    rule = "|".join("---" if name in text else "--:" for name in cells)
    return [f"| {' | '.join(cells)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in cells.itertuples(index=False))]


def fill(page: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """The page with these lines between the marks of every block; ValueError where it lacks a mark."""
    for name, lines in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"the page must have the lines {begin!r} and {end!r}, got {bool(found)} and {bool(ended)}")
        page = "\n".join([before + begin, "", *lines, "", end + after])
    return page


def write_or_check(files: Mapping[Path, str], *, check: bool, command: str, problems: Sequence[str] = ()) -> None:
    """Write the files; with `check`, exit instead with the first line of each that differs, and with other problems found."""
    if not check:
        for path, text in files.items():
            write_text(path, text)
        return
    wrong = [sentence for path, text in files.items() if (sentence := _difference(path, text))] + list(problems)
    raise SystemExit("\n".join([*wrong, f"run {command}"]) if wrong else 0)


def _difference(path: Path, expected: str) -> str:
    """A sentence about the first line in which a file differs from the expected text; empty where none does."""
    lines = path.read_text().splitlines() if path.exists() else []
    for number, (old, new) in enumerate(zip_longest(lines, expected.splitlines()), start=1):
        if old != new:
            return f"{path.name}, line {number}, is not what is counted now, got {old!r} for {new!r}"
    return ""
