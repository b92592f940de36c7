"""The page in a real Chromium."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalediff.web.gallery import Gallery
from scalediff.web.runs import Run

Image = pytest.importorskip("PIL.Image")
playwright = pytest.importorskip("playwright.sync_api", reason="the page in a browser needs playwright")

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PATIENCE = 300_000  # milliseconds; two cores may be busy with other work
LONG: dict[str, Any] = {"size": (512, 512), "steps": 900}  # a run that is not over before the browser has seen and cancelled it


@pytest.fixture
def page(browser: Any, served: tuple[str, Gallery]) -> Iterator[Any]:
    """A page whose requests are watched: none may leave this machine, and none may fail."""
    yield from opened(browser, served[0])


def opened(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1360, "height": 940})
    page, outside, failed = context.new_page(), list[str](), list[str]()
    page.set_default_timeout(PATIENCE)
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None)
    page.on("response", lambda answer: failed.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#sd-draw:enabled")
    page.wait_for_function("!!customElements.get('scalediff-viewer')")
    for label in ("Sampling", "Memory and previews"):
        page.click(f"button:has-text('{label}')")
    yield page
    context.close()
    assert outside == []
    assert failed == []


def set_up(page: Any, *, prompt: str = "a full moon", size: tuple[int, int] = (72, 72), steps: int = 2, seed: int = 0) -> None:
    page.fill("#sd-prompt textarea", prompt)
    for name, value in {"height": size[0], "width": size[1], "seed": seed}.items():
        page.fill(f"#sd-{name} input", str(value))
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Restart", exact=True).fill("0.5")
    page.get_by_label("Steps", exact=True).press("Tab")


def status(page: Any, text: str) -> None:
    """Wait until the status line has this text."""
    try:
        page.wait_for_function("text => document.querySelector('#sd-status').innerText.includes(text)", arg=text)
    except playwright.TimeoutError:
        shown = page.inner_text("#sd-status"), page.locator("[data-testid=toast-text]").all_inner_texts()
        pytest.fail(f"the status line must come to say {text!r}, it says {shown[0]!r}, with the messages {shown[1]}")


def toast(page: Any) -> str:
    """The text of the message, which is then closed and has gone."""
    text = page.wait_for_selector("[data-testid=toast-text]").inner_text()
    page.click("[data-testid=toast-close]")
    page.wait_for_selector("[data-testid=toast-text]", state="detached")
    return text


def test_draw_zoom_and_use_the_settings_again(page: Any, served: tuple[str, Gallery]) -> None:
    set_up(page, prompt="a moon ${1 + 1} {{x}} <img src=x onerror=alert(1)>", size=(320, 256), seed=11)
    page.click("#sd-draw")
    status(page, "Finished")
    page.wait_for_selector("#sd-draw:enabled")
    assert "${1 + 1} {{x}} <img src=x onerror=alert(1)>" in page.inner_text("#sd-details"), "text stays text"
    percent = lambda: int(page.inner_text(".sd-percent").split()[0])  # noqa: E731
    fitting = percent()
    page.hover("scalediff-viewer")
    page.mouse.wheel(0, -900)
    page.wait_for_function("before => parseInt(document.querySelector('.sd-percent').innerText) > 4 * before", arg=fitting)
    page.click("scalediff-viewer button:has-text('1:1')")
    page.wait_for_function("document.querySelector('.sd-percent').innerText == '100 %'")
    with Image.open(served[1].path(served[1].names()[0])) as image:
        expected = list(image.getpixel((150, 250)))
    # At 100 % a pixel of the screen is one of the picture.
    pixel = """expected => {
        const {canvas, corner} = document.querySelector('scalediff-viewer');
        const data = canvas.getContext('2d').getImageData(corner[0] + 150, corner[1] + 250, 1, 1).data;
        return expected.every((value, i) => value == data[i]);
    }"""
    page.wait_for_function(pixel, arg=expected)
    page.click("scalediff-viewer button:has-text('Fit')")
    page.wait_for_function("before => document.querySelector('.sd-percent').innerText == `${before} %`", arg=fitting)
    page.fill("#sd-seed input", "5")
    page.click("#sd-reuse")
    page.wait_for_function("document.querySelector('#sd-seed input').value == '11'")


def test_compare_moves_a_divider_between_two_of_three_pictures(page: Any) -> None:
    set_up(page, size=(128, 128))
    page.click("#sd-compare")
    status(page, "Finished")
    page.wait_for_selector(".sd-choose-left", state="attached")
    options = page.locator(".sd-choose-left option").all_inner_texts()
    assert [re.sub(r", .*", "", option) for option in options] == ["ScaleDiff", "Full attention", "Direct inference"]
    assert "Direct inference" in page.locator(".sd-choose-left option:checked").inner_text()
    box = page.locator("scalediff-viewer").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, middle, steps=4)
    page.mouse.up()
    page.wait_for_function("document.querySelector('.sd-divider').getAttribute('aria-valuenow') == '25'")
    before = page.locator("scalediff-viewer").screenshot()
    page.select_option(".sd-choose-left", index=0)
    page.wait_for_timeout(300)
    assert page.locator("scalediff-viewer").screenshot() != before, "the left part shows another picture"


@pytest.mark.parametrize("late", [0, 2])
def test_cancel_and_draw_again(page: Any, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    """Also where Gradio ends the cancelled run seconds later than the run itself has ended; the next can be cancelled too."""
    set_up(page, **LONG)
    page.click("#sd-draw")
    status(page, "step")
    newest = Run._newest
    monkeypatch.setattr(Run, "_newest", lambda run: time.sleep(late) or newest(run))
    page.wait_for_timeout(500)
    for _ in range(2):
        page.click("#sd-cancel")
        status(page, "Cancelled")
        page.wait_for_selector("#sd-draw:enabled")
        page.click("#sd-draw")
        status(page, "step")
        page.wait_for_timeout(1000 * late)  # until the first run has ended for Gradio as well
        page.wait_for_selector("#sd-cancel:enabled")
        assert page.is_disabled("#sd-draw")
    page.click("#sd-cancel")
    status(page, "Cancelled")
    page.wait_for_selector("#sd-draw:enabled")
    set_up(page)
    page.click("#sd-draw")
    status(page, "Finished")


def test_two_users_wait_for_each_other_and_see_their_own(page: Any, browser: Any, served: tuple[str, Gallery]) -> None:
    users = opened(browser, served[0])
    second = next(users)
    set_up(page, **LONG, prompt="the sun")
    page.click("#sd-draw")
    status(page, "step")
    set_up(second, prompt="a moon")
    second.click("#sd-draw")
    status(second, "Waiting until the pipeline is free")
    second.wait_for_timeout(500)
    assert "Waiting" in second.inner_text("#sd-status")
    second.click("#sd-cancel")
    status(second, "Cancelled")
    assert "step" in page.inner_text("#sd-status"), "a user cancels only what is theirs"
    second.click("#sd-draw")
    status(second, "Waiting until the pipeline is free")
    page.click("#sd-cancel")
    status(page, "Cancelled")
    status(second, "Finished")
    assert "a moon" in second.inner_text("#sd-details")
    assert "a moon" not in page.inner_text("#sd-details")
    next(users, None)


def test_closing_the_page_ends_its_run(browser: Any, served: tuple[str, Gallery]) -> None:
    users = [opened(browser, served[0]) for _ in range(2)]
    first, second = map(next, users)
    set_up(first, **LONG)
    first.click("#sd-draw")
    status(first, "step")
    next(users[0], None)
    set_up(second)
    second.click("#sd-draw")
    status(second, "Finished")
    next(users[1], None)


def test_wrong_input_is_a_message(page: Any) -> None:
    for change, message in [
        ({"size": (100, 72)}, "Height and width must be multiples of 8, got height=100, width=72"),
        ({"prompt": " "}, "The prompt must say what to draw, got an empty prompt"),
        ({"steps": 0}, "Steps must be at least 1, got steps=0"),
    ]:
        set_up(page, **change)
        page.click("#sd-draw")
        assert message in toast(page)
        assert page.is_enabled("#sd-draw")
    set_up(page, size=(400_000, 400_000))
    page.click("#sd-draw")
    assert "The picture must fit into the memory of cpu" in toast(page)
    page.wait_for_selector("#sd-draw:enabled")


def test_upload_a_broken_file_and_then_a_picture_and_its_mask(page: Any, tmp_path: Path) -> None:
    broken, good, black = (tmp_path / f"{name}.png" for name in ("broken", "good", "black"))
    Image.new("L", (64, 48)).save(black)
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.linear_gradient("L").resize((64, 48)).save(good)
    set_up(page)
    page.click("button:has-text('Enlarge or change a picture')")
    page.set_input_files("#sd-file input[type=file]", broken)
    assert "The file must be a picture in one of the formats PNG, JPEG, WEBP, got none of these" in toast(page)
    assert page.inner_text("#sd-draw") == "Draw"
    page.click("#sd-file [aria-label='Clear'], #sd-file [aria-label='Remove this file']")
    page.set_input_files("#sd-file input[type=file]", good)
    page.wait_for_function("document.querySelector('#sd-draw').innerText == 'Enlarge'")
    assert (page.input_value("#sd-height input"), page.input_value("#sd-width input")) == ("96", "128")
    assert page.is_disabled("#sd-compare")
    page.set_input_files("#sd-mask input[type=file]", black)
    assert "The mask must be white where the picture is drawn anew, got a mask without white" in toast(page)
    page.click("#sd-mask [aria-label='Clear'], #sd-mask [aria-label='Remove this file']")
    page.set_input_files("#sd-mask input[type=file]", good)
    page.fill("#sd-strength textarea, #sd-strength input", "0.9")
    page.click("#sd-draw")
    status(page, "Finished")
    assert "64x48" not in page.inner_text("#sd-details")
    assert "enlarged from\n48x64\nmask\n48x64\nstrength\n0.9" in page.inner_text("#sd-details")
