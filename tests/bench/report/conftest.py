"""A repository of nothing but results, a page and a README."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.report import __main__ as report


def blocks(*names: str) -> str:
    return "".join(f"{name}:\n<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in names)


README = f"before\n{blocks('goals', 'quality')}end\n"
PAGE = blocks("goals", "checks", "pictures", "attention", "plots")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of nothing but results, a page and a README."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "benchmarks.md").write_text(PAGE)
    for name, value in (("RESULTS", "results"), ("PAGE", "docs/benchmarks.md"), ("README", "README.md")):
        monkeypatch.setattr(report, name, tmp_path / value)
    return tmp_path
