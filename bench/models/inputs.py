"""What the denoisers of diffusers are given by their pipelines, small and random: one function for every kind of forward pass.

Legend: B batch, Y x X token grid, T text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def ids(grid: tuple[int, int], *, axes: int = 3) -> Tensor:
    """Position ids `[Y * X, axes]` of one picture, as the FLUX pipelines make them."""
    table = torch.zeros(*grid, axes)
    table[..., 1] += torch.arange(grid[0])[:, None]
    table[..., 2] += torch.arange(grid[1])[None, :]
    return table.flatten(0, 1)


def flux(draw: Draw, grid: tuple[int, int], batch: int, *, text: int = 6, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16), "encoder_hidden_states": draw(batch, text, 32),
        "timestep": torch.full((batch,), 0.5), "img_ids": ids(grid, axes=axes), "txt_ids": torch.zeros(text, axes),
    }  # fmt: skip


def flux1(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return flux(draw, grid, batch) | {"pooled_projections": draw(batch, 32)}


def flux_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return flux1(draw, grid, batch) | {"controlnet_cond": draw(batch, grid[0] * grid[1], 16)}


def fibo(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return flux(draw, grid, batch) | {"text_encoder_layers": [draw(batch, 6, 16) for _ in range(3)]}


def latents(draw: Draw, grid: tuple[int, int], batch: int, *, channels: int = 4, text: int = 6) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, channels, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": draw(batch, text, 32),
        "timestep": torch.full((batch,), 500),
    }


def sd3(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return latents(draw, grid, batch) | {"pooled_projections": draw(batch, 32)}


def sd3_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return sd3(draw, grid, batch) | {"controlnet_cond": draw(batch, 4, 2 * grid[0], 2 * grid[1])}


def cogview(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    size = torch.tensor([[256.0, 256.0]] * batch)
    return latents(draw, grid, batch) | {"original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}


def pixart(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    added = {"resolution": None, "aspect_ratio": None}
    return latents(draw, grid, batch) | {"added_cond_kwargs": added, "encoder_attention_mask": torch.ones(batch, 6)}


def _rotary(grid: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return get_2d_rotary_pos_embed(dim, ((0, 0), grid), grid, output_type="pt")  # type: ignore[no-any-return]


def hunyuan(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return latents(draw, grid, batch) | {
        "timestep": torch.full((batch,), 500.0), "text_embedding_mask": torch.ones(batch, 6),
        "encoder_hidden_states_t5": draw(batch, 5, 32),
        "text_embedding_mask_t5": torch.ones(batch, 5), "image_meta_size": torch.full((batch, 6), 256.0),
        "style": torch.zeros(batch, dtype=torch.long), "image_rotary_emb": _rotary(grid, 16),
    }  # fmt: skip


def hunyuan_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return hunyuan(draw, grid, batch) | {"controlnet_cond": draw(batch, 4, 2 * grid[0], 2 * grid[1])}


def lumina_next(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(16, 64, 64, linear_factor=1.0, ntk_factor=1.0)
    return latents(draw, grid, batch) | {
        "encoder_mask": torch.ones(batch, 6), "image_rotary_emb": rotary, "cross_attention_kwargs": {},
    }  # fmt: skip


def lumina2(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, 6, dtype=torch.long)
    for sample in range(batch):
        mask[sample, : 6 - 2 * sample] = 1  # prompts of different length
    return latents(draw, grid, batch) | {"encoder_attention_mask": mask}


def qwen(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, 6, dtype=torch.bool)
    for sample in range(batch):
        mask[sample, : 6 - sample] = True
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16), "encoder_hidden_states": draw(batch, 6, 32),
        "encoder_hidden_states_mask": mask if batch > 1 else None, "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, *grid)]] * batch,
    }  # fmt: skip


def nucleus(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return qwen(draw, grid, batch) | {"encoder_hidden_states_mask": _falling(batch)}


def qwen_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return qwen(draw, grid, batch) | {"controlnet_cond": draw(batch, grid[0] * grid[1], 16)}


def hidream(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, 2 * grid[0], 2 * grid[1]), "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": draw(batch, 4, 32), "encoder_hidden_states_llama3": draw(3, batch, 3, 32),
        "pooled_embeds": draw(batch, 32),
    }  # fmt: skip


def z_image(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "x": [draw(4, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [draw(7 + 64 * sample, 32) for sample in range(batch)],
    }


def unet(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {"sample": draw(batch, 4, *grid), "timestep": 500, "encoder_hidden_states": draw(batch, 6, 32)}


def unconditional(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {"sample": draw(batch, 4, *grid), "timestep": 500}


def sdxl(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    added = {"text_embeds": draw(batch, 32), "time_ids": torch.full((batch, 6), 64.0)}
    return unet(draw, grid, batch) | {"added_cond_kwargs": added}


def unet_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return unet(draw, grid, batch) | {"controlnet_cond": draw(batch, 3, 8 * grid[0], 8 * grid[1])}


def union(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    picture = draw(batch, 3, 8 * grid[0], 8 * grid[1])
    kinds = torch.tensor([[0, 1, 0, 0, 0, 0]] * batch)
    added = {"text_embeds": draw(batch, 32), "time_ids": torch.full((batch, 6), 64.0)}
    control = {"controlnet_cond": [picture], "control_type": kinds, "control_type_idx": [1], "added_cond_kwargs": added}
    return unet(draw, grid, batch) | control


def dit(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    latents = {"hidden_states": draw(batch, 4, 2 * grid[0], 2 * grid[1]), "timestep": torch.full((batch,), 500)}
    return latents | {"class_labels": torch.arange(batch), "cross_attention_kwargs": {}}


def glm(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    size, tokens = torch.tensor([[256.0, 256.0]] * batch), grid[0] * grid[1]
    prior = {
        "prior_token_id": torch.zeros(batch, tokens, dtype=torch.long),
        "prior_token_drop": torch.zeros(batch, tokens, dtype=torch.bool),
    }
    return latents(draw, grid, batch) | prior | {"target_size": size, "crop_coords": torch.zeros(batch, 2)}


def _falling(batch: int, text: int = 6) -> Tensor:
    """A mask `[B, T]` over prompts, each one token shorter than the one before."""
    return torch.arange(text)[None, :] < text - torch.arange(batch)[:, None]


def prx(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return latents(draw, grid, batch) | {"attention_mask": _falling(batch)}


def ernie(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    latents = {"hidden_states": draw(batch, 4, *grid), "timestep": torch.full((batch,), 500.0)}
    return latents | {"text_bth": draw(batch, 6, 24), "text_lens": _falling(batch).sum(1)}


def hunyuan_image(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, *grid), "timestep": torch.full((batch,), 500.0), "encoder_hidden_states": draw(batch, 6, 32),
        "encoder_attention_mask": _falling(batch), "encoder_hidden_states_2": draw(batch, 3, 16),
        "encoder_attention_mask_2": torch.ones(batch, 3, dtype=torch.bool),
    }  # fmt: skip


def krea(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16), "encoder_hidden_states": draw(batch, 6, 3, 32),
        "timestep": torch.full((batch,), 0.5), "position_ids": torch.cat([torch.zeros(6, 3), ids(grid)]),
        "encoder_attention_mask": _falling(batch),
    }  # fmt: skip
