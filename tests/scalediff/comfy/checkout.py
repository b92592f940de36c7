"""A checkout of ComfyUI, whose path is in COMFYUI_PATH, in place of the stand-in: its own networks, small and with random weights.

Written from ComfyUI's interfaces, with the members of `host.StandIn`.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.scalediff.comfy.specimens import TEXT, TOKENS, Specimen, levels, prefix


def load() -> None:
    """Make `import comfy` find the checkout, on the CPU."""
    path = os.environ["COMFYUI_PATH"]
    if path not in sys.path:
        sys.path.append(path)
    importlib.import_module("comfy.cli_args").args.cpu = True  # read when comfy.model_management is first imported
    importlib.import_module("comfy.sd")


class Checkout:
    """ComfyUI itself.

    Attributes:
        updates: As in `StandIn`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load()
        options, utils = importlib.import_module("comfy.cli_args"), importlib.import_module("comfy.utils")
        self.updates: list[tuple[int, int, Any]] = []
        monkeypatch.setattr(options.args, "preview_method", options.LatentPreviewMethod.Latent2RGB)
        monkeypatch.setattr(utils, "PROGRESS_BAR_ENABLED", False)
        monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", self._update)

    def _update(self, value: int, total: int, preview: Any, node_id: Any = None) -> None:
        """Contract (comfy/utils.py): progress bars call it; older versions without `node_id`."""
        self.updates.append((value, total, preview))

    def specimen(self, name: str) -> Specimen:
        """As in `StandIn`; the test is skipped if there is no such network."""
        if name not in CHECKOUT:
            pytest.skip(f"no small {name} network is built from a checkout: only {', '.join(CHECKOUT)}")
        return CHECKOUT[name]

    def vae(self, *, frames: bool = False) -> Any:
        """As in `StandIn`: ComfyUI's `VAE` around its smallest autoencoder."""
        if frames:
            pytest.skip("no small autoencoder for videos is built from a checkout")
        net = importlib.import_module("comfy.taesd.taesd").TAESD(latent_channels=4)
        randomize(net, seed=7)
        vae = importlib.import_module("comfy.sd").VAE(sd=net.state_dict(), device=torch.device("cpu"), dtype=torch.float32)
        vae.calls = []
        vae.decode, vae.encode = (_recorded(vae.calls, name, getattr(vae, name)) for name in ("decode", "encode"))
        return vae

    def cast_weights(self, layer: nn.Linear) -> None:
        """As in `StandIn`. Contract (comfy/ops.py): every layer can, and does if this attribute is true."""
        layer.comfy_cast_weights = True  # type: ignore[assignment]

    def needs_stand_in(self, why: str) -> None:
        """Skip the test."""
        pytest.skip(why)


def _recorded(calls: list[str], name: str, method: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        calls.append(name)
        return method(x)

    return call


def randomize(net: nn.Module, *, seed: int) -> None:
    """Fill a network's weights, which ComfyUI leaves uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 0:  # an autoencoder's scale and shift are set
            spread = max(1, parameter[0].numel()) ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


class CheckoutSpecimen(Specimen):
    """A specimen whose network and `ModelPatcher` are ComfyUI's; `build` is called after `load`."""

    def model(self, *, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
        """The model with random weights, always in fp32."""
        assert dtype in (None, torch.float32)
        base, patcher, formats = (importlib.import_module(f"comfy.{name}") for name in ("model_base", "model_patcher", "latent_formats"))
        net = self.build().float().eval()
        randomize(net, seed=seed)
        config = SimpleNamespace(
            unet_config={"disable_unet_model_creation": True, **self.unet_config}, latent_format=formats.SDXL(), manual_cast_dtype=None,
            custom_operations=None, optimizations={}, sampling_settings={}, memory_usage_factor=1.0,
        )  # fmt: skip
        model = base.BaseModel(config, base.ModelType.EPS if self.unet_config else base.ModelType.FLUX)
        model.diffusion_model = net
        return patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def _network(module: str, name: str, **options: Any) -> Callable[[], Any]:
    """Function that makes one of ComfyUI's networks, on the CPU in fp32."""

    def build() -> Any:
        operations = importlib.import_module("comfy.ops").disable_weight_init
        cls = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
        return cls(**copy.deepcopy(options), dtype=torch.float32, device="cpu", operations=operations)

    return build


_UNET = _network(
    "modules.diffusionmodules.openaimodel", "UNetModel", image_size=32, in_channels=4, model_channels=32, out_channels=4,
    num_res_blocks=[1, 1, 1], channel_mult=(1, 2, 2), transformer_depth=[1, 1, 1], transformer_depth_middle=1,
    transformer_depth_output=[1] * 6, context_dim=TEXT, num_head_channels=16, use_spatial_transformer=True,
    use_linear_in_transformer=True, legacy=False,
)  # fmt: skip
_BLOCKS = (("input", 1), ("input", 3), ("input", 5), ("middle", 0), *(("output", number) for number in range(6)))
_STREAMS: dict[str, Any] = {
    "context_in_dim": TEXT, "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [8, 8, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True,
}  # fmt: skip
_FLUX = _network("flux.model", "Flux", in_channels=4, out_channels=4, vec_in_dim=8, guidance_embed=True, **_STREAMS)
_CHROMA = _network(  # channels are those of a token; the hidden widths are those of the network that makes all modulations
    "chroma.model", "Chroma", in_channels=16, out_channels=16, in_dim=64, out_dim=48, hidden_dim=32, n_layers=1, **_STREAMS
)  # fmt: skip
_LUMINA: dict[str, Any] = {
    "patch_size": 2, "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True,
    "cap_feat_dim": TEXT, "axes_dims": [8, 8, 8], "axes_lens": [64, 64, 64],
}  # fmt: skip
_Z_IMAGE = {"rope_theta": 256.0, "z_image_modulation": True, "pad_tokens_multiple": 32}
_QWEN = _network(
    "qwen_image.model", "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=24,
    num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=(8, 8, 8),
)  # fmt: skip
_SINGLE: dict[str, Any] = {"dtype": torch.float32}
_TEXT = {"num_tokens": TOKENS}
CHECKOUT: dict[str, Specimen] = {
    "SDXL": CheckoutSpecimen(_UNET, 1, levels, 10, _BLOCKS, (3, 3, 4), 64, unet_config={"context_dim": 2048}, **_SINGLE),
    "FLUX": CheckoutSpecimen(_FLUX, 2, prefix(), 2, extra={"y": torch.zeros(2, 8)}, **_SINGLE),
    "Chroma": CheckoutSpecimen(_CHROMA, 2, prefix(), 2, extra={"guidance": torch.zeros(2)}, **_SINGLE),
    "Lumina 2": CheckoutSpecimen(_network("lumina.model", "NextDiT", **_LUMINA), 2, prefix(alone=True), 3, extra=_TEXT, **_SINGLE),
    "Z-Image": CheckoutSpecimen(
        _network("lumina.model", "NextDiT", **_LUMINA, **_Z_IMAGE), 2, prefix(alone=True, multiple=32), 3, extra=_TEXT, **_SINGLE
    ),
    "Qwen-Image": CheckoutSpecimen(_QWEN, 2, prefix(), 2, frames=True, **_SINGLE),
}  # fmt: skip
