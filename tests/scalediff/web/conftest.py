"""The page's parts on the embedded model, a server in a thread, and a browser."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scalediff.web.gallery import Gallery
from scalediff.web.jobs import default_values

pytest.importorskip("PIL", reason="pictures need Pillow")
FAST = {"prompt": "a full moon", "height": 72, "width": 72, "steps": 2, "restart": "0.5", "preview": False}


def values(pipe: Any, **changes: Any) -> dict[str, Any]:
    """The values of the controls for a run of a few steps."""
    return {**default_values(pipe), **FAST, **changes}


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    return Gallery(tmp_path / "pictures")


@contextmanager
def serving(pipe: Any, gallery: Gallery, temporary: Path) -> Iterator[str]:
    """The address of a page that is served while the context lasts."""
    from scalediff.web.server import listen, make_app, make_server

    temporary.mkdir()
    with listen("127.0.0.1", 0) as listener:
        server = make_server(make_app(pipe, model="demo", gallery=gallery, temporary=temporary, host="127.0.0.1"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def _served(_demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Gallery]]:
    pytest.importorskip("gradio", reason="the page needs Gradio")
    folder = tmp_path_factory.mktemp("web")
    gallery = Gallery(folder / "pictures")
    with serving(_demo, gallery, folder / "uploads") as address:
        yield address, gallery


@pytest.fixture
def served(_served: tuple[str, Gallery]) -> tuple[str, Gallery]:
    """The address of a page and its pictures."""
    return _served


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium of this machine, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page in a browser needs playwright")
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()
