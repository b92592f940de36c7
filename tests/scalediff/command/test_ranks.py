"""The command under torchrun: every picture is drawn by one process, and what is there is left alone."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from scalediff.command import drawing, loading
from scalediff.command.cli import main
from scalediff.command.loading import UsageError
from scalediff.command.ranks import Place, device_name, place

Image = pytest.importorskip("PIL.Image")

FAST = ["--size", "96", "--steps", "2", "--restart", "0.5", "--quiet"]


@pytest.fixture(autouse=True)
def _loaded_once(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_demo", lambda: demo)
    monkeypatch.setattr(drawing, "print_memory_estimate", lambda *what: None)


def start(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, *arguments: str) -> int:
    """Run the command as one process of torchrun."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    return main(["generate", *arguments, *FAST])


def test_processes_share_the_pictures_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(drawing, "_generate_one", lambda pipe, options, job, *how: job.out.write_text("a picture"))
    wanted = ["a moon", "a sun", "--seed", "0,1", "--out", str(tmp_path)]
    seen: list[str] = []
    for rank in range(3):
        assert start(monkeypatch, rank, 3, *wanted) == 0
        finished = sorted(path.name for path in tmp_path.iterdir())
        assert set(seen) <= set(finished)
        assert len(finished) - len(seen) == (2, 1, 1)[rank]
        seen = finished
    assert seen == ["a-moon-0.png", "a-moon-1.png", "a-sun-0.png", "a-sun-1.png"]
    assert "rank 2 of 3: 1 of 4 pictures, 0 are there" in capsys.readouterr().err
    (tmp_path / "a-sun-0.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert start(monkeypatch, 0, 1, *wanted, "--skip-existing") == 0
    assert "rank 0 of 1: 1 of 4 pictures, 3 are there" in capsys.readouterr().err
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"a-sun-0.png"}
    assert start(monkeypatch, 1, 2, *wanted, "--skip-existing") == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == after


def test_every_picture_has_its_own_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process draws one picture alone, because the others have the rest or because the rest is there."""
    folders: list[Path] = []
    monkeypatch.setattr(drawing, "_generate_one", lambda pipe, options, job, size, how, *more: folders.append(how["workdir"]))
    wanted = ["a moon", "a sun", "--out", str(tmp_path), "--workdir", str(tmp_path / "work")]
    for rank in range(2):
        assert start(monkeypatch, rank, 2, *wanted) == 0
    (tmp_path / "a-moon-0.png").write_text("a picture")
    assert start(monkeypatch, 0, 1, *wanted, "--skip-existing") == 0
    assert [folder.name for folder in folders] == ["a-moon-0", "a-sun-0", "a-sun-0"]


@pytest.mark.parametrize(
    ("arguments", "world", "message"),
    [
        (["--split-picture"], 1, "--split-picture needs several processes: start them with torchrun"),
        (["--split-picture", "--workdir", "w"], 2, "--workdir is not supported with --split-picture"),
        (["--split-picture", "--compare"], 2, "--split-picture is for ScaleDiff alone: leave out --compare and --method"),
    ],
)
def test_what_processes_cannot_draw_together(
    arguments: list[str], world: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, 0, world, "a moon", "--out", str(tmp_path / "moon.png"), *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize(("there", "drawn"), [("0", False), ("1", True)])
def test_processes_that_see_other_folders_draw_what_rank_0_lacks(there: str, drawn: bool, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (tmp_path / there / "a-moon-0.png").write_text("a picture")
    command = shlex.join([sys.executable, "-m", "scalediff", "generate", "a moon", *FAST, "--split-picture", "--skip-existing"])
    torchrun(2, "--no-python", "sh", "-c", f"cd {tmp_path}/$RANK && exec {command}")
    assert (tmp_path / "0" / "a-moon-0.png").read_bytes().startswith(b"\x89PNG" if drawn else b"a picture")
    assert len(list((tmp_path / "1").iterdir())) == (1 if there == "1" else 0)


@pytest.mark.slow
@pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo")
def test_a_killed_process_ends_a_picture_of_torchrun(tmp_path: Path) -> None:
    (tmp_path / "draw.py").write_text(KILLED)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        torchrun(2, str(tmp_path / "draw.py"), "generate", "a moon", *FAST, "--split-picture", "--out", str(tmp_path / "moon.png"))
    killed = float((tmp_path / "killed").read_text())
    assert time.time() - killed < 30
    assert re.search(
        r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9", raised.value.stderr
    )  # torchrun ends the others, maybe before they say it
    assert not (tmp_path / "moon.png").exists()


KILLED = """
import os, pathlib, signal, sys, time
from scalediff.command import cli, ranks

