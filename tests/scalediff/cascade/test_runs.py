"""What makes a run that run, and what is refused before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import native_size
from scalediff.cascade.workdir import digest
from scalediff.command.cli import main
from scalediff.command.jobs import plan_jobs
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

RUN: dict[str, Any] = {"height": 128, "width": 128, "steps": 4, "restart": 0.5}


def test_pictures_and_arrays_are_told_by_their_content() -> None:
    first, same, other = (Image.new("RGB", (40, 30), colour) for colour in ("red", "red", "blue"))
    assert digest({"image": first}) == digest({"image": same}) != digest({"image": other})
    assert digest(Image.new("L", (6, 2))) != digest(Image.new("L", (2, 6)))
    long = np.arange(5000.0)
    assert digest(long) == digest(long.copy())
    assert digest(long) != digest(np.where(long == 2500, 0, long)), "numpy prints long arrays in short"
    assert digest(long) != digest(long.reshape(50, 100))
    assert digest(lambda: 1) == digest(lambda: 2), "a function is told by its name"
    with pytest.raises(
        TypeError, match="arguments of a run with a workdir must have a repr that identifies their value, got <object object at"
    ):
        digest(object())


def test_other_weights_or_tiles_are_another_run(demo: Any, tmp_path: Path) -> None:
    scalediff.generate(demo, "a moon", generator=seeded(), workdir=tmp_path, **RUN)
    weight = next(demo.unet.parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.01)
        with pytest.raises(ValueError, match="belongs to another run \\(weights: '"):
            scalediff.generate(demo, "a moon", generator=seeded(), workdir=tmp_path, **RUN)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    demo.vae.enable_tiling()  # tiles, where without it bands or the whole picture are decoded
    try:
        with pytest.raises(ValueError, match="belongs to another run \\(vae: "):
            scalediff.generate(demo, "a moon", generator=seeded(), workdir=tmp_path, **RUN)
    finally:
        demo.vae.disable_tiling()
    with scalediff.patch_model(demo, window=(8, 8)), pytest.raises(ValueError, match="belongs to another run"):
        scalediff.generate(demo, "a moon", generator=seeded(), workdir=tmp_path, **RUN)
    assert len(scalediff.generate(demo, "a moon", generator=seeded(), workdir=tmp_path, **RUN).stages) == 2


def test_a_stage_that_a_callback_ended_is_not_a_finished_one(demo: Any, tmp_path: Path) -> None:
    def end(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return values

    scalediff.generate(demo, "a moon", generator=seeded(), workdir=tmp_path, call={"callback_on_step_end": end}, **RUN)
    assert not list(tmp_path.glob("stage*"))


@pytest.mark.parametrize(
    ("image", "prompt", "error", "message"),
    [
        (np.zeros((8, 8, 3)), "a moon", TypeError, "image must be a PIL picture or a list of them, got ndarray"),
        ("moon.png", "a moon", TypeError, "image must be a PIL picture or a list of them, got str"),
        ([Image.new("RGB", (64, 64))] * 2, "a moon", ValueError, "one picture per prompt, 1 in all, got 2"),
        (Image.new("RGB", (64, 64)), ["a", "b"], ValueError, "one picture per prompt, 2 in all, got 1"),
    ],
)
def test_what_is_no_picture_is_refused(demo: Any, image: Any, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scalediff.upscale(demo, image, prompt, **RUN)


def test_part_of_a_step_is_refused(demo: Any) -> None:
    with pytest.raises(TypeError, match=r"steps must be an integer, got steps=4\.5"):
        scalediff.generate(demo, "a moon", height=128, width=128, steps=4.5)  # type: ignore[arg-type]


def test_no_picture_is_written_over_another(tmp_path: Path) -> None:
    from argparse import Namespace

    jobs = plan_jobs(Namespace(seed=[2, 10, 1], out=tmp_path), ["moon 2", "moon", "moon"])
    assert len({job.out for job in jobs}) == 9
    assert [job.out.name for job in jobs[3:6]] == ["moon-2.png", "moon-10.png", "moon-1.png"]
    assert [job.out.name for job in jobs[6:]] == ["moon-2-again-1.png", "moon-10-again-1.png", "moon-1-again-1.png"]


def test_the_patched_call_of_qwen_guides_as_generate_does() -> None:
    pipe, arguments = built("Qwen-Image")
    arguments = {name: value for name, value in arguments.items() if not name.startswith("negative")}
    seen: list[Any] = []
    pipe.encode_prompt = lambda prompt=None, **rest: (seen.append(prompt), _embedded(rest))[1]  # no text encoder here
    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = native_size(pipe)
        pipe(**arguments, height=2 * height, width=2 * width, num_inference_steps=2, generator=seeded())
    assert " " in seen, "Qwen's pipeline guides only beside a negative prompt"


def _embedded(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if given.get("prompt_embeds") is not None:
        return given["prompt_embeds"], given["prompt_embeds_mask"]
    return torch.zeros(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)


def test_a_scheduler_that_cannot_restart_is_refused_in_words(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.save_pretrained(tmp_path / "tcd")
    diffusers.TCDScheduler.from_config(demo.scheduler.config).save_pretrained(tmp_path / "tcd" / "scheduler")
    index = tmp_path / "tcd" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "TCDScheduler"))
    line = ["--model", str(tmp_path / "tcd"), "--size", "128", "--out", str(tmp_path / "x.png"), "--quiet"]
    assert main(["generate", "a moon", *line]) == 2
    assert "high-resolution stages support the schedulers" in capsys.readouterr().err.splitlines()[-1]
