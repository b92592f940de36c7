"""The stand-in for ComfyUI, put where `import comfy` finds it."""

from __future__ import annotations

import pytest

from tests.scalediff.comfy import stand_in


@pytest.fixture(autouse=True)
def _comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)
