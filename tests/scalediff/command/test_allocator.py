"""Freed memory is kept where a program asks for it, and nowhere else."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from scalediff.cascade import fitting
from scalediff.command import allocator, runs
from scalediff.command.cli import main

# The share of pages that are mapped anew while 64 MB are allocated, written and freed again and again, in a new process. Huge pages are
# off there (PR_SET_THP_DISABLE): where the system maps them, one fault is for 512 pages.
FAULTS = """
import ctypes, resource, torch, scalediff, scalediff.command.cli
from scalediff.command.allocator import keep_freed_memory
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24), torch.ones(2**24)
def mapped_anew():
    before = faults()
    for _ in range(8):
        torch.ones(2**24)
    return (faults() - before) * resource.getpagesize() / (8 * 2**26)
print(mapped_anew())
assert keep_freed_memory()
torch.ones(2**24), torch.ones(2**24)
print(mapped_anew())
"""


@pytest.mark.skipif(not allocator.keep_freed_memory(), reason="the system's allocator is not glibc's")
def test_freed_memory_is_used_again_only_after_it_is_requested() -> None:
    """Importing the library and its command leaves the allocator alone."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    imported, requested = (float(share) for share in done.stdout.split())
    assert imported > 0.99
    assert requested < 0.01


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_another_allocator_is_told(monkeypatch: pytest.MonkeyPatch, missing: type[Exception]) -> None:
    def load(name: None) -> object:
        raise missing

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(("room", "kept"), [(10**6, 1), (1, 0)])
def test_the_command_keeps_it_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int, kept: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(runs, "keep_freed_memory", lambda: asked.append(1))
    monkeypatch.setattr(fitting, "available_bytes", lambda device: room * 2**30)
    assert (
        main(
            [
                "generate",
                "a moon",
                "--size",
                "64",
                "--steps",
                "1",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "moon.png"),
                "--quiet",
                "--force",
            ]
        )
        == 0
    )
    assert len(asked) == kept
    assert f"; {room}.0 GiB are available" in capsys.readouterr().err
