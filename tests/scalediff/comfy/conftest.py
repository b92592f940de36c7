"""What `import comfy` finds in a test: the stand-in, or a checkout of ComfyUI for tests with the marker `comfy`."""

from __future__ import annotations

import pytest

from tests.scalediff.comfy import checkout, stand_in


@pytest.fixture(autouse=True)
def _comfy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("comfy") is None:
        stand_in.install(monkeypatch)
    else:
        checkout.load()
