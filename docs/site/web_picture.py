"""docs/guide/web.jpg, the page in a browser after a comparison: `python docs/site/web_picture.py`, with the extras web and browser."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "guide" / "web.jpg"
PROMPTS = ["the sun over the sea at dusk", "a full moon over snowy mountains at night"]


def main() -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        command = [sys.executable, "-m", "scalediff.command.cli", "web", "--port", "0", "--out", folder]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        address = next(line.split()[0] for line in server.stderr if line.startswith("http://"))
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.set_default_timeout(600_000)
        page.goto(address)
        for prompt, button in zip(PROMPTS, ("#sd-draw", "#sd-compare"), strict=True):
            page.fill("#sd-prompt textarea", prompt)
            page.click(button)
            page.wait_for_selector("#sd-cancel:enabled")
            page.wait_for_selector("#sd-draw:enabled")
        page.wait_for_timeout(1000)
        page.screenshot(path=PICTURE, type="jpeg", quality=85)
        browser.close()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
