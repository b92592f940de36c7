"""What a run is measured with: the machine, the versions and the commit."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FACTS = ("torch", "diffusers", "machine", "threads", "commit")
VERSIONS = ("python", "triton", "cuda", "cudnn", "card")


def facts(names: Sequence[str] = FACTS, device: str = "cpu", *, commit: str | None = None) -> dict[str, str]:
    """The columns `names` of this run, each one of FACTS or VERSIONS, or a package. Call it before measuring: files may change meanwhile.

    `commit` is for a copy of the tree without git's data; a ValueError where git has another one, or changes.
    """
    on_gpu = device == "cuda"
    known = {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if on_gpu else machine(),
        "threads": str(torch.get_num_threads()),
        "commit": resolve_commit(commit, _commit()),
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda or torch.version.hip or "") if on_gpu else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if on_gpu else "",
        "card": _card() if on_gpu else "",
    }
    return {name: known[name] if name in known else package_version(name) for name in names}


def package_version(package: str) -> str:
    """The version of an installed package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _card() -> str:
    """Driver, power limit and highest clock of NVIDIA's cards; empty without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return " or ".join(dict.fromkeys(f"driver {line}" for line in printed.splitlines() if line.strip()))


def _commit() -> str:
    """The checkout's commit, marked where files that can be measured were changed; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", "scalediff", "kernels", "bench", ":!bench/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def resolve_commit(given: str | None, known: str) -> str:
    """The commit that git knows, or the one that the caller gives where git knows none."""
    if not given or known == "unknown":
        return given or known
    if not re.fullmatch(f"{re.escape(known)}[0-9a-f]*", given):
        raise ValueError(f"--commit is for a copy of the tree without git's data: git has {known!r} here, got {given!r}")
    return known


def is_commit(commit: str) -> bool:
    """Whether it identifies one tree: it is known, and nothing was changed after it."""
    return commit != "unknown" and not commit.endswith("with changes")
