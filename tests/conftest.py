"""Shared fixtures: the embedded model, loaded once and handed out unpatched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported; without a GPU they run in Python


torch.set_num_threads(1)  # the models are small: threads cost more than they bring, above all beside other work


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


@pytest.fixture
def unet(demo: Any) -> Iterator[nn.Module]:
    yield demo.unet
    scalediff.unpatch_model(demo.unet)


def forward(unet: nn.Module, size: tuple[int, int], *, batch: int = 2, seed: int = 0) -> Tensor:
    rng = seeded(seed)
    x, text = torch.randn(batch, 4, *size, generator=rng), torch.randn(batch, 24, 64, generator=rng)
    with torch.no_grad():
        out: Tensor = unet(x, 500, encoder_hidden_states=text).sample
    return out


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind, in comparable form."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return {name: (type(m), sorted(m.__dict__), {h: dict(m.__dict__[h]) for h in hooks}) for name, m in module.named_modules()}
