"""Small random models of the real diffusers classes, one of every family that `patch_model` knows, and the inputs they take.

Their native size is small too: `WINDOW` tokens a side.

Legend: B batch, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = (4, 4)
Inputs = Callable[["Draw", tuple[int, int], int], dict[str, Any]]


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


@dataclass(frozen=True)
class Specimen:
    """One small model.

    Attributes:
        kind: Its class in diffusers.
        config: Arguments of the class.
        inputs: Arguments of the forward pass for a token grid and a batch.
        text: Text tokens in the same softmax as the image.
    """

    kind: str
    config: dict[str, Any]
    inputs: Inputs
    text: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        import diffusers

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.kind)(**self.config).eval()
            draw = Draw(seed)
            with torch.no_grad():  # some layers start at zero, and nothing behind them would be seen
                for parameter in model.parameters():
                    parameter.add_(0.1 * draw(*parameter.shape))
        return model

    def run(self, model: nn.Module, grid: tuple[int, int], *, batch: int = 1, seed: int = 0, **changes: Any) -> Tensor:
        """The model's output; of a ControlNet all residuals in a row."""
        with torch.no_grad():
            return flat(model(**self.inputs(Draw(seed), grid, batch), **changes, return_dict=False))


def flat(output: Any) -> Tensor:
    """All tensors of a nested output as one vector."""
    if isinstance(output, Tensor):
        return output.flatten()
    return torch.cat([flat(part) for part in output if part is not None])


def ids(grid: tuple[int, int], *, axes: int = 3) -> Tensor:
    """Position ids `[Y * X, axes]` of one picture, as the FLUX pipelines make them."""
    table = torch.zeros(*grid, axes)
    table[..., 1] += torch.arange(grid[0])[:, None]
    table[..., 2] += torch.arange(grid[1])[None, :]
    return table.flatten(0, 1)


def _flux(draw: Draw, grid: tuple[int, int], batch: int, *, text: int = 6, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16), "encoder_hidden_states": draw(batch, text, 32),
        "timestep": torch.full((batch,), 0.5), "img_ids": ids(grid, axes=axes), "txt_ids": torch.zeros(text, axes),
    }  # fmt: skip


def _flux1(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _flux(draw, grid, batch) | {"pooled_projections": draw(batch, 32)}


def _flux_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _flux1(draw, grid, batch) | {"controlnet_cond": draw(batch, grid[0] * grid[1], 16)}


def _fibo(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _flux(draw, grid, batch) | {"text_encoder_layers": [draw(batch, 6, 16) for _ in range(3)]}


def _latents(draw: Draw, grid: tuple[int, int], batch: int, *, channels: int = 4, text: int = 6) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, channels, 2 * grid[0], 2 * grid[1]),
        "encoder_hidden_states": draw(batch, text, 32),
        "timestep": torch.full((batch,), 500),
    }


