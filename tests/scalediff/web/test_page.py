"""What the page does, by calling its functions; a browser is in test_browser.py."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from scalediff.web.gallery import Gallery
from scalediff.web.jobs import FIELDS
from tests.scalediff.web.conftest import values

gr = pytest.importorskip("gradio", reason="the page needs Gradio")
Image = pytest.importorskip("PIL.Image")
from scalediff.web.page import Page, _report  # noqa: E402  # needs Gradio


@pytest.fixture
def page(demo: Any, gallery: Gallery) -> Page:
    return Page(demo, model="demo", gallery=gallery)


def listed(page: Page, **changes: Any) -> list[Any]:
    """The values of the controls as the page passes them."""
    given = values(page.pipe, **changes)
    return [given[name] for name in FIELDS]


def test_a_picture_is_drawn_shown_and_its_settings_used_again(page: Page) -> None:
    told = list(page.draw(page.job(listed(page, seed=3, sg=False), None, compare=False), "me"))
    assert "Starting" in told[0][0]
    status, viewer, details, pictures, name, failed = told[-2]
    assert (name, failed) == ("a-full-moon-3.png", None)
    assert "ScaleDiff is finished" in status
    assert f"scalediff/thumbnails/{name}" in pictures
    assert name in viewer
    assert "72 x 72" in details
    assert "Finished" in told[-1][0]
    assert page.runs == {}
    again = dict(zip(FIELDS, page.reuse(name), strict=True))
    assert (again["prompt"], again["seed"], again["sg"], again["steps"]) == ("a full moon", 3, False, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "The prompt must say what to draw, got an empty prompt"),
        ({"height": 100}, "Height and width must be multiples of 8, got height=100, width=72"),
        ({"steps": None}, "Steps must be an integer, got an empty field"),
    ],
)
def test_wrong_values_are_messages_of_the_page(page: Page, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(gr.Error) as raised:
        page.job(listed(page, **changes), None, compare=False)
    assert raised.value.message == message


def test_a_run_that_fails_says_why_and_frees_the_pipeline(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message comes after the buttons are back, so it is returned; a failure of our own is named as one."""
    job = page.job(listed(page, method="demofusion", steps=1, height=128, width=512), None, compare=False)
    for error, text in [(ValueError("no\nmore"), "no"), (ZeroDivisionError("oh"), "ZeroDivisionError: oh"), (MemoryError(), "MemoryError")]:

        def fail(*args: Any, error: Exception = error, **named: Any) -> None:
            raise error

        monkeypatch.setattr("scalediff.web.runs.generate", fail)
        *_, (status, _, _, _, _, failed) = page.draw(job, "me")
        assert failed is not None
        assert failed.startswith(text)
        assert "sd-error" in status
        with pytest.raises(gr.Error) as raised:
            _report(failed)
        assert raised.value.message.lower().startswith(text.lower())
    assert page.runs == {}
    _report(None)


def test_a_session_cancels_its_own_run_only(page: Page) -> None:
    drawing = page.draw(page.job(listed(page, steps=500), None, compare=False), "me")
    next(drawing)
    next(drawing)
    page.cancel("somebody else")
    run = page.runs["me"]
    assert not run.ended.is_set()
    page.cancel("me")
    assert "Cancelled" in list(drawing)[-1][0]
    assert run.ended.is_set()


def test_a_page_that_is_closed_ends_its_run(page: Page) -> None:
    drawing = page.draw(page.job(listed(page, steps=500), None, compare=False), "me")
    next(drawing)
    next(drawing)
    drawing.close()
    assert page.runs == {}
    assert not [thread for thread in threading.enumerate() if thread.name == "scalediff-run"]


def test_uploads(page: Page, tmp_path: Path) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    Image.new("RGB", (64, 48)).save(good)
    broken.write_bytes(b"nothing")
    picture, height, width, viewer, draw, compare, failed = page.upload(str(good), None)
    assert (picture.size, height, width, failed) == ((64, 48), 96, 128, None)
    assert "data:image/jpeg;base64," in viewer
    assert (draw["value"], compare["interactive"]) == ("Enlarge", False)
    picture, *_, draw, compare, failed = page.upload(str(broken), None)
    assert picture is None
    assert "got none of these" in failed
    picture, *_, draw, compare, failed = page.upload(None, None)
    assert (picture, draw["value"], compare["interactive"], failed) == (None, "Draw", True, None)


def test_masks(page: Page, tmp_path: Path) -> None:
    """Uploaded before or after the picture; one that does not fit is a message, at once and when the picture is drawn."""
    picture, half, wide, black, clear = (tmp_path / f"{name}.png" for name in ("picture", "half", "wide", "black", "clear"))
    Image.new("RGB", (64, 64)).save(picture)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(half)
    Image.new("L", (64, 32), 255).save(wide)
    Image.new("L", (64, 64), 127).save(black)
    Image.new("LA", (64, 64), (255, 0)).save(clear)
    opened, *_, plain, _, _, failed = page.upload(str(picture), None)
    assert failed is None
    *_, view, _, _, failed = page.upload(str(picture), str(half))
    assert (view, None) == page.upload_mask(str(half), opened)
    assert failed is None
    assert view != plain, "the mask is shown"
    assert page.upload_mask(None, opened) == (plain, None)
    assert page.upload_mask(str(half), None)[1] is None
    given = listed(page, height=128, width=128, strength="0.5")
    job = page.job(given, opened, str(half))
    assert (job.mask.size, job.strength) == ((32, 32), 0.5)
    for file, message in [
        (wide, "the mask must have the aspect ratio of the picture, 64 x 64, got 32 x 64"),
        (black, "the mask must be white where the picture is drawn anew, got a mask without white"),
        (clear, "the mask must be white where the picture is drawn anew, got a mask without white"),
        (tmp_path, "the file must be"),
    ]:
        _, said = page.upload_mask(str(file), opened)
        assert said is not None
        assert said.startswith(message)
        with pytest.raises(gr.Error) as raised:
            page.job(given, opened, str(file))
        assert raised.value.message.lower() == said.lower()


@pytest.mark.parametrize("name", ["../secret.png", "missing-1.png", "/etc/passwd"])
def test_pictures_that_are_not_there(page: Page, name: str) -> None:
    for use in (page.show, page.reuse):
        with pytest.raises(gr.Error, match="must be one of the gallery"):
            use(name)
    with pytest.raises(gr.Error, match="Choose a picture first"):
        page.reuse(None)
