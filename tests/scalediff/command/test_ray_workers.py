"""`scalediff generate --ray` with Ray itself: a worker on each core of this machine. One is killed, or the driver."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalediff.cascade.metadata import read_metadata

pytest.importorskip("ray", reason='needs Ray: pip install "scalediff[ray]"')
pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.slow

DRAWS = re.compile(r"\(Worker pid=(\d+)\).*, seed \d")  # a line of a worker that begins with a picture


class Run:
    """The command, drawing four pictures into a folder; all its processes end with it.

    Attributes:
        said: The lines that it has printed.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        wanted = [
            "generate",
            "a moon",
            "--seed",
            "0-3",
            "--size",
            "128",
            "--steps",
            "12",
            "--device",
            "cpu",
            "--quiet",
            "--out",
            str(folder),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": "local"}
        environment |= {"RAY_DEDUP_LOGS": "0", "RAY_AUTH_MODE": "disabled"}  # every line is printed, and no token is stored
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scalediff", *wanted, "--ray", *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self.said: list[str] = []

    def lines(self) -> Iterator[str]:
        """The lines that it prints from now on."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)
            yield line

    def end(self, name: signal.Signals | None = None) -> int:
        """Send a signal, if there is one, and wait; the exit code."""
        if name is not None:
            self._process.send_signal(name)
        for _ in self.lines():
            pass
        return self._process.wait(60)


def pictures(folder: Path) -> dict[int, Path]:
    """The finished pictures of a folder, by their seeds; each can be read."""
    return {read_metadata(path)["seed"]: path for path in folder.glob("a-moon-?.png")}


def first_to_draw(run: Run) -> int:
    """The process of the first worker that begins with a picture."""
    return next(int(found[1]) for line in run.lines() if (found := DRAWS.search(line)))


def test_a_killed_worker_s_picture_is_drawn_by_another(tmp_path: Path) -> None:
    run = Run(tmp_path)
    os.kill(first_to_draw(run), signal.SIGKILL)
    assert run.end() == 0, run.said
    assert any(re.search(r"a-moon-\d.png: its worker was lost, attempt 1 of 3: ", line) for line in run.said), run.said
    assert sorted(pictures(tmp_path)) == [0, 1, 2, 3]
    again = Run(tmp_path, "--skip-existing")
    assert again.end() == 0
    assert "rank 0 of 1: 0 of 4 pictures, 4 are there\n" in again.said


@pytest.mark.parametrize(("name", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_an_ended_driver_s_pictures_are_drawn_by_the_next(name: signal.Signals, code: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert any(pictures(tmp_path) for _ in run.lines()), run.said  # the first one is there
    assert run.end(name) == code, run.said
    before = {path: path.stat().st_mtime_ns for path in pictures(tmp_path).values()}
    assert Run(tmp_path, "--skip-existing").end() == 0
    assert sorted(pictures(tmp_path)) == [0, 1, 2, 3]
    assert {path: path.stat().st_mtime_ns for path in before} == before
