"""The models whose work `bench.flops` counts, at their true size on the meta device: those of `scalediff plan`, and two more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from scalediff.cost.flops import MODELS as PLANNED
from scalediff.cost.flops import Model

_TABLE = 512  # positions along an axis, for 8192 pixels; the published tables are shorter, and looking up costs nothing that is counted


def _sd3() -> nn.Module:
    """The transformer of stabilityai/stable-diffusion-3.5-large; its own table of positions has 192 along an axis: 3072 pixels."""
    import diffusers

    transformer: nn.Module = diffusers.SD3Transformer2DModel(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=_TABLE, qk_norm="rms_norm",
    )  # fmt: skip
    return transformer


def _sd3_inputs(y: int, x: int) -> dict[str, Any]:
    """77 tokens of CLIP and 256 of T5, as the pipeline has them."""
    return {
        "hidden_states": torch.empty(1, 16, y, x), "encoder_hidden_states": torch.empty(1, 77 + 256, 4096),
        "pooled_projections": torch.empty(1, 2048), "timestep": torch.empty(1),
    }  # fmt: skip


def _lumina() -> nn.Module:
    """The transformer of Alpha-VLLM/Lumina-Next-SFT-diffusers; its pipeline rotates 384 positions along an axis: 6144 pixels."""
    import diffusers

    transformer: nn.Module = diffusers.LuminaNextDiT2DModel(num_layers=24, num_kv_heads=8)
    return transformer


def _lumina_inputs(y: int, x: int) -> dict[str, Any]:
    """256 tokens of Gemma, padding included, as the pipeline has them."""
    return {
        "hidden_states": torch.empty(1, 4, y, x), "encoder_hidden_states": torch.empty(1, 256, 2048), "timestep": torch.empty(1),
        "encoder_mask": torch.ones(1, 256), "image_rotary_emb": torch.empty(_TABLE, _TABLE, 36, dtype=torch.complex64),
        "cross_attention_kwargs": {},
    }  # fmt: skip


MODELS: Mapping[str, Model] = {
    **PLANNED,
    "sd3.5-large": Model(_sd3, _sd3_inputs, channels=16, tokens=16, guided=True),
    "lumina-next": Model(_lumina, _lumina_inputs, channels=4, tokens=16, guided=True),
}
TITLES = {"sdxl": "SDXL base 1.0", "flux": "FLUX.1-dev", "sd3.5-large": "Stable Diffusion 3.5 Large", "lumina-next": "Lumina-Next"}
