"""Pictures that are handed out to workers, of which some are lost: every picture is drawn, or named with the reason."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from pathlib import Path
from types import ModuleType

import pytest

from scalediff.command.cli import command_parser, main
from scalediff.command.loading import UsageError
from scalediff.command.ray_workers import _absolute
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
    with pytest.raises(PicturesFailedError, match="5 of 5 pictures are not drawn: 6 workers were lost, killed"):
        hand_out(Script(2, {}, starts=[LOST] * 9), JOBS)


def test_what_no_worker_can_load_is_an_error_at_once() -> None:
    with pytest.raises(UsageError, match="--model must be a folder"):
        hand_out(Script(2, {}, starts=[Outcome(error="--model must be a folder")] * 2), JOBS)


def test_idle_workers_come_before_new_ones() -> None:
    pool = Script(3, {"c": [LOST]})
    hand_out(pool, JOBS[:3])
    assert pool.started == 3
    assert pool.drawn == ["a", "b", "c"]


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


def test_workers_get_absolute_paths_of_files_and_the_names_of_what_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for upsampler, found in (("demo", "demo"), ("weights.pth", tmp_path / "weights.pth")):
        options = _absolute(command_parser().parse_args(["generate", "a moon", "--out", "pictures", "--upsampler", upsampler]))
        assert (options.upsampler, options.model, options.out) == (found, "demo", tmp_path / "pictures")
