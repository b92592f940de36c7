"""Small parts of `bench.gpu`, and a run of them as on a machine with a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.parts import Part
from bench.harness.rows import read_rows

FACTS = {
    "machine": "NVIDIA H200",
    "commit": "0123abc",
    "python": "3",
    "torch": "2",
    "triton": "3",
    "diffusers": "absent",
    "natten": "absent",
}


DESCRIBED = "3 rows: 1 ok, 1 FAILED, 1 skipped; first b: no note"


def script(name: str, *more: str, limit: float = 30.0, **facts: Any) -> Part:
    return Part(name, f"part {name}", limit, ("script", "--say", name, *more), **facts)


def main(
    folder: Path, monkeypatch: pytest.MonkeyPatch, parts: list[Part], *arguments: str, commit: str = "0123abc", natten: str = "absent"
) -> tuple[object, dict[str, dict[str, str]], list[str]]:
    """Exit status or message, rows, and the names of the parts that were begun, as on a machine with a GPU."""
    monkeypatch.setattr(gpu, "PARTS", tuple(parts))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda *_, **how: FACTS | {"commit": how["commit"] or commit, "natten": natten})
    (folder / "began").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(folder), *arguments])
    began = (folder / "began").read_text().split() if (folder / "began").exists() else []
    return stop.value.code, read_rows(folder / "gpu-nvidia-h200.csv"), began
