"""How far a run is: every step with its numbers, the time left, previews on demand, one bar; and nothing of it changes the picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.latents import decode, to_pil_images
from scalediff.cascade.pipeline import native_size
from scalediff.cascade.progress import Step, shows_bars
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import PIPELINES, built, picture

diffusers = pytest.importorskip("diffusers")

PROMPT = "a full moon over snowy mountains at night"
RUN: dict[str, Any] = {"height": 96, "width": 96, "steps": 4, "restart": 0.5}


class Stop(Exception):
    """An interruption."""


class Clock:
    """A second for every look at it."""

    def __init__(self) -> None:
        self._seconds: Iterator[int] = count()

    def perf_counter(self) -> float:
        return float(next(self._seconds))


def numbers(steps: list[Step]) -> list[tuple[int, int, int, int]]:
    return [(step.stage, step.stages, step.step, step.steps) for step in steps]


def test_every_step_is_told_of(demo: Any) -> None:
    steps: list[Step] = []
    result = scalediff.generate(demo, PROMPT, generator=seeded(), on_step=steps.append, **RUN)
    assert numbers(steps) == [(1, 2, i, 4) for i in (1, 2, 3, 4)] + [(2, 2, i, 2) for i in (1, 2)]
    assert all(math.isfinite(step.left) and step.left >= 0 for step in steps)
    assert steps[-1].left == 0
    assert min(step.left for step in steps[:-1]) > 0
    plain = scalediff.generate(demo, PROMPT, generator=seeded(), **RUN)
    assert torch.equal(result.stages[-1].latents, plain.stages[-1].latents)
    assert result.images[0].tobytes() == plain.images[0].tobytes()


def test_the_time_left_is_by_the_pixels(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 64 x 64 and two of 96 x 96 are eight and a half units; a second each look."""
    monkeypatch.setattr("scalediff.cascade.progress.time", Clock())
    steps: list[Step] = []
    scalediff.generate(demo, PROMPT, generator=seeded(), on_step=steps.append, **RUN)
    looks = zip((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 6.25, 8.5), strict=True)
    assert [step.left for step in steps] == pytest.approx([seconds * (8.5 - done) / done for seconds, done in looks])


def test_one_stage_is_told_of_too(demo: Any) -> None:
    steps: list[Step] = []
    scalediff.generate(demo, PROMPT, height=64, width=64, steps=2, generator=seeded(), on_step=steps.append)
    assert numbers(steps) == [(1, 1, 1, 2), (1, 1, 2, 2)]
    assert steps[-1].left == 0


def test_a_solver_of_order_two_has_a_step_for_every_call(demo: Any) -> None:
    own, steps = demo.scheduler, list[Step]()
    demo.scheduler = diffusers.HeunDiscreteScheduler.from_config(own.config)
    try:
        scalediff.generate(demo, PROMPT, generator=seeded(), on_step=steps.append, **RUN)
    finally:
        demo.scheduler = own
    assert numbers(steps) == [(1, 2, i, 7) for i in range(1, 8)] + [(2, 2, i, 3) for i in range(1, 4)]
    assert steps[-1].left == 0


def test_the_scheduler_that_stable_diffusion_ships_with_is_counted(demo: Any) -> None:
    """At the native size any scheduler draws."""
    own, steps = demo.scheduler, list[Step]()
    demo.scheduler = diffusers.PNDMScheduler.from_config(own.config, skip_prk_steps=True)
    try:
        scalediff.generate(demo, PROMPT, height=64, width=64, steps=4, generator=seeded(), on_step=steps.append)
    finally:
        demo.scheduler = own
    assert [step.step for step in steps] == list(range(1, steps[-1].steps + 1))
    assert steps[-1].left == 0


