"""Folders of drawn pictures: every item once over any shards, nothing twice, and another run is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import scalediff
from bench.evaluate.drawing import Task, draw_items, items_of, write_manifest
from bench.evaluate.folders import open_folder
from scalediff.cascade.metadata import read_metadata
from scalediff.settings import Preset, Settings
from tests.bench.evaluate.pictures import picture

PROMPTS = ["a sun over hills", "a moon over hills", "a sun"]
TASK = Task("demo", "scalediff", (96, 64), Preset(Settings(), "the test"), {"steps": 2})


@pytest.fixture
def pipe(demo: Any) -> Any:
    return demo


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Prompts and seeds of the calls of `scalediff.generate`, which is replaced by a picture of the seed."""
    calls: list[tuple[str, int]] = []

    def generate(pipe: Any, prompt: str, *, height: int, width: int, generator: torch.Generator, **given: Any) -> Any:
        assert given.keys() == {"preset", "method", "steps"}
        calls.append((prompt, generator.initial_seed()))
        return SimpleNamespace(images=[picture(generator.initial_seed(), (height, width))], settings=Settings(steps=given["steps"]))

    monkeypatch.setattr(scalediff, "generate", generate)
    return calls


@pytest.mark.parametrize("shards", [1, 2, 4, 9])
def test_every_item_is_drawn_once_whatever_the_shards(pipe: Any, drawn: list[tuple[str, int]], tmp_path: Path, shards: int) -> None:
    items = items_of(PROMPTS, [0, 3])
    for i in range(shards):
        draw_items(pipe, TASK, items, tmp_path / "scalediff", shard=(i, shards))
    assert sorted(drawn) == sorted([(prompt, seed + i) for seed in (0, 3_000_000) for i, prompt in enumerate(PROMPTS)])
    folder = open_folder(tmp_path / "scalediff")
    assert [file.name for file in folder.files] == sorted(item.file for item in items)


def test_a_finished_picture_is_not_drawn_again_and_its_record_is_complete(pipe: Any, drawn: list[tuple[str, int]], tmp_path: Path) -> None:
    items = items_of(PROMPTS, [0])
    assert draw_items(pipe, TASK, items, tmp_path) == 3
    (tmp_path / items[1].file).unlink()
    drawn.clear()
    assert draw_items(pipe, TASK, items, tmp_path) == 1
    assert drawn == [(PROMPTS[1], 1)]
    record = read_metadata(tmp_path / "000001-1.png")
    assert {name: record[name] for name in ("prompt", "index", "seed", "method", "size", "model")} == {
        "prompt": PROMPTS[1], "index": 1, "seed": 1, "method": "scalediff", "size": [96, 64], "model": "demo",
    }  # fmt: skip
    assert record["settings"]["steps"] == 2
    assert record["seconds"] >= 0
    assert record["weights"] == json.loads((tmp_path / "run.json").read_text())["weights"] != ""


def changed(**parts: Any) -> Task:
    return Task(**{**TASK.__dict__, **parts})


@pytest.mark.parametrize(
    ("task", "prompts", "seeds", "name"),
    [
        (TASK, [*PROMPTS, "a moon"], [0], "prompts"),
        (TASK, PROMPTS[::-1], [0], "prompts"),
        (TASK, PROMPTS, [1], "seeds"),
        (changed(size=(64, 96)), PROMPTS, [0], "size"),
        (changed(given={"steps": 3}), PROMPTS, [0], "given"),
        (changed(method="demofusion"), PROMPTS, [0], "method"),
        (changed(preset=Preset(Settings(size_conditioning="native"), "the test")), PROMPTS, [0], "preset"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    pipe: Any, drawn: list[tuple[str, int]], tmp_path: Path, task: Task, prompts: Sequence[str], seeds: list[int], name: str
) -> None:
    draw_items(pipe, TASK, items_of(PROMPTS, [0]), tmp_path)
    with pytest.raises(ValueError, match=rf"belongs to another run \(.*{name}: "):
        draw_items(pipe, task, items_of(prompts, seeds), tmp_path)
    assert len(drawn) == 3


def test_other_weights_are_another_run(pipe: Any, drawn: list[tuple[str, int]], tmp_path: Path) -> None:
    draw_items(pipe, TASK, items_of(PROMPTS, [0]), tmp_path)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    try:
        with pytest.raises(ValueError, match=r"belongs to another run \(weights: "):
            draw_items(pipe, TASK, items_of(PROMPTS, [0]), tmp_path)
    finally:
        with torch.no_grad():
            pipe.unet.conv_in.weight.div_(2)


def _draw_until_killed(folder: Path) -> None:
    """Draws slowly, and ends itself as `kill -9` does in the middle of writing the third picture."""
    from PIL.Image import Image

    save = Image.save
    saved: list[Path] = []

    def save_or_die(image: Image, part: Path, **options: Any) -> None:
        saved.append(part)
        save(image, part, **options)
        if len(saved) == 3:
            part.write_bytes(part.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    Image.save = save_or_die  # type: ignore[method-assign, assignment]
    scalediff.generate = lambda pipe, prompt, **given: SimpleNamespace(  # type: ignore[assignment]
        images=[picture(given["generator"].initial_seed())], settings=Settings()
    )
    draw_items(scalediff.load_demo(), TASK, items_of(PROMPTS, [0]), folder)


@pytest.mark.slow  # a process of its own
def test_after_a_kill_only_what_is_missing_is_drawn(trained_demo: Any, drawn: list[tuple[str, int]], tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_draw_until_killed, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(file.name for file in tmp_path.glob("[!.]*.png")) == ["000000-0.png", "000001-1.png"]
    assert list(tmp_path.glob(".*.part"))
    with pytest.raises(ValueError, match="must hold all 3 pictures of its run, got 2: repeat the same generate command"):
        open_folder(tmp_path)
    draw_items(trained_demo, TASK, items_of(PROMPTS, [0]), tmp_path)
    assert drawn == [(PROMPTS[2], 2)]
    assert len(open_folder(tmp_path)) == 3


def test_half_a_file_does_no_harm(pipe: Any, drawn: list[tuple[str, int]], tmp_path: Path) -> None:
    items = items_of(PROMPTS, [0])
    draw_items(pipe, TASK, items, tmp_path)
    (tmp_path / items[2].file).rename(tmp_path / f".{items[2].file}.7.part")
    drawn.clear()
    draw_items(pipe, TASK, items, tmp_path)
    assert drawn == [(PROMPTS[2], 2)]
    assert len(open_folder(tmp_path)) == 3


def test_a_picture_that_is_finished_while_the_manifest_is_written_is_in_it(
    pipe: Any, drawn: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process has its last picture after this one has listed the folder, and writes its own manifest first."""
    items = items_of(PROMPTS, [0])
    draw_items(pipe, TASK, items, tmp_path)
    late, hidden = tmp_path / items[2].file, tmp_path / "hidden"
    late.rename(hidden)
    replace = os.replace

    def replace_after_the_other(part: Path, target: Path) -> None:
        if hidden.exists():
            hidden.rename(late)
        replace(part, target)

    monkeypatch.setattr(os, "replace", replace_after_the_other)
    write_manifest(tmp_path, items)
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["file"], record["prompt"], record["seed"]) for record in records] == [(one.file, one.prompt, one.seed) for one in items]
