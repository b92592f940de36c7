"""Pictures that are handed out to workers, of which some are lost: every picture is drawn, or named with the reason."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scalediff.command import ray_workers
from scalediff.command.cli import main
from scalediff.command.loading import UsageError
from scalediff.command.ray_workers import Worker, with_absolute_paths
from scalediff.command.reporting import Job
from scalediff.command.workers import ATTEMPTS, Outcome, PicturesFailedError, hand_out


class Script:
    """A pool in which what happens is written down before: outcomes of pictures by their prompt, and of workers as they start.

    Attributes:
        drawn: Prompts in the order in which their pictures were finished.
    """

    def __init__(self, size: int, pictures: dict[str, list[Outcome]], *, starts: list[Outcome] | None = None) -> None:
        self.size, self._pictures, self._starts = size, pictures, starts or []
        self._events: list[tuple[Hashable, Outcome]] = []
        self._gone: set[Hashable] = set()
        self.started, self.drawn = 0, list[str]()

    def start(self) -> Hashable:
        self.started += 1
        self._events.append((self.started, self._starts.pop(0) if self._starts else Outcome()))
        return self.started

    def draw(self, worker: Hashable, job: Job) -> None:
        assert worker not in self._gone
        outcomes = self._pictures.get(job.prompt)
        outcome = outcomes.pop(0) if outcomes else Outcome()
        if outcome == Outcome():
            self.drawn.append(job.prompt)
        self._events.append((worker, outcome))

    def wait(self) -> tuple[Hashable, Outcome]:
        worker, outcome = self._events.pop(0)
        if outcome.lost:
            self._gone.add(worker)
        return worker, outcome


JOBS = [Job(name, 0, Path(f"{name}.png")) for name in "abcde"]
LOST = Outcome(lost="killed")


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_picture_of_a_lost_worker_is_drawn_by_another_once(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Script(size, {"a": [LOST, LOST], "e": [LOST]})
    hand_out(pool, JOBS)
    assert sorted(pool.drawn) == list("abcde")
    assert pool.started <= min(size, 5) + 3
    assert "a.png: its worker was lost, attempt 2 of 3: killed" in capsys.readouterr().err


def test_the_others_go_on_where_a_picture_fails(capsys: pytest.CaptureFixture[str]) -> None:
    pool = Script(2, {"a": [LOST] * ATTEMPTS, "c": [Outcome(error="an odd size", printed="text ")], "d": [Outcome(printed="of d")]})
    with pytest.raises(PicturesFailedError, match="2 of 5 pictures are not drawn"):
        hand_out(pool, JOBS)
    said = capsys.readouterr()
    assert pool.drawn == ["b", "e"]
    assert said.out == "text of d"
    assert "a.png: not drawn: killed\n" in said.err
    assert "c.png: not drawn: an odd size\n" in said.err


def test_a_worker_that_is_lost_as_it_loads_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    pool = Script(2, {}, starts=[LOST, Outcome(), LOST])
    hand_out(pool, JOBS)
    assert sorted(pool.drawn) == list("abcde")
    assert "a worker was lost while it loaded the model: killed" in capsys.readouterr().err


def test_the_others_go_on_where_a_gpu_can_never_load_the_model() -> None:
    """However often a worker is lost there, until all pictures are drawn; and it is not tried for ever without a picture in between."""
    jobs = [Job(f"{i}", 0, Path(f"{i}.png")) for i in range(20)]
    pool = Script(2, {}, starts=[Outcome(), *[LOST] * 99])
    hand_out(pool, jobs)
    assert sorted(pool.drawn) == sorted(job.prompt for job in jobs)
    pool = Script(2, {}, starts=[LOST] * 99)
    with pytest.raises(PicturesFailedError):
        hand_out(pool, jobs)
    assert pool.started == 2 * ATTEMPTS


def test_where_no_worker_comes_up_every_picture_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that had failed before."""
    pool = Script(1, {"a": [Outcome(error="an odd size")], "b": [LOST]}, starts=[Outcome(), LOST, LOST, LOST])
    with pytest.raises(PicturesFailedError, match="5 of 5 pictures are not drawn"):
        hand_out(pool, JOBS)
    said = capsys.readouterr().err
    assert "a.png: not drawn: an odd size\n" in said
    assert all(f"{name}.png: not drawn: no worker is left, the last one was lost: killed\n" in said for name in "bcde")


def test_workers_in_other_folders_have_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the embedded model and its upsampler keep their name, also beside folders that have it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "other").mkdir()
    given = {"model": "demo", "upsampler": "demo", "workdir": Path("demo"), "seed": [0]}
    assert vars(with_absolute_paths(Namespace(**given))) == given | {"workdir": tmp_path / "demo"}
    other = vars(with_absolute_paths(Namespace(**given | {"model": "other", "upsampler": Path("a.pth")})))
    assert (other["model"], other["upsampler"]) == (str(tmp_path / "other"), tmp_path / "a.pth")


def test_what_no_worker_can_load_is_an_error_at_once() -> None:
    with pytest.raises(UsageError, match="--model must be a folder"):
        hand_out(Script(2, {}, starts=[Outcome(error="--model must be a folder")] * 2), JOBS)


def test_idle_workers_come_before_new_ones() -> None:
    pool = Script(3, {"c": [LOST]})
    hand_out(pool, JOBS[:3])
    assert pool.started == 3
    assert pool.drawn == ["a", "b", "c"]


def test_a_worker_tells_errors_of_the_input_and_ends_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    job, errors = JOBS[0], list[Exception]()

    def fail(*what: object) -> None:
        print("begun")
        raise errors[-1]

    worker = Worker(Namespace(), several=False)
    monkeypatch.setattr(ray_workers, "prepare", lambda *what, several: (None, fail))
    assert worker.load(job) == Outcome()
    for kind in (UsageError, ValueError, ImportError):
        errors.append(kind("why\nmore"))
        assert worker.draw(job) == Outcome(error="why", printed="begun\n")
    errors.append(torch.OutOfMemoryError("the GPU is full"))
    with pytest.raises(torch.OutOfMemoryError):
        worker.draw(job)
    monkeypatch.setattr(ray_workers, "prepare", lambda *what, several: fail())
    errors.append(ImportError("spandrel is missing"))
    assert worker.load(job) == Outcome(error="spandrel is missing")


def test_ray_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["generate", "a moon", "--ray"]) == 2
    assert 'scalediff: error: --ray needs Ray: pip install "scalediff[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "world"), [(["--split-picture"], "1"), ([], "2")])
def test_ray_does_not_start_under_torchrun(
    arguments: list[str], world: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setenv("WORLD_SIZE", world)
    assert main(["generate", "a moon", "--ray", *arguments]) == 2
    assert "--ray starts its own workers, each of which draws whole pictures: leave out --split-picture" in capsys.readouterr().err