def killed(*what):
    (pathlib.Path(__file__).parent / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    load = ranks.patch_model
    def patched(pipe, **options):
        pipe.unet.mid_block.register_forward_hook(killed)
        return load(pipe, **options)
    ranks.patch_model = patched
sys.exit(cli.main())
"""


def torchrun(processes: int, *what: str) -> subprocess.CompletedProcess[str]:
    """Run processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *what]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("command", ["upscale", "compare"])
def test_other_commands_run_in_one_process(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    picture = tmp_path / "moon.png"
    assert main([command, *([str(picture)] if command == "upscale" else []), "a moon", "--out", str(tmp_path / "out.png")]) == 2
    advice = "--split-picture draws every picture together" if command == "upscale" else "`scalediff generate` shares pictures out"
    assert f"scalediff {command} runs in one process; under torchrun, {advice}, got WORLD_SIZE=2" in capsys.readouterr().err


def calls_of_one(monkeypatch: pytest.MonkeyPatch, function: str, *, saves: bool) -> list[dict[str, Any]]:
    """The arguments by which one of several processes calls a function that draws, which does nothing."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(drawing, "process_group", nullcontext)
    monkeypatch.setattr(drawing, "drawing_together", lambda options, pipe: nullcontext(saves))
    monkeypatch.setattr(drawing, function, lambda *given, **how: calls.append(how))
    monkeypatch.setattr(drawing, "print_result", lambda *what: None)
    return calls


@pytest.mark.parametrize("saves", [True, False])
def test_processes_upscale_a_picture_together(
    saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them saves it, and says what it draws and how far it is."""
    calls = calls_of_one(monkeypatch, "upscale", saves=saves)
    monkeypatch.setenv("WORLD_SIZE", "2")
    picture = tmp_path / "moon.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert main(["upscale", str(picture), "a moon", "--split-picture", "--preview", "1", "--out", str(tmp_path / "out.png")]) == 0
    assert [(how["height"], how["width"], "on_stage" in how) for how in calls] == [(128, 128, saves)]
    assert (calls[0]["on_step"] is not None, calls[0]["progress"]) == (saves, saves)
    assert ("64 x 64 -> 128 x 128, seed 0" in capsys.readouterr().err) == saves


@pytest.mark.parametrize("saves", [True, False])
def test_processes_generate_a_picture_together(
    saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they upscale one."""
    calls = calls_of_one(monkeypatch, "generate", saves=saves)
    assert start(monkeypatch, 0 if saves else 1, 2, "a moon", "--split-picture", "--preview", "1", "--out", str(tmp_path / "out.png")) == 0
    assert [("on_stage" in how, how["on_step"] is not None) for how in calls] == [(saves, saves)]
    assert ("64 x 64 -> 96 x 96, seed 0" in capsys.readouterr().err) == saves


@pytest.mark.parametrize(
    ("arguments", "world", "message"),
    [
        (["--split-picture"], 1, "--split-picture needs several processes: start them with torchrun"),
        (["--split-picture", "--workdir", "w"], 2, "--workdir is not supported with --split-picture"),
    ],
)
def test_what_processes_cannot_upscale_together(
    arguments: list[str], world: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    picture = tmp_path / "moon.png"
    Image.new("RGB", (64, 64)).save(picture)
    assert main(["upscale", str(picture), "a moon", "--out", str(tmp_path / "out.png"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_place_of_a_process() -> None:
    assert place({}) == Place(0, 1, None)
    assert place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    for wrong in ({"RANK": "8", "WORLD_SIZE": "8"}, {"RANK": "x"}):
        with pytest.raises(UsageError, match="RANK, WORLD_SIZE and LOCAL_RANK must be those of torchrun, got"):
            place(wrong)


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_name(Namespace(device="auto")) == "auto"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [device_name(Namespace(device=name)) for name in ("auto", "cpu")] == ["cuda:3", "cpu"]
