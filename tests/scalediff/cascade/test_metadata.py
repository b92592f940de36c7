"""Files that are written completely or not at all, and what a killed process leaves."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from scalediff.cascade import metadata
from scalediff.cascade.metadata import replacing, temporary


def ended_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(os.name != "posix", reason="other systems do not tell whether a process runs")
def test_what_ended_processes_of_this_machine_left_of_a_file_is_removed(tmp_path: Path) -> None:
    here, ended = platform.node(), ended_process()
    stale = f".moon.png.{here}-{ended}.part"
    kept = {
        f".moon.png.{here}-{os.getppid()}.part",
        f".moon.png.{here}-1.part",  # of another user
        f".moon.png.another-machine-{ended}.part",
        f".moon.preview.png.{here}-{ended}.part",
        f".moon.png.{here}-x.part",
    }
    for name in (stale, *kept):
        (tmp_path / name).touch()
    with replacing(tmp_path / "moon.png") as part:
        part.write_text("a picture")
    assert {file.name for file in tmp_path.iterdir()} == {"moon.png", *kept}
    assert (tmp_path / "moon.png").read_text() == "a picture"


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "moon.png"
    file.write_text("a picture")
    with pytest.raises(FileNotFoundError), replacing(file) as part:
        os.replace(tmp_path / "missing", part)
    assert [one.name for one in tmp_path.iterdir()] == ["moon.png"]
    assert file.read_text() == "a picture"


def test_nothing_is_removed_where_processes_cannot_be_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = temporary(tmp_path / "moon.png").with_name(f".moon.png.{platform.node()}-{ended_process()}.part")
    left.touch()
    monkeypatch.setattr(metadata.os, "name", "nt")
    assert metadata._is_running(1)
    metadata._remove_stale(tmp_path / "moon.png")
    assert left.exists()
