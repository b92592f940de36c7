"""HiDream-I1: text after the image, with a different text but the same length in every block; non-square pictures are padded."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from scalediff.families.base import Arguments, Cascade, Family, Reader
from scalediff.families.grid import Grid, Layout, Sequence, UnknownLayout
from scalediff.families.rotation import TextRotation
from scalediff.settings import derived_presets


def _layout(denoiser: Any, arguments: Arguments, read: Reader) -> Layout:
    hidden = arguments["hidden_states"]
    if hidden.ndim != 4:
        raise UnknownLayout(f"hidden_states must be latents [B, C, H, W], got {tuple(hidden.shape)}")
    size = denoiser.config.patch_size
    grid = hidden.shape[-2] // size, hidden.shape[-1] // size
    padding = 0 if hidden.shape[-2] == hidden.shape[-1] else denoiser.max_seq - grid[0] * grid[1]
    if padding < 0:
        raise UnknownLayout(f"a picture that is not square must have at most {denoiser.max_seq} tokens, got {grid[0]} x {grid[1]}")
    # the T5 text, the last Llama layer, and the Llama layer of the block
    text = arguments["encoder_hidden_states_t5"].shape[1] + 2 * arguments["encoder_hidden_states_llama3"].shape[2]
    return Layout(grid, (Sequence(grid, side="suffix", text=int(padding + text)),))


def _native(denoiser: nn.Module) -> Grid:
    return 64, 64  # 1024 pixels; the config only has the longest sequence


def _rotation(denoiser: Any) -> TextRotation:
    return TextRotation(tuple(denoiser.config.axes_dims_rope), 10000.0, dim=denoiser.config.attention_head_dim)


def _attributes(pipe: Any, height: int, width: int) -> dict[str, Any]:
    """The pipeline scales every size to the area of its default one, and the denoiser pads a picture that is not square to `max_seq`."""
    pixels = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    side = math.sqrt(height * width) * (1 + 1e-9)  # the pipeline rounds down
    tokens = height * width // pixels**2
    return {"default_sample_size": side / pipe.vae_scale_factor, "transformer.max_seq": max(pipe.transformer.max_seq, tokens)}


_PRESETS = derived_presets(steps=50, guidance_scale=5.0)


HIDREAM = (
    Family(
        denoiser="HiDreamImageTransformer2DModel",
        grid_source="hidden_states.shape[-2:] // patch_size",
        text="joint, after the image and its padding",
        native_grid=_native,
        layout=_layout,
        role="joint",
        rotation=_rotation,
        cascade=Cascade(
            lambda denoiser: _PRESETS, conditional="last", batch_second=("encoder_hidden_states_llama3",), attributes=_attributes
        ),
    ),
)
