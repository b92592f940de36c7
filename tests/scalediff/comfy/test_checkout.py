"""`checkout.py` without ComfyUI: on a tree of the modules that it imports, with a network of the stand-in in them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scalediff.comfy.models import attention_of, patched
from tests.scalediff.comfy.checkout import Checkout
from tests.scalediff.comfy.specimens import GRID, WINDOW, by_hand, forward

TREE = {
    "comfy/cli_args.py": """
from types import SimpleNamespace
args = SimpleNamespace(cpu=False, preview_method="none")
class LatentPreviewMethod:
    Latent2RGB = "latent2rgb"
""",
    "comfy/sd.py": """
from comfy.cli_args import args
from tests.scalediff.comfy import stand_in
assert args.cpu
class VAE:
    def __init__(self, sd, device, dtype):
        self.weights, inner = sd, stand_in.VAE()
        self.decode, self.encode = inner.decode, inner.encode
""",
    "comfy/utils.py": "PROGRESS_BAR_ENABLED, PROGRESS_BAR_HOOK = True, None",
    "comfy/ops.py": "disable_weight_init = None",
    "comfy/latent_formats.py": "from tests.scalediff.comfy.stand_in import LatentFormat as SDXL",
    "comfy/model_base.py": """
from types import SimpleNamespace
from tests.scalediff.comfy import stand_in
ModelType = SimpleNamespace(EPS=stand_in.EPS, FLUX=stand_in.CONST)
def BaseModel(config, model_type):
    return stand_in.BaseModel(None, model_type(), config.latent_format, config.unet_config)
""",
    "comfy/model_patcher.py": """
from tests.scalediff.comfy import stand_in
def ModelPatcher(model, load_device, offload_device):
    return stand_in.ModelPatcher(model)
""",
    "comfy/patcher_extension.py": "from tests.scalediff.comfy.stand_in import WrappersMP",
    "comfy/taesd/taesd.py": """
import torch
class TAESD(torch.nn.Module):
    def __init__(self, latent_channels):
        super().__init__()
        self.taesd_decoder = torch.nn.Linear(latent_channels, 3)
        torch.nn.init.constant_(self.taesd_decoder.weight, torch.nan)
        self.vae_scale = torch.nn.Parameter(torch.tensor(1.0))
""",
    "comfy/ldm/flux/model.py": """
from tests.scalediff.comfy import networks
class Flux(networks.Flux):
    def __init__(self, depth, depth_single_blocks, **rest):
        super().__init__(depth, depth_single_blocks)
""",
}


def imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "comfy"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != os.environ.get("COMFYUI_PATH")])
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with torch.no_grad():
        yield Checkout(monkeypatch)
    for name in imported():
        del sys.modules[name]


def test_windows_on_a_network_of_the_checkout(checkout: Checkout) -> None:
    spec = checkout.specimen("FLUX")
    model = spec.model()
    windowed = patched(model, WINDOW, text_queries="global", text_rope=False)
    out, expected = forward(windowed, *spec.inputs(GRID), **spec.extra), by_hand(model, spec, GRID)
    assert (out - expected).abs().max() < spec.tolerance * expected.abs().max()
    attention = attention_of(windowed)
    assert attention is not None
    assert attention.blocks == spec.calls


def test_the_autoencoder_has_weights_and_records_its_calls(checkout: Checkout) -> None:
    vae = checkout.vae()
    assert vae.weights["vae_scale"] == 1
    assert all(weight.isfinite().all() for weight in vae.weights.values())
    assert vae.encode(vae.decode(torch.zeros(1, 4, 2, 2))).shape == (1, 4, 2, 2)
    assert vae.calls == ["decode", "encode"]


def test_progress_and_previews_of_the_checkout(checkout: Checkout) -> None:
    options, utils = (importlib.import_module(f"comfy.{name}") for name in ("cli_args", "utils"))
    assert (options.args.preview_method, utils.PROGRESS_BAR_ENABLED) == ("latent2rgb", False)
    utils.PROGRESS_BAR_HOOK(1, 2, "preview")
    utils.PROGRESS_BAR_HOOK(2, 2, "preview", node_id=3)
    assert checkout.updates == [(1, 2, "preview"), (2, 2, "preview")]


def test_what_a_checkout_lacks_is_skipped_with_the_reason(checkout: Checkout) -> None:
    with pytest.raises(pytest.skip.Exception, match="no small SD3 network is built from a checkout: only SDXL, FLUX, Chroma"):
        checkout.specimen("SD3")
    with pytest.raises(pytest.skip.Exception, match="no small autoencoder for videos is built from a checkout"):
        checkout.vae(frames=True)
    with pytest.raises(pytest.skip.Exception, match="because"):
        checkout.needs_stand_in("because")
