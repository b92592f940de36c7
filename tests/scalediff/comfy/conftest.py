"""The fixture `host`: the stand-in for ComfyUI, and with the marker `comfy` a checkout, if COMFYUI_PATH is set."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator

import pytest
import torch

from tests.scalediff.comfy.checkout import Checkout
from tests.scalediff.comfy.host import StandIn


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take `host` on the checkout, too. The others do not depend on ComfyUI."""
    if "COMFYUI_PATH" in os.environ and "host" in inspect.signature(metafunc.function).parameters:
        metafunc.parametrize("host", ["stand-in", pytest.param("checkout", marks=pytest.mark.comfy)], indirect=True)


@pytest.fixture(autouse=True)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn | Checkout]:
    """What `import comfy` finds in a test, and what else the test needs of it."""
    if getattr(request, "param", "stand-in") == "stand-in":
        yield StandIn(monkeypatch)
    else:
        with torch.no_grad():  # ComfyUI runs all nodes without gradients
            yield Checkout(monkeypatch)
