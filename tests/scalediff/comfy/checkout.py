"""Specimens of ComfyUI's own networks, small and with random weights, from the checkout in COMFYUI_PATH.

They stand beside those of the stand-in, with the marker `comfy`, and the same tests run on them. Written from ComfyUI's interfaces.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from tests.scalediff.comfy.specimens import TEXT, Specimen, levels, prefix


def load() -> None:
    """Make `import comfy` find the checkout, on the CPU."""
    path = os.environ["COMFYUI_PATH"]
    if path not in sys.path:
        sys.path.append(path)
    importlib.import_module("comfy.cli_args").args.cpu = True  # read when comfy.model_management is first imported
    importlib.import_module("comfy.sd")


class CheckoutSpecimen(Specimen):
    """A specimen whose network and `ModelPatcher` are ComfyUI's; `build` is called after `load`."""

    def model(self, *, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
        base, patcher, formats = (importlib.import_module(f"comfy.{name}") for name in ("model_base", "model_patcher", "latent_formats"))
        net = self.build().float().eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():  # ComfyUI leaves them uninitialised
            parameter.requires_grad_(False)
            spread = max(1, parameter[0].numel()) ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        config = SimpleNamespace(
            unet_config={"disable_unet_model_creation": True, **self.unet_config}, latent_format=formats.SDXL(), manual_cast_dtype=None,
            custom_operations=None, optimizations={}, sampling_settings={}, memory_usage_factor=1.0,
        )  # fmt: skip
        model = base.BaseModel(config, base.ModelType.EPS if self.unet_config else base.ModelType.FLUX)
        model.diffusion_model = net
        return patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def _unet() -> Any:
    module = importlib.import_module("comfy.ldm.modules.diffusionmodules.openaimodel")
    return module.UNetModel(
        image_size=32, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[1, 1, 1], channel_mult=(1, 2, 2),
        transformer_depth=[1, 1, 1], transformer_depth_middle=1, transformer_depth_output=[1] * 6, context_dim=TEXT, num_head_channels=16,
        use_spatial_transformer=True, use_linear_in_transformer=True, legacy=False, dtype=torch.float32, device="cpu",
        operations=importlib.import_module("comfy.ops").disable_weight_init,
    )  # fmt: skip


def _flux() -> Any:
    module = importlib.import_module("comfy.ldm.flux.model")
    return module.Flux(
        in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=TEXT, hidden_size=48, mlp_ratio=2.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=[8, 8, 8], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False, dtype=torch.float32,
        device="cpu", operations=importlib.import_module("comfy.ops").disable_weight_init,
    )  # fmt: skip


_SINGLE = {"dtype": torch.float32}
CHECKOUT: dict[str, Specimen] = {
    "SDXL of the checkout": CheckoutSpecimen(_unet, 1, levels, 10, unet_config={"context_dim": 2048}, **_SINGLE),
    "FLUX of the checkout": replace(CheckoutSpecimen(_flux, 2, prefix(), 2, **_SINGLE), extra={"y": torch.zeros(2, 8)}),
}
