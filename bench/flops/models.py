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
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
    return SD3Transformer2DModel(**sizes, pos_embed_max_size=_TABLE, qk_norm="rms_norm")  # type: ignore[no-any-return]


def _sd3_inputs(y: int, x: int) -> dict[str, Any]:
    """77 tokens of CLIP and 256 of T5, as the pipeline has them."""
    shapes = {
        "hidden_states": (1, 16, y, x),
        "encoder_hidden_states": (1, 77 + 256, 4096),
        "pooled_projections": (1, 2048),
        "timestep": (1,),
    }
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def _lumina() -> nn.Module:
    """The transformer of Alpha-VLLM/Lumina-Next-SFT-diffusers; its pipeline rotates 384 positions along an axis: 6144 pixels."""
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(num_layers=24, num_kv_heads=8)  # type: ignore[no-any-return]


def _lumina_inputs(y: int, x: int) -> dict[str, Any]:
    """256 tokens of Gemma, padding included, as the pipeline has them."""
    shapes = {"hidden_states": (1, 4, y, x), "encoder_hidden_states": (1, 256, 2048), "timestep": (1,), "encoder_mask": (1, 256)}
    rotary = torch.empty(_TABLE, _TABLE, 36, dtype=torch.complex64)
    inputs = {name: torch.empty(shape) for name, shape in shapes.items()}
    return {**inputs, "image_rotary_emb": rotary, "cross_attention_kwargs": {}}


MODELS: Mapping[str, Model] = {
    **PLANNED,
    "sd3.5-large": Model(_sd3, _sd3_inputs, channels=16, tokens=16, guided=True),
    "lumina-next": Model(_lumina, _lumina_inputs, channels=4, tokens=16, guided=True),
}
TITLES = {"sdxl": "SDXL base 1.0", "flux": "FLUX.1-dev", "sd3.5-large": "Stable Diffusion 3.5 Large", "lumina-next": "Lumina-Next"}
