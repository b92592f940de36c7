"""Small random models of the real diffusers classes, one of every family that `patch_model` knows, and the inputs they take.

Their native size is small too: `WINDOW` tokens a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import inputs
from bench.models.inputs import Arguments, Draw

WINDOW = (4, 4)
_UNINITIALISED = ("pad_token",)  # parameters whose values a class leaves as they were in memory: Lumina-Next


@dataclass(frozen=True)
class Specimen:
    kind: str  # its class in diffusers
    config: dict[str, Any]  # arguments of the class
    arguments: Arguments  # how each argument of the forward pass is made
    text: int = 0  # tokens in the same softmax as the image

    def build(self, seed: int = 0) -> nn.Module:
        import diffusers

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.kind)(**self.config).eval()
            draw = Draw(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in _UNINITIALISED:
                        parameter.zero_()
                    parameter.add_(0.1 * draw(*parameter.shape))  # some layers start at zero, and nothing behind them would be seen
        return model

    def inputs(self, draw: Draw, grid: tuple[int, int], batch: int) -> dict[str, Any]:
        return inputs.made(self.arguments, draw, grid, batch)

    def run(self, model: nn.Module, grid: tuple[int, int], *, batch: int = 1, seed: int = 0, **changes: Any) -> Tensor:
        """The model's output; of a ControlNet all residuals in a row."""
        with torch.no_grad():
            return flat(model(**self.inputs(Draw(seed), grid, batch), **changes, return_dict=False))


