"""ComfyUI as the tests see it. `StandIn` is the stand-in; `checkout.Checkout` has the same members, from a checkout of ComfyUI.

A test that takes the fixture `host` runs on both. Like the nodes, it imports `comfy`. It gets from its host what differs between the two:
small networks, an autoencoder, and what the progress bars showed.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.scalediff.comfy import stand_in
from tests.scalediff.comfy.specimens import SPECIMENS, Specimen


class StandIn:
    """The stand-in, where `import comfy` finds it until the end of the test.

    Attributes:
        updates: What all progress bars showed: the value, the total, and the preview as its format, the picture and its largest side.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: list[tuple[int, int, Any]] = []
        monkeypatch.setattr(ProgressBar, "updates", self.updates)
        for name, members in MODULES.items():
            module = ModuleType(name)
            module.__dict__.update(members)
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)

    def specimen(self, name: str) -> Specimen:
        """A small network with random weights, by the name of the model."""
        return SPECIMENS[name]

    def vae(self, *, frames: bool = False) -> Any:
        """A small autoencoder of 4 channels, 8 pixels per latent; with `frames` as those of videos. Its `calls` are recorded."""
        return stand_in.VAE(frames=frames)

    def cast_weights(self, layer: nn.Linear) -> None:
        """Let a layer cast its weights to the dtype of its input, as ComfyUI does for weights in fp8."""
        layer.__class__ = CastLinear

    def needs_stand_in(self, why: str) -> None:
        """Skip the test on a checkout, with the reason."""


class CastLinear(nn.Linear):
    """Contract (comfy/ops.py): weights are cast before they are used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class ProgressBar:
    """Contract (comfy/utils.py): a node's progress, with a preview."""

    updates: list[tuple[int, int, Any]] = []  # noqa: RUF012  # of all bars; every test has a list of its own

    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int, preview: Any) -> None:
        assert total == self.total
        self.updates.append((value, total, preview))


class Previewer:
    """Contract (latent_preview.py): makes a small picture of the estimate, here with a pixel for a latent."""

    def decode_latent_to_preview_image(self, kind: str, denoised: Tensor) -> tuple[str, Image.Image, int]:
        return kind, Image.new("RGB", (denoised.shape[-1], denoised.shape[-2])), 512


MODULES: dict[str, dict[str, Any]] = {
    "comfy": {},
    "comfy.patcher_extension": {"WrappersMP": stand_in.WrappersMP, "WrapperExecutor": stand_in.WrapperExecutor},
    "comfy.samplers": {"KSampler": stand_in.KSampler},
    "comfy.sample": {"sample": stand_in.sample, "prepare_noise": stand_in.prepare_noise},
    "comfy.model_sampling": {"EPS": stand_in.EPS, "CONST": stand_in.CONST},
    "comfy.utils": {"ProgressBar": ProgressBar, "PROGRESS_BAR_ENABLED": False},
    "comfy.ldm": {},
    "comfy.ldm.modules": {},
    "comfy.ldm.modules.attention": {"optimized_attention": stand_in.optimized_attention},
    "latent_preview": {"get_previewer": lambda device, latent_format: Previewer()},
}
