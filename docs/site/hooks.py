"""What mkdocs cannot say in its configuration: the README is the first page, and some folders are listed whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace an entry `folder/*` of the navigation by the Markdown files of that folder."""
    config.nav = _expanded(config.nav)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add README.md as index.md, its links counted from this folder."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text().replace("](docs/", "](")))
    return files


def _expanded(nav: Any) -> Any:
    if isinstance(nav, dict):
        return {title: _expanded(entry) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [_expanded(entry) for entry in nav]
    if nav.endswith("/*"):
        return [f"{nav[:-2]}/{page.name}" for page in sorted((ROOT / "docs" / nav[:-2]).glob("*.md"))]
    return nav
