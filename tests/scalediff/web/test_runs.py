"""A job in its thread: progress, pictures with metadata, comparison, cancelling, errors."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import scalediff
from scalediff.cascade import fitting
from scalediff.cascade.changing import changing_pipeline
from scalediff.cascade.memory import estimate
from scalediff.patching.networks import handle_of
from scalediff.web import runs
from scalediff.web.gallery import Gallery
from scalediff.web.jobs import job_of, values_of_metadata
from scalediff.web.runs import Cancelled, Progress, Run, format_seconds
from tests.conftest import seeded
from tests.scalediff.web.conftest import values

Image = pytest.importorskip("PIL.Image")
SQUARE = Image.new("RGB", (64, 64), "white")


def run_of(pipe: Any, gallery: Gallery, *, picture: Any = None, mask: Any = None, compare: bool = False, **changes: Any) -> Run:
    return Run(pipe, job_of(pipe, values(pipe, **changes), picture=picture, mask=mask, compare=compare), gallery, "demo")


def every_event(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """All progress of a run. `Run.progress` alone passes over what its reader is too slow for, and on a busy machine any reader may be."""
    monkeypatch.setattr(run, "_newest", run._events.get)
    return list(run.progress())


def test_the_picture_is_that_of_generate_and_has_its_metadata(demo: Any, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    events = every_event(run_of(demo, gallery, seed=4, sg=False), monkeypatch)
    name = events[-1].name
    assert name == "a-full-moon-4.png"
    result = scalediff.generate(demo, "a full moon", height=72, width=72, generator=seeded(4), steps=2, restart=0.5, sg=False)
    with Image.open(gallery.path(name)) as drawn:
        assert drawn.tobytes() == result.images[0].tobytes()
    metadata = gallery.metadata(name)
    assert (metadata["seed"], metadata["settings"]["sg"], metadata["method"], metadata["kind"]) == (4, False, "scalediff", "ScaleDiff")
    assert [stage["stage"] for stage in metadata["stages"]] == ["1/2", "2/2"]
    assert events[0].text == "Estimating the memory"
    assert any(event.text.startswith("ScaleDiff: stage 2 of 2, step 1 of 1") for event in events)
    assert all(0 <= event.share <= 1 for event in events)


def test_a_comparison_draws_all_three_with_the_same_seed(demo: Any, gallery: Gallery) -> None:
    names = [event.name for event in run_of(demo, gallery, compare=True).progress() if event.name]
    assert names == ["a-full-moon-0.png"] * 3
    companions = gallery.companions("a-full-moon-0.png")
    assert list(companions) == ["full", "direct"]
    assert gallery.metadata(companions["full"])["settings"]["attention"] == "full"
    direct = demo("a full moon", height=72, width=72, num_inference_steps=2, guidance_scale=1.5, generator=seeded()).images[0]
    with Image.open(gallery.path(companions["direct"])) as drawn:
        assert drawn.tobytes() == direct.tobytes()


@pytest.mark.parametrize(("method", "label"), [("multidiffusion", "MultiDiffusion"), ("demofusion", "DemoFusion")])
def test_other_methods_draw_with_progress(demo: Any, gallery: Gallery, monkeypatch: pytest.MonkeyPatch, method: str, label: str) -> None:
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 2**20)  # their denoiser sees a part at a time
    events = every_event(run_of(demo, gallery, method=method, height=128, width=64), monkeypatch)
    assert events[-1].text == f"{label} is finished"
    assert any(event.text.startswith(f"{label}: step ") for event in events)
    assert gallery.metadata("a-full-moon-0.png")["method"] == method


def test_a_picture_is_enlarged(demo: Any, gallery: Gallery) -> None:
    small = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    name = list(run_of(demo, gallery, picture=small, height=128, width=128).progress())[-1].name
    assert name is not None
    assert gallery.metadata(name)["picture_size"] == "64x64"
    expected = scalediff.upscale(demo, small, "a full moon", height=128, width=128, generator=seeded(), steps=2, restart=0.5)
    with Image.open(gallery.path(name)) as drawn:
        assert drawn.tobytes() == expected.images[0].tobytes()


@pytest.mark.parametrize("strength", [None, 0.9])
def test_a_part_of_a_picture_is_drawn_anew(demo: Any, gallery: Gallery, strength: float | None) -> None:
    """By the pipeline itself, or by the inpainting pipeline with its components."""
    small = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.linear_gradient("L").rotate(90).resize((32, 32))
    uploads: dict[str, Any] = {"picture": small, "mask": mask}
    run = run_of(demo, gallery, **uploads, height=128, width=128, strength="" if strength is None else str(strength))
    name = list(run.progress())[-1].name
    assert name is not None
    metadata = gallery.metadata(name)
    assert (metadata["picture_size"], metadata["mask_size"], metadata.get("strength")) == ("64x64", "32x32", strength)
    pipe = demo if strength is None else changing_pipeline(demo, with_mask=True)
    how: dict[str, Any] = {"height": 128, "width": 128, "steps": 2, "restart": 0.5, "generator": seeded()}
    expected = scalediff.upscale(pipe, small, "a full moon", mask_image=mask, strength=strength, **how).images[0]
    with Image.open(gallery.path(name)) as drawn:
        assert drawn.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("mask", "kind"), [(None, "Img2Img"), (SQUARE, "Inpaint")])
def test_the_memory_is_that_of_the_pipeline_that_draws(
    demo: Any, gallery: Gallery, monkeypatch: pytest.MonkeyPatch, mask: Any, kind: str
) -> None:
    def refuse(pipe: Any, arguments: Any, size: tuple[int, int], switches: Any) -> None:
        estimate(pipe, {**arguments, "num_inference_steps": 1}, size)
        raise ValueError(f"{type(pipe).__name__}, {size}, {sorted(arguments)}")

    monkeypatch.setattr(runs, "fit_of", refuse)
    run = run_of(demo, gallery, picture=SQUARE, mask=mask, height=128, width=128, strength="0.9")
    with pytest.raises(ValueError, match=rf"{kind}Pipeline, \(128, 128\), .*'image'.*'strength'"):
        list(run.progress())


def test_a_strength_leaves_the_restart_of_the_controls(demo: Any, gallery: Gallery) -> None:
    """The stages of a picture above the native size run the strength, and the values of the controls draw the same picture again."""
    changes = {"height": 128, "width": 128, "steps": 4, "strength": "0.25"}
    run = run_of(demo, gallery, picture=Image.new("RGB", (128, 128)), **changes)
    name = list(run.progress())[-1].name
    assert name is not None
    metadata = gallery.metadata(name)
    assert metadata["steps"] == 1
    again = values_of_metadata(metadata)
    assert {one: again[one] for one in (*changes, "restart")} == {**changes, "restart": "0.5"}


@pytest.mark.parametrize("method", ["scalediff", "multidiffusion"])
def test_a_cancelled_run_ends_at_its_next_step_and_gives_the_pipeline_back(demo: Any, gallery: Gallery, method: str) -> None:
    run, scheduler = run_of(demo, gallery, steps=200, method=method, height=256, width=256), demo.scheduler
    progress = run.progress()
    while "step" not in next(progress).text:
        pass
    run.cancel()
    with pytest.raises(Cancelled):
        list(progress)
    assert run.ended.is_set()
    assert demo.scheduler is scheduler
    assert handle_of(demo) is None
    assert list(gallery.folder.iterdir()) == []
    assert list(run_of(demo, gallery).progress())[-1].name == "a-full-moon-0.png", "the pipeline is free"


def test_a_run_whose_reader_goes_away_ends(demo: Any, gallery: Gallery) -> None:
    run = run_of(demo, gallery, steps=200, height=256, width=256)
    progress = run.progress()
    next(progress)
    progress.close()
    assert run.ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "scalediff-run"]


def test_a_run_that_does_not_fit_names_a_size_that_does(demo: Any, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 2**30 + 40 * 2**20)
    message = r"this run needs about \d\.\d GiB; 1\.0 GiB are available; \d+ x \d+ would fit; a switch under Memory runs it all the same"
    with pytest.raises(ValueError, match=message):
        list(run_of(demo, gallery, height=512, width=512).progress())
    assert not gallery.folder.exists()
    assert list(run_of(demo, gallery, force=True).progress())[-1].name


def test_a_memory_that_cannot_be_estimated_is_said(demo: Any, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise NotImplementedError("the memory of X cannot be estimated\nmore")

    monkeypatch.setattr(runs, "fit_of", refuse)
    texts = [event.text for event in every_event(run_of(demo, gallery), monkeypatch)]
    assert "No estimate of the memory: the memory of X cannot be estimated" in texts


def test_previews_take_a_small_share_of_the_time(demo: Any, gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(demo, gallery, preview=True, steps=6)
    previews = [event.preview for event in every_event(run, monkeypatch) if event.preview is not None]
    assert previews
    assert all(preview.size == (64, 64) for preview in previews)
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    run._pace.took(0.5)
    assert run._pace.next == 100 + 0.5 * 9
    assert all(event.preview is None for event in every_event(run_of(demo, gallery, preview=False), monkeypatch))


def test_progress_that_nobody_reads_in_time_is_passed_over(demo: Any, gallery: Gallery) -> None:
    """But no preview and no finished picture is lost."""
    run, image = run_of(demo, gallery), Image.new("RGB", (1, 1))
    for event in (Progress("a"), Progress("b", 0.1, image), Progress("c", 0.2), Progress("d", 1.0, name="d.png"), Progress("e")):
        run._events.put(event)
    assert run._newest() == Progress("d", 1.0, name="d.png")
    assert run._newest() == Progress("e")
    for event in (Progress("b", 0.1, image), Progress("c", 0.2)):
        run._events.put(event)
    assert run._newest() == Progress("c", 0.2, image)


def test_seconds_are_written_for_people() -> None:
    assert [format_seconds(s) for s in (0.4, 1.2, 99, 200)] == ["less than 1 s", "about 1 s", "about 99 s", "about 3 min"]
