"""A run that is interrupted goes on after its last finished stage, to the same bits; a folder is of one run."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import scalediff
from scalediff.cascade.metadata import read_metadata
from scalediff.cascade.workdir import digest
from scalediff.command.cli import main
from tests.conftest import seeded

PROMPT = "a full moon over snowy mountains at night"
RUN: dict[str, Any] = {"height": 96, "width": 96, "steps": 4, "restart": 0.5}
ROOT = Path(__file__).parents[3]


class Stop(Exception):
    """An interruption."""


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted_in_the_second_stage(pipe: Any, folder: Path, **changes: Any) -> None:
    passes = []

    def count(*_: object) -> None:
        passes.append(1)
        if len(passes) > 4:  # the base stage has four steps
            raise Stop

    remover = pipe.unet.register_forward_pre_hook(count)
    with pytest.raises(Stop):
        scalediff.generate(pipe, PROMPT, generator=seeded(), workdir=folder, **(RUN | changes))
    remover.remove()


def test_a_run_goes_on_after_its_last_finished_stage(demo: Any, tmp_path: Path) -> None:
    whole = scalediff.generate(demo, PROMPT, generator=seeded(), **RUN)
    folder = tmp_path / "run"
    interrupted_in_the_second_stage(demo, folder)
    assert files(folder) == ["run.json", "stage1-64x64.png", "stage1.pt"]
    passes: list[int] = []
    remover = demo.unet.register_forward_pre_hook(lambda *_: passes.append(1))
    stages: list[int] = []
    again = scalediff.generate(demo, PROMPT, generator=seeded(), workdir=folder, on_stage=lambda stage: stages.append(stage.index), **RUN)
    assert len(passes) == 2  # the steps of the second stage alone
    assert stages == [1, 2]
    for one, other in zip(whole.stages, again.stages, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.images[0].tobytes() == other.images[0].tobytes()
        assert (one.height, one.steps) == (other.height, other.steps)
    passes.clear()
    finished = scalediff.generate(demo, PROMPT, generator=seeded(), workdir=folder, **RUN)
    remover.remove()
    assert not passes
    assert finished.images[0].tobytes() == whole.images[0].tobytes()
    assert read_metadata(folder / "stage2-96x96.png")["prompt"] == PROMPT


def test_an_enlargement_goes_on_too(demo: Any, tmp_path: Path) -> None:
    image = scalediff.generate(demo, PROMPT, height=64, width=64, steps=2, generator=seeded()).images[0]
    how: dict[str, Any] = {"height": 160, "width": 160, "steps": 4, "restart": 0.5}
    whole = scalediff.upscale(demo, image, PROMPT, generator=seeded(), **how)
    passes: list[int] = []

    def count(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise Stop

    remover = demo.unet.register_forward_pre_hook(count)
    with pytest.raises(Stop):
        scalediff.upscale(demo, image, PROMPT, generator=seeded(), workdir=tmp_path, **how)
    again = scalediff.upscale(demo, image, PROMPT, generator=seeded(), workdir=tmp_path, **how)
    remover.remove()
    assert len(passes) == 3 + 2
    assert torch.equal(again.stages[-1].latents, whole.stages[-1].latents)


def test_a_run_that_is_drawn_to_its_base_stage_goes_on(demo: Any, tmp_path: Path) -> None:
    """The estimates of the base stage are kept with it; a setting for each stage is the same setting again."""
    numbers = scalediff.settings.Settings(guidance_scale=1.0, anchor="trajectory", sg_cutoff_start=0.5)
    how: dict[str, Any] = {"height": 96, "width": 96, "steps": 4, "restart": (0.75, 0.25), "preset": numbers}
    how["sizes"] = [(64, 64), (80, 80), (96, 96)]
    whole = scalediff.generate(demo, PROMPT, generator=seeded(), **how)
    assert [stage.steps for stage in whole.stages] == [4, 3, 1]
    passes: list[int] = []
    for steps_until_it_stops in (4, 4 + 3):
        passes.clear()

        def count(*_: object, limit: int = steps_until_it_stops) -> None:
            passes.append(1)
            if len(passes) > limit:
                raise Stop

        remover = demo.unet.register_forward_pre_hook(count)
        folder = tmp_path / str(steps_until_it_stops)
        with pytest.raises(Stop):
            scalediff.generate(demo, PROMPT, generator=seeded(), workdir=folder, **how)
        remover.remove()
        kept = torch.load(folder / "stage1.pt", weights_only=True)["trajectory"]
        assert [x.shape for x in kept] == [(1, 4, 16, 16)] * 3, "as many as the longest stage has steps"
        again = scalediff.generate(demo, PROMPT, generator=seeded(), workdir=folder, **how | {"restart": [0.75, 0.25]})
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(again.stages, whole.stages, strict=True))
        assert again.images[0].tobytes() == whole.images[0].tobytes()
    assert torch.load(tmp_path / "7" / "stage2.pt", weights_only=True)["latents"].shape == whole.stages[1].latents.shape
    with pytest.raises(ValueError, match=r"belongs to another run \(.*settings: .*'anchor': 'trajectory'"):
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=folder, **how | {"preset": "default"})


@pytest.mark.parametrize(
    ("changes", "seed", "name"),
    [({"steps": 5}, 0, "settings"), ({"height": 192}, 0, "sizes"), ({"negative_prompt": "fog"}, 0, "negative_prompt"), ({}, 1, "seed")],
)
def test_a_folder_is_of_one_run(demo: Any, tmp_path: Path, changes: dict[str, Any], seed: int, name: str) -> None:
    interrupted_in_the_second_stage(demo, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"belongs to another run .*{name}: .* there.*: use another workdir"):
        scalediff.generate(demo, PROMPT, generator=seeded(seed), workdir=tmp_path, **(RUN | changes))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_loses_nothing(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished stays, nothing is half-written, and the run can go on when there is room again."""
    own = torch.save

    def full(content: Any, path: Path) -> None:
        if "stage2" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, **RUN)
    assert "stage2.pt" not in files(tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".part")]
    monkeypatch.undo()
    again = scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, **RUN)
    whole = scalediff.generate(demo, PROMPT, generator=seeded(), **RUN)
    assert torch.equal(again.stages[-1].latents, whole.stages[-1].latents)


