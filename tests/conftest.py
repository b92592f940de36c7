"""Shared fixtures: the embedded model, loaded once and handed out unpatched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import scalediff


@pytest.fixture(scope="session")
def _demo() -> Any:
    pytest.importorskip("diffusers", reason="the picture-making path needs diffusers")
    pipe = scalediff.load_demo()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def demo(_demo: Any) -> Iterator[Any]:
    """The embedded pipeline; unpatched again after the test."""
    yield _demo
    scalediff.unpatch_model(_demo)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
