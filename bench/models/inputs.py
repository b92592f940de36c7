"""What pipelines give to the denoisers of diffusers, small and random: how each argument of every kind of forward pass is made.

A text is the shape of a unit normal tensor, a pair a shape and the one value in it, a function makes the argument, and anything else is it.
In shapes B is the batch, Y and X the token grid with a factor before, and YX its product: `"B 4 2Y 2X"`.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]


class Draw:
    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


Arguments = dict[str, Any]


def ids(grid: Grid, *, axes: int = 3) -> Tensor:
    """Position ids `[Y * X, axes]` of one picture, as the FLUX pipelines make them."""
    table = torch.zeros(*grid, axes)
    table[..., 1] += torch.arange(grid[0])[:, None]
    table[..., 2] += torch.arange(grid[1])[None, :]
    return table.flatten(0, 1)


def made(arguments: Arguments, draw: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    """The arguments of a forward pass for a token grid and a batch."""
    sizes = {"B": batch, "Y": grid[0], "X": grid[1], "YX": prod(grid), "": 1}

    def shape(text: str) -> list[int]:
        return [int(factor or 1) * sizes[letters] for factor, letters in re.findall(r"(\d+|(?=[A-Z]))([A-Z]*)", text)]

    def one(how: Any) -> Any:
        if isinstance(how, str):
            return draw(*shape(how))
        if isinstance(how, tuple):
            return torch.full(shape(how[0]), how[1])
        return how(draw, grid, batch) if callable(how) else how

    return {name: one(how) for name, how in arguments.items()}


def _prompts(draw: Draw, grid: Grid, batch: int, shorter: int = 1) -> Tensor:
    """A mask `[B, 6]` over prompts, each `shorter` by so many tokens than the one before."""
    return torch.arange(6)[None, :] < 6 - shorter * torch.arange(batch)[:, None]


def _rotary(draw: Draw, grid: Grid, batch: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return get_2d_rotary_pos_embed(16, ((0, 0), grid), grid, output_type="pt")  # type: ignore[no-any-return]


def _lumina_rotary(draw: Draw, grid: Grid, batch: int) -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(16, 64, 64, linear_factor=1.0, ntk_factor=1.0)  # type: ignore[no-any-return]


def _ids(axes: int) -> Arguments:
    return {"img_ids": lambda draw, grid, batch: ids(grid, axes=axes), "txt_ids": (f"6 {axes}", 0.0)}


TEXT: Arguments = {"encoder_hidden_states": "B 6 32"}
MASK: Arguments = {"encoder_attention_mask": _prompts}
POOLED: Arguments = {"pooled_projections": "B 32"}
TOKENS_CONTROL: Arguments = {"controlnet_cond": "B YX 16"}
LATENTS_CONTROL: Arguments = {"controlnet_cond": "B 4 2Y 2X"}
_SIZES: Arguments = {"target_size": ("B 2", 256.0), "crop_coords": ("B 2", 0.0)}

# Packed tokens.
FLUX: Arguments = {"hidden_states": "B YX 16", **TEXT, "timestep": ("B", 0.5), **_ids(3)}
FLUX1: Arguments = FLUX | POOLED
FLUX2: Arguments = {**FLUX, **_ids(4)}
FIBO: Arguments = {**FLUX, "text_encoder_layers": lambda draw, grid, batch: [draw(batch, 6, 16) for _ in range(3)]}
QWEN: Arguments = {
    "hidden_states": "B YX 16", **TEXT,
    "encoder_hidden_states_mask": lambda draw, grid, batch: _prompts(draw, grid, batch) if batch > 1 else None,
    "timestep": ("B", 0.5), "img_shapes": lambda draw, grid, batch: [[(1, *grid)]] * batch,
}  # fmt: skip
NUCLEUS: Arguments = {**QWEN, "encoder_hidden_states_mask": _prompts}
KREA: Arguments = {
    "hidden_states": "B YX 16", "encoder_hidden_states": "B 6 3 32", "timestep": ("B", 0.5),
    "position_ids": lambda draw, grid, batch: torch.cat([torch.zeros(6, 3), ids(grid)]), **MASK,
}  # fmt: skip

# Latents in patches of 2 x 2, or of 1 x 1.
LATENTS: Arguments = {"hidden_states": "B 4 2Y 2X", **TEXT, "timestep": ("B", 500)}
SD3: Arguments = LATENTS | POOLED
COGVIEW: Arguments = {**LATENTS, "original_size": ("B 2", 256.0), **_SIZES}
PIXART: Arguments = {
    **LATENTS, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": ("B 6", 1.0),
}  # fmt: skip
HUNYUAN: Arguments = {
    **LATENTS, "timestep": ("B", 500.0), "text_embedding_mask": ("B 6", 1.0), "encoder_hidden_states_t5": "B 5 32",
    "text_embedding_mask_t5": ("B 5", 1.0), "image_meta_size": ("B 6", 256.0), "style": ("B", 0), "image_rotary_emb": _rotary,
}  # fmt: skip
LUMINA_NEXT: Arguments = {**LATENTS, "encoder_mask": ("B 6", 1.0), "image_rotary_emb": _lumina_rotary, "cross_attention_kwargs": {}}
LUMINA2: Arguments = {**LATENTS, "encoder_attention_mask": lambda draw, grid, batch: _prompts(draw, grid, batch, 2).long()}
HIDREAM: Arguments = {
    "hidden_states": "B 4 2Y 2X", "timesteps": ("B", 500), "encoder_hidden_states_t5": "B 4 32",
    "encoder_hidden_states_llama3": "3 B 3 32", "pooled_embeds": "B 32",
}  # fmt: skip
Z_IMAGE: Arguments = {
    "x": lambda draw, grid, batch: [draw(4, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)], "t": ("B", 0.5),
    "cap_feats": lambda draw, grid, batch: [draw(7 + 64 * sample, 32) for sample in range(batch)],
}  # fmt: skip
DIT: Arguments = {
    "hidden_states": "B 4 2Y 2X", "timestep": ("B", 500), "class_labels": lambda draw, grid, batch: torch.arange(batch),
    "cross_attention_kwargs": {},
}  # fmt: skip
GLM: Arguments = {**LATENTS, "prior_token_id": ("B YX", 0), "prior_token_drop": ("B YX", False), **_SIZES}
PRX: Arguments = {**LATENTS, "attention_mask": _prompts}
ERNIE: Arguments = {
    "hidden_states": "B 4 Y X", "timestep": ("B", 500.0), "text_bth": "B 6 24",
    "text_lens": lambda draw, grid, batch: _prompts(draw, grid, batch).sum(1),
}  # fmt: skip
HUNYUAN_IMAGE: Arguments = {
    "hidden_states": "B 4 Y X", "timestep": ("B", 500.0), **TEXT, **MASK,
    "encoder_hidden_states_2": "B 3 16", "encoder_attention_mask_2": ("B 3", True),
}  # fmt: skip

# U-Nets.
UNCONDITIONAL: Arguments = {"sample": "B 4 Y X", "timestep": 500}
UNET: Arguments = {**UNCONDITIONAL, **TEXT}
SDXL: Arguments = {
    **UNET, "added_cond_kwargs": lambda draw, grid, batch: {"text_embeds": draw(batch, 32), "time_ids": torch.full((batch, 6), 64.0)},
}  # fmt: skip
UNET_CONTROL: Arguments = {**UNET, "controlnet_cond": "B 3 8Y 8X"}
UNION: Arguments = {
    **UNET, "controlnet_cond": lambda draw, grid, batch: [draw(batch, 3, 8 * grid[0], 8 * grid[1])],
    "control_type": lambda draw, grid, batch: torch.tensor([[0, 1, 0, 0, 0, 0]] * batch), "control_type_idx": [1],
    "added_cond_kwargs": SDXL["added_cond_kwargs"],
}  # fmt: skip