@pytest.mark.parametrize("name", PIPELINES)
def test_previews_are_pictures_no_larger_than_native(name: str) -> None:
    """Of every model; a run that is looked at ends with the same bits."""
    pipe, arguments = built(name)
    how: dict[str, Any] = {"call": arguments, "preset": Settings(steps=3, restart=0.5, lfm_cutoff=0.5, sg_cutoff=0.5)}
    sizes: list[tuple[int, int]] = []

    def look(step: Step) -> None:
        (image,) = step.preview()
        sizes.append(image.size)

    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = native_size(pipe)
        plain, looked = (
            scalediff.generate(pipe, None, height=3 * height, width=2 * width, generator=seeded(), on_step=on_step, **how)
            for on_step in (None, look)
        )
    assert len(sizes) == sum(stage.steps for stage in plain.stages)
    assert all(0 < w * h <= height * width * 1.1 for w, h in sizes)
    assert all(h >= w for w, h in sizes)  # four latents a side round to a square
    assert torch.equal(plain.stages[-1].latents, looked.stages[-1].latents)


def test_the_last_preview_is_the_picture_made_small(demo: Any) -> None:
    """DDIM's last step ends at its estimate of the clean latents; a base stage is not made small at all."""
    shown: list[Any] = []
    run = RUN | {"height": 128, "width": 128}
    result = scalediff.generate(demo, PROMPT, generator=seeded(), on_step=lambda step: shown.append(step.preview()[0]), **run)
    first, last = result.stages
    assert shown[3].tobytes() == first.images[0].tobytes()
    small = last.latents.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean(dim=(3, 5))
    with torch.no_grad():
        expected = to_pil_images(demo, decode(demo, small))[0]
    values = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in (shown[-1], expected)]
    assert shown[-1].size == (64, 64)
    assert (values[0] - values[1]).abs().max() <= 2  # of 255


def test_a_batch_has_a_preview_of_each(demo: Any) -> None:
    shown: list[int] = []
    scalediff.generate(demo, [PROMPT, "a moon"], generator=seeded(), on_step=lambda step: shown.append(len(step.preview())), **RUN)
    assert shown == [2] * 6


