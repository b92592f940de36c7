"""What every benchmark needs around its measurement: what it ran on, and results that appear whole or not at all."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

FACTS = ("torch", "diffusers", "machine", "threads", "commit")


def facts(device: str = "cpu") -> dict[str, str]:
    """Versions, machine (of a GPU its name) and commit of this run; take it once, before measuring, for files may change meanwhile."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "scalediff", "kernels", "bench/*.py")
    return {
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else machine(),
        "threads": str(torch.get_num_threads()),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
    }


def package_version(package: str) -> str:
    """Of an installed package; "absent" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of an earlier run, by the column `row`."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {record["row"]: record for record in csv.DictReader(file)}


def write_rows(path: Path, fields: Sequence[str], records: Iterable[Mapping[str, str]]) -> None:
    """A CSV, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """A text file, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