def flat(output: Any) -> Tensor:
    """All tensors of a nested output as one vector."""
    if isinstance(output, Tensor):
        return output.flatten()
    return torch.cat([flat(part) for part in output if part is not None])


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_BLOCKS = {"num_layers": 1, "num_single_layers": 2}
_POOLED = {"pooled_projection_dim": 32}
_UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
}  # fmt: skip
_UNET_UP = {"sample_size": 4, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
_UNCONDITIONAL = {
    "sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "attention_head_dim": 4, "down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2,
}  # fmt: skip
_SDXL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
}  # fmt: skip
_CONTROL = {"conditioning_embedding_out_channels": (8, 8, 8, 8)}
_UNION = _UNET | _SDXL | _CONTROL | {"num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 2}

_TOKENS = {"in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), **_HEADS}
_FLUX = _TOKENS | _BLOCKS
_FLUX2 = _FLUX | {"axes_dims_rope": (4, 4, 4, 4)}
_CHROMA = _FLUX | {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
_QWEN = _TOKENS | {"out_channels": 4, "num_layers": 2}
_KREA = {
    "in_channels": 16, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 48, "timestep_embed_dim": 16, "text_hidden_dim": 32,
    "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 48,
    "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6), **_HEADS,
}  # fmt: skip

_LATENTS = {"in_channels": 4, "out_channels": 4}
_SD3 = _LATENTS | {
    "sample_size": 8, "num_layers": 3, "joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 32,
    "dual_attention_layers": (0, 1), "qk_norm": "rms_norm", **_POOLED, **_HEADS,
}  # fmt: skip
_AURAFLOW = _LATENTS | {
    "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "joint_attention_dim": 32, "caption_projection_dim": 32,
    "pos_embed_max_size": 1024, **_HEADS,
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "cross_attention_dim": 32, "cross_attention_dim_t5": 32,
    "text_len": 6, "text_len_t5": 5, **_POOLED, **_HEADS,
}  # fmt: skip
_HUNYUAN_IMAGE = _LATENTS | {
    "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 16, "rope_axes_dim": (8, 8), **_HEADS, **_BLOCKS,
}  # fmt: skip
_GLM = _LATENTS | {"num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8, **_HEADS}
_COGVIEW = _GLM | {"pos_embed_max_size": 32, "sample_size": 8}
_LUMINA_NEXT = {
    "sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2, "cross_attention_dim": 32,
}  # fmt: skip
_LUMINA2 = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4,
    "num_kv_heads": 2, "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 64, 64), "cap_feat_dim": 32,
}  # fmt: skip
_DIT = {"in_channels": 4, "num_layers": 2, "sample_size": 8, **_HEADS}
_PIXART = _DIT | {"out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32}
_PRX = {"in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
_ERNIE = _LATENTS | {
    "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48, "text_in_dim": 24, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
_HIDREAM = _LATENTS | {
    "patch_size": 2, "caption_channels": [32, 32], "text_emb_dim": 32, "axes_dims_rope": (8, 4, 4), "max_resolution": (32, 32),
    "llama_layers": [0, 1, 2], "force_inference_output": True, **_HEADS, **_BLOCKS,
}  # fmt: skip
_Z_IMAGE = {
    "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
    "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64],
}  # fmt: skip

# Class, configuration, arguments, text tokens in the same softmax.
ZOO: dict[str, Specimen] = {
    "SD1.5": Specimen("UNet2DConditionModel", _UNET | _UNET_UP, inputs.UNET),
    "SDXL": Specimen("UNet2DConditionModel", _UNET | _UNET_UP | _SDXL, inputs.SDXL),
    "U-Net without text": Specimen("UNet2DModel", _UNCONDITIONAL, inputs.UNCONDITIONAL),
    "ControlNet": Specimen("ControlNetModel", _UNET | _CONTROL, inputs.UNET_CONTROL),
    "ControlNet Union": Specimen("ControlNetUnionModel", _UNION, inputs.UNION),
    "SD3": Specimen("SD3Transformer2DModel", _SD3, inputs.SD3, 6),
    "SD3 ControlNet": Specimen("SD3ControlNetModel", _SD3, inputs.SD3 | inputs.LATENTS_CONTROL, 6),
    "FLUX.1": Specimen("FluxTransformer2DModel", _FLUX | _POOLED, inputs.FLUX1, 6),
    "FLUX.1 ControlNet": Specimen("FluxControlNetModel", _FLUX | _POOLED, inputs.FLUX1 | inputs.TOKENS_CONTROL, 6),
    "FLUX.2": Specimen("Flux2Transformer2DModel", _FLUX2 | {"timestep_guidance_channels": 16, "guidance_embeds": False}, inputs.FLUX2, 6),
    "FLUX.3": Specimen("Flux3Transformer2DModel", _FLUX2 | {"timestep_channels": 16, "cond_in_channels": 16}, inputs.FLUX2, 6),
    "Chroma": Specimen("ChromaTransformer2DModel", _CHROMA, inputs.FLUX, 6),
    "Bria 3": Specimen("BriaTransformer2DModel", _FLUX, inputs.FLUX, 6),
    "Bria FIBO": Specimen("BriaFiboTransformer2DModel", _FLUX | {"text_encoder_dim": 16}, inputs.FIBO, 6),
    "LongCat-Image": Specimen("LongCatImageTransformer2DModel", _FLUX | _POOLED, inputs.FLUX, 6),
    "Ovis-Image": Specimen("OvisImageTransformer2DModel", _FLUX | {"out_channels": 16}, inputs.FLUX, 6),
    "Lumina-Next": Specimen("LuminaNextDiT2DModel", _LUMINA_NEXT, inputs.LUMINA_NEXT),
    "Lumina 2": Specimen("Lumina2Transformer2DModel", _LUMINA2, inputs.LUMINA2, 6),
    "PixArt": Specimen("PixArtTransformer2DModel", _PIXART, inputs.PIXART),
    "AuraFlow": Specimen("AuraFlowTransformer2DModel", _AURAFLOW, inputs.LATENTS, 14),
    "HunyuanDiT": Specimen("HunyuanDiT2DModel", _HUNYUAN | {"num_layers": 2}, inputs.HUNYUAN),
    "HunyuanDiT ControlNet": Specimen(
        "HunyuanDiT2DControlNetModel", _HUNYUAN | {"transformer_num_layers": 4}, inputs.HUNYUAN | inputs.LATENTS_CONTROL
    ),
    "CogView3-Plus": Specimen("CogView3PlusTransformer2DModel", _COGVIEW, inputs.COGVIEW, 6),
    "CogView4": Specimen("CogView4Transformer2DModel", _COGVIEW | {"rope_axes_dim": (16, 16)}, inputs.COGVIEW, 6),
    "DiT": Specimen("DiTTransformer2DModel", _DIT | {"num_embeds_ada_norm": 10}, inputs.DIT),
    "GLM-Image": Specimen("GlmImageTransformer2DModel", _GLM | {"prior_vq_quantizer_codebook_size": 8}, inputs.GLM, 6),
    "PRX": Specimen("PRXTransformer2DModel", _PRX, inputs.PRX, 6),
    "ERNIE-Image": Specimen("ErnieImageTransformer2DModel", _ERNIE, inputs.ERNIE, 6),
    "HunyuanImage 2.1": Specimen("HunyuanImageTransformer2DModel", _HUNYUAN_IMAGE, inputs.HUNYUAN_IMAGE, 9),
    "Krea 2": Specimen("Krea2Transformer2DModel", _KREA, inputs.KREA, 6),
    "Qwen-Image": Specimen("QwenImageTransformer2DModel", _QWEN, inputs.QWEN, 6),
    "Qwen-Image ControlNet": Specimen("QwenImageControlNetModel", _QWEN, inputs.QWEN | inputs.TOKENS_CONTROL, 6),
    "NucleusMoE-Image": Specimen(
        "NucleusMoEImageTransformer2DModel", _QWEN | {"moe_enabled": False, "num_key_value_heads": 1}, inputs.NUCLEUS, 6
    ),
    "HiDream-I1": Specimen("HiDreamImageTransformer2DModel", _HIDREAM, inputs.HIDREAM, 10),
    "Z-Image": Specimen("ZImageTransformer2DModel", _Z_IMAGE, inputs.Z_IMAGE, 32),
}