@pytest.mark.parametrize("stage", [1, 2])
def test_a_callback_that_raises_leaves_the_pipeline_as_it_was(demo: Any, stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of(demo.unet), sorted(demo.__dict__), demo.scheduler, type(demo), dict(demo._progress_bar_config)

    def stop(step: Step) -> None:
        if step.stage == stage:
            raise Stop

    for patched in (False, True):
        if patched:
            scalediff.patch_model(demo)
        with pytest.raises(Stop):
            scalediff.generate(demo, PROMPT, generator=seeded(), on_step=stop, progress=True, **RUN)
        scalediff.unpatch_model(demo)
        assert (state_of(demo.unet), sorted(demo.__dict__), demo.scheduler, type(demo), dict(demo._progress_bar_config)) == before
    assert capsys.readouterr().err.endswith("\n"), "the bar is closed"


# The bar


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every bar that is shown: its total, how far it came, what it said."""
    tqdm = pytest.importorskip("tqdm")
    shown: list[Any] = []

    class Bar(tqdm.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.said: list[str] = []
            shown.append(self)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            self.said.append(desc or "")
            super().set_description(desc, refresh)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr("scalediff.cascade.progress.shows_bars", lambda: True)
    return shown


def test_one_bar_over_all_stages(demo: Any, bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Its unit is a pixel of a model call."""
    scalediff.generate(demo, PROMPT, generator=seeded(), progress=True, **RUN)
    (bar,) = bars
    assert bar.total == bar.n == 4 * 64**2 + 2 * 96**2
    assert bar.said == ["stage 1/2  64 x 64", "stage 2/2  96 x 96"]
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["50", "30"])
def test_a_bar_is_as_wide_as_the_user_says(
    demo: Any, bars: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """And has no colours, as NO_COLOR asks."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    scalediff.generate(demo, PROMPT, generator=seeded(), progress=True, **RUN)
    shown = capsys.readouterr().err
    assert max(len(line.rstrip("\n")) for line in shown.split("\r")) == int(columns)
    assert "\x1b[" not in shown


@pytest.mark.parametrize("columns", ["wide", "0", ""])
def test_a_width_that_is_no_number_is_left_to_the_terminal(
    demo: Any, bars: list[Any], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    scalediff.generate(demo, PROMPT, generator=seeded(), progress=True, **RUN)
    assert len(bars) == 1


STAGES = "stage 1/2  64 x 64\nstage 2/2  96 x 96\n"


@pytest.mark.parametrize(
    ("method", "lines"),
    [
        ("scalediff", STAGES),
        ("demofusion", "stage 1/2  64 x 64\nstage 2/2  96 x 96\n"),
        ("multidiffusion", "stage 1/1  96 x 96\n"),
    ],
)
def test_a_file_or_a_pipe_gets_a_line_for_each_stage(demo: Any, capsys: pytest.CaptureFixture[str], method: str, lines: str) -> None:
    scalediff.generate(demo, PROMPT, generator=seeded(), progress=True, method=method, height=96, width=96, steps=2)
    assert capsys.readouterr().err == lines


def test_a_resumed_run_prints_only_the_stages_that_it_runs(demo: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.stage == 2:
            raise Stop

    with pytest.raises(Stop):
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, on_step=stop, progress=True, **RUN)
    assert capsys.readouterr().err == STAGES
    scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, progress=True, **RUN)
    assert capsys.readouterr().err == STAGES.splitlines(keepends=True)[1]


def test_bars_are_for_terminals_and_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, terminal: bool) -> None:
            self.isatty = lambda: terminal

    notebook = type("OutStream", (Stream,), {"__module__": "ipykernel.iostream"})
    for stream, bars_fit in ((Stream(True), True), (Stream(False), False), (notebook(False), True), (None, False)):
        monkeypatch.setattr("sys.stderr", stream)
        assert shows_bars() == bars_fit


def test_no_bar_without_asking(demo: Any, bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    scalediff.generate(demo, PROMPT, generator=seeded(), **RUN)
    assert not bars
    assert capsys.readouterr().err == ""


def test_an_enlargement_shows_no_bar_either(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    demo.set_progress_bar_config(disable=False)
    try:
        scalediff.upscale(demo, picture(64, 64), PROMPT, generator=seeded(), **RUN)
    finally:
        demo.set_progress_bar_config(disable=True)
    assert capsys.readouterr().err == ""


def test_a_resumed_run_begins_where_it_was(demo: Any, bars: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar stands after the finished stages; what they took says nothing of the time left."""
    whole: list[Step] = []

    def stop(step: Step) -> None:
        whole.append(step)
        if step.stage == 2:
            raise Stop

    with pytest.raises(Stop):
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, on_step=stop, **RUN)
    monkeypatch.setattr("scalediff.cascade.progress.time", Clock())
    steps: list[Step] = []
    scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, on_step=steps.append, progress=True, **RUN)
    assert numbers(steps) == [(2, 2, 1, 2), (2, 2, 2, 2)]
    assert [step.left for step in steps] == [1, 0]
    assert bars[0].n == bars[0].total
    assert bars[0].said == ["stage 2/2  96 x 96"]
    scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, on_step=lambda _: pytest.fail("nothing is left"), **RUN)


def test_steps_of_an_enlargement() -> None:
    pipe, arguments = built("SDXL")
    steps: list[Step] = []
    how: dict[str, Any] = {"height": 32, "width": 32, "call": arguments, "steps": 4, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
    scalediff.upscale(pipe, picture(8, 8), None, generator=seeded(), on_step=steps.append, restart=(0.5, 0.25), **how)
    assert numbers(steps) == [(1, 2, 1, 2), (1, 2, 2, 2), (2, 2, 1, 1)]
    assert steps[-1].left == 0


def test_the_callers_own_callback_is_called_beside(demo: Any) -> None:
    seen: list[int] = []

    def note(pipe: Any, step: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return values

    steps: list[Step] = []
    scalediff.generate(demo, PROMPT, generator=seeded(), on_step=steps.append, call={"callback_on_step_end": note}, **RUN)
    assert seen == [0, 1, 2, 3, 0, 1]
    assert len(steps) == 6
    assert not denoiser_of(demo)._forward_hooks