def _sd3(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _latents(draw, grid, batch) | {"pooled_projections": draw(batch, 32)}


def _sd3_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _sd3(draw, grid, batch) | {"controlnet_cond": draw(batch, 4, 2 * grid[0], 2 * grid[1])}


def _cogview(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    size = torch.tensor([[256.0, 256.0]] * batch)
    return _latents(draw, grid, batch) | {"original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}


def _pixart(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    added = {"resolution": None, "aspect_ratio": None}
    return _latents(draw, grid, batch) | {"added_cond_kwargs": added, "encoder_attention_mask": torch.ones(batch, 6)}


def _rotary(grid: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return get_2d_rotary_pos_embed(dim, ((0, 0), grid), grid, output_type="pt")  # type: ignore[no-any-return]


def _hunyuan(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _latents(draw, grid, batch) | {
        "timestep": torch.full((batch,), 500.0), "text_embedding_mask": torch.ones(batch, 6),
        "encoder_hidden_states_t5": draw(batch, 5, 32),
        "text_embedding_mask_t5": torch.ones(batch, 5), "image_meta_size": torch.full((batch, 6), 256.0),
        "style": torch.zeros(batch, dtype=torch.long), "image_rotary_emb": _rotary(grid, 16),
    }  # fmt: skip


def _hunyuan_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _hunyuan(draw, grid, batch) | {"controlnet_cond": draw(batch, 4, 2 * grid[0], 2 * grid[1])}


def _lumina_next(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(16, 64, 64, linear_factor=1.0, ntk_factor=1.0)
    return _latents(draw, grid, batch) | {
        "encoder_mask": torch.ones(batch, 6), "image_rotary_emb": rotary, "cross_attention_kwargs": {},
    }  # fmt: skip


def _lumina2(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, 6, dtype=torch.long)
    for sample in range(batch):
        mask[sample, : 6 - 2 * sample] = 1  # prompts of different length
    return _latents(draw, grid, batch) | {"encoder_attention_mask": mask}


def _qwen(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    mask = torch.zeros(batch, 6, dtype=torch.bool)
    for sample in range(batch):
        mask[sample, : 6 - sample] = True
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16), "encoder_hidden_states": draw(batch, 6, 32),
        "encoder_hidden_states_mask": mask if batch > 1 else None, "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, *grid)]] * batch,
    }  # fmt: skip


def _qwen_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _qwen(draw, grid, batch) | {"controlnet_cond": draw(batch, grid[0] * grid[1], 16)}


def _hidream(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, 2 * grid[0], 2 * grid[1]), "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": draw(batch, 4, 32), "encoder_hidden_states_llama3": draw(3, batch, 3, 32),
        "pooled_embeds": draw(batch, 32),
    }  # fmt: skip


def _z_image(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "x": [draw(4, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [draw(7 + 64 * sample, 32) for sample in range(batch)],
    }


def _unet(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {"sample": draw(batch, 4, *grid), "timestep": 500, "encoder_hidden_states": draw(batch, 6, 32)}


def _sdxl(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    added = {"text_embeds": draw(batch, 32), "time_ids": torch.full((batch, 6), 64.0)}
    return _unet(draw, grid, batch) | {"added_cond_kwargs": added}


def _unet_control(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _unet(draw, grid, batch) | {"controlnet_cond": draw(batch, 3, 8 * grid[0], 8 * grid[1])}


def _union(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    picture = draw(batch, 3, 8 * grid[0], 8 * grid[1])
    kinds = torch.tensor([[0, 1, 0, 0, 0, 0]] * batch)
    added = {"text_embeds": draw(batch, 32), "time_ids": torch.full((batch, 6), 64.0)}
    control = {"controlnet_cond": [picture], "control_type": kinds, "control_type_idx": [1], "added_cond_kwargs": added}
    return _unet(draw, grid, batch) | control


def _dit(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    latents = {"hidden_states": draw(batch, 4, 2 * grid[0], 2 * grid[1]), "timestep": torch.full((batch,), 500)}
    return latents | {"class_labels": torch.arange(batch), "cross_attention_kwargs": {}}


def _glm(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    size, tokens = torch.tensor([[256.0, 256.0]] * batch), grid[0] * grid[1]
    prior = {
        "prior_token_id": torch.zeros(batch, tokens, dtype=torch.long),
        "prior_token_drop": torch.zeros(batch, tokens, dtype=torch.bool),
    }
    return _latents(draw, grid, batch) | prior | {"target_size": size, "crop_coords": torch.zeros(batch, 2)}


def _falling(batch: int, text: int = 6) -> Tensor:
    """A mask `[B, T]` over prompts, each one token shorter than the one before."""
    return torch.arange(text)[None, :] < text - torch.arange(batch)[:, None]


def _prx(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return _latents(draw, grid, batch) | {"attention_mask": _falling(batch)}


def _ernie(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    latents = {"hidden_states": draw(batch, 4, *grid), "timestep": torch.full((batch,), 500.0)}
    return latents | {"text_bth": draw(batch, 6, 24), "text_lens": _falling(batch).sum(1)}


def _hunyuan_image(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, 4, *grid), "timestep": torch.full((batch,), 500.0), "encoder_hidden_states": draw(batch, 6, 32),
        "encoder_attention_mask": _falling(batch), "encoder_hidden_states_2": draw(batch, 3, 16),
        "encoder_attention_mask_2": torch.ones(batch, 3, dtype=torch.bool),
    }  # fmt: skip


def _krea(draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16), "encoder_hidden_states": draw(batch, 6, 3, 32),
        "timestep": torch.full((batch,), 0.5), "position_ids": torch.cat([torch.zeros(6, 3), ids(grid)]),
        "encoder_attention_mask": _falling(batch),
    }  # fmt: skip


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_BLOCKS = {"num_layers": 1, "num_single_layers": 2}
_FLUX = {"in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), **_HEADS, **_BLOCKS}
_POOLED = {"pooled_projection_dim": 32}
_UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip
_UNET_UP = {"sample_size": 4, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
_SDXL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 32, "caption_projection_dim": 32,
    "pooled_projection_dim": 32, "pos_embed_max_size": 32, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **_HEADS,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "cross_attention_dim": 32, "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 32, "text_len": 6, "text_len_t5": 5, **_HEADS,
}  # fmt: skip
_COGVIEW = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8,
    "pos_embed_max_size": 32, "sample_size": 8, **_HEADS,
}  # fmt: skip
_QWEN = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), **_HEADS}

ZOO: dict[str, Specimen] = {
    "SD1.5": Specimen("UNet2DConditionModel", _UNET | _UNET_UP, _unet),
    "SDXL": Specimen("UNet2DConditionModel", _UNET | _UNET_UP | _SDXL, _sdxl),
    "ControlNet": Specimen("ControlNetModel", _UNET | {"conditioning_embedding_out_channels": (8, 8, 8, 8)}, _unet_control),
    "ControlNet Union": Specimen(
        "ControlNetUnionModel",
        _UNET | _SDXL | {"conditioning_embedding_out_channels": (8, 8, 8, 8), "num_trans_channel": 32, "num_proj_channel": 32,
                         "num_trans_head": 2, "projection_class_embeddings_input_dim": 80},
        _union,
    ),
    "SD3": Specimen("SD3Transformer2DModel", _SD3, _sd3, text=6),
    "SD3 ControlNet": Specimen("SD3ControlNetModel", _SD3, _sd3_control, text=6),
    "FLUX.1": Specimen("FluxTransformer2DModel", _FLUX | _POOLED, _flux1, text=6),
    "FLUX.1 ControlNet": Specimen("FluxControlNetModel", _FLUX | _POOLED, _flux_control, text=6),
    "FLUX.2": Specimen(
        "Flux2Transformer2DModel", _FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, "guidance_embeds": False},
        lambda draw, grid, batch: _flux(draw, grid, batch, axes=4), text=6,
    ),
    "Chroma": Specimen(
        "ChromaTransformer2DModel", _FLUX | {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1},
        _flux, text=6,
    ),
    "Bria 3": Specimen("BriaTransformer2DModel", _FLUX, _flux, text=6),
    "Bria FIBO": Specimen("BriaFiboTransformer2DModel", _FLUX | {"text_encoder_dim": 16}, _fibo, text=6),
    "LongCat-Image": Specimen("LongCatImageTransformer2DModel", _FLUX | _POOLED, _flux, text=6),
    "Ovis-Image": Specimen("OvisImageTransformer2DModel", _FLUX | {"out_channels": 16}, _flux, text=6),
    "Lumina-Next": Specimen(
        "LuminaNextDiT2DModel",
        {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2, "cross_attention_dim": 32},
        _lumina_next,
    ),
    "Lumina 2": Specimen(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4,
         "num_kv_heads": 2, "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 64, 64), "cap_feat_dim": 32},
        _lumina2, text=6,
    ),
    "PixArt": Specimen(
        "PixArtTransformer2DModel",
        {"in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": 32,
         **_HEADS},
        _pixart,
    ),
    "AuraFlow": Specimen(
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "joint_attention_dim": 32,
         "caption_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 1024, **_HEADS},
        _latents, text=14,
    ),
    "HunyuanDiT": Specimen("HunyuanDiT2DModel", _HUNYUAN | {"num_layers": 2}, _hunyuan),
    "HunyuanDiT ControlNet": Specimen("HunyuanDiT2DControlNetModel", _HUNYUAN | {"transformer_num_layers": 4}, _hunyuan_control),
    "CogView3-Plus": Specimen("CogView3PlusTransformer2DModel", _COGVIEW, _cogview, text=6),
    "CogView4": Specimen("CogView4Transformer2DModel", _COGVIEW | {"rope_axes_dim": (16, 16)}, _cogview, text=6),
    "DiT": Specimen(
        "DiTTransformer2DModel", {"in_channels": 4, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10, **_HEADS}, _dit,
    ),
    "GLM-Image": Specimen(
        "GlmImageTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8,
         "prior_vq_quantizer_codebook_size": 8, **_HEADS},
        _glm, text=6,
    ),
    "PRX": Specimen(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}, _prx, text=6,
    ),
    "ERNIE-Image": Specimen(
        "ErnieImageTransformer2DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48, "in_channels": 4, "out_channels": 4,
         "text_in_dim": 24, "rope_axes_dim": (4, 6, 6)},
        _ernie, text=6,
    ),
    "HunyuanImage 2.1": Specimen(
        "HunyuanImageTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 16,
         "rope_axes_dim": (8, 8), **_HEADS, **_BLOCKS},
        _hunyuan_image, text=9,
    ),
    "Krea 2": Specimen(
        "Krea2Transformer2DModel",
        {"in_channels": 16, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 16,
         "text_hidden_dim": 32, "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 48, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6), **_HEADS},
        _krea, text=6,
    ),
    "Qwen-Image": Specimen("QwenImageTransformer2DModel", _QWEN, _qwen, text=6),
    "Qwen-Image ControlNet": Specimen("QwenImageControlNetModel", _QWEN, _qwen_control, text=6),
    "HiDream-I1": Specimen(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_channels": [32, 32], "text_emb_dim": 32,
         "axes_dims_rope": (8, 4, 4),
         "max_resolution": (32, 32), "llama_layers": [0, 1, 2], "force_inference_output": True, **_HEADS, **_BLOCKS},
        _hidream, text=10,
    ),
    "Z-Image": Specimen(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
         "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
        _z_image, text=32,
    ),
}  # fmt: skip