def test_what_is_not_a_workdir_is_refused(demo: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workdir needs a generator, so that the same call can resume the run, got generator=None"):
        scalediff.generate(demo, PROMPT, workdir=tmp_path, **RUN)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="workdir must be a writable folder, new or of this run"):
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=file, **RUN)
    interrupted_in_the_second_stage(demo, tmp_path / "run")
    (tmp_path / "run" / "stage1.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"stage1.pt cannot be read as a saved stage: delete it to compute the stage again"):
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path / "run", **RUN)


def test_a_digest_tells_tensors_apart() -> None:
    x = torch.arange(6.0)
    assert digest({"a": [x, 1]}) == digest({"a": (x.clone(), 1)})
    assert len({digest(v) for v in (x, x.view(2, 3), x.double(), -x, [x], None, "x", 1, 1.0)}) == 9


# The command, killed in the first pass after a stage is saved.
KILLED = """
import os, pathlib, signal, sys
from scalediff.command import cli, loading

load, saved = loading.load_demo, pathlib.Path(sys.argv.pop(1))

def watched():
    pipe = load()
    pipe.unet.mid_block.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if saved.exists() else None)
    return pipe

loading.load_demo = watched
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """kill -9 in the middle of the last stage; the same command again gives the file of an uninterrupted one."""
    drawn = ["generate", "a moon", "--size", "256", "--steps", "12", "--quiet"]
    resumed = [*drawn, "--out", str(tmp_path / "again.png"), "--workdir", str(tmp_path / "run")]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run" / "stage2.pt"), *resumed], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "again.png").exists()
    assert "stage3.pt" not in files(tmp_path / "run")
    assert main(resumed) == 0
    assert main([*drawn, "--out", str(tmp_path / "whole.png")]) == 0
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "whole.png") as whole, image.open(tmp_path / "again.png") as again:
        assert whole.tobytes() == again.tobytes()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["prompt"] == "a moon"
