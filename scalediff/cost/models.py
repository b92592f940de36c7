"""Models of published size as data: how each is built on the meta device, without its weights.

Every configuration names where it is published. Families whose configuration is published nowhere that we can name have no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scalediff.cost.inputs import (
    Inputs,
    chroma_inputs,
    ernie_inputs,
    fibo_inputs,
    hidream_inputs,
    hunyuan_dit_inputs,
    hunyuan_image_inputs,
    krea2_inputs,
    latents,
    lumina2_inputs,
    lumina_next_inputs,
    nucleus_inputs,
    packed,
    pixart_inputs,
    prx_inputs,
    qwen_inputs,
    sdxl_inputs,
    z_image_inputs,
)
from scalediff.cost.stand_ins import runnable_on_meta
from scalediff.families.grid import Grid

# Parameters of text encoders: those of the classes of transformers with the configuration of the checkpoint.
TEXT_ENCODERS = {
    "CLIP ViT-L/14": 123_060_480,
    "OpenCLIP ViT-bigG/14": 694_659_840,
    "T5 v1.1 XXL": 4_762_310_656,
    "Qwen2.5-VL 7B": 8_292_166_656,
    "Qwen3 4B": 4_022_468_096,
    "Qwen3 1.7B": 1_720_574_976,
    "Mistral Small 3.1 24B": 24_011_361_280,
    "Gemma 2B": 2_506_172_416,
    "Gemma 2 2B": 2_614_341_888,
    "GLM-4 9B": 8_779_194_368,
    "Pile-T5 XL": 1_223_550_976,
    "BERT large, 47020 words": 352_035_840,
    "mT5 XL": 1_669_958_656,
    "ByT5 small, 1510 words": 219_314_944,
    "Llama 3.1 8B": 8_030_261_248,
    "Ministral 3 3B": 3_849_090_048,
    "SmolLM3 3B": 3_075_098_624,
    "Qwen3-VL 4B": 4_437_815_808,
    "Qwen3-VL 8B": 8_767_123_696,
}


@dataclass(frozen=True)
class Model:
    """How to build a model on the meta device.

    Attributes:
        denoiser: Function that builds the denoiser.
        inputs: Function from a latent grid `(Y, X)` to the arguments of the denoiser, for one picture.
        channels: Number of latent channels.
        tokens: Pixels per token along an axis, at the finest level.
        guided: Whether classifier-free guidance needs a second pass.
        texts: Names of the text encoders, of `TEXT_ENCODERS`.
        doubled: Whether the two passes of guidance are one of a doubled batch.
        autoencoder: Function from the number of latent channels that builds the autoencoder.
        factor: Pixels per latent along an axis.
        native: Native token grid `(Y, X)`, where the denoiser does not tell it.
    """

    denoiser: Callable[[], nn.Module]
    inputs: Inputs
    channels: int
    tokens: int
    guided: bool
    texts: tuple[str, ...] = ()
    doubled: bool = False
    autoencoder: Callable[[int], Any] | None = None
    factor: int = 8
    native: Grid | None = None


def built(model: Model) -> tuple[nn.Module, Any]:
    """Build the denoiser and the autoencoder of a model on the meta device."""
    with torch.device("meta"):
        return runnable_on_meta(model.denoiser().eval()), (model.autoencoder or _autoencoder)(model.channels).eval()


def _autoencoder(channels: int) -> Any:
    """The autoencoder of Stable Diffusion XL, or of FLUX.1; with 4 latent channels it also has a pointwise convolution of the latents."""
    return _image_autoencoder(channels, (128, 256, 512, 512), use_quant_conv=channels == 4, use_post_quant_conv=channels == 4)


def _image_autoencoder(channels: int, widths: tuple[int, ...], **more: Any) -> Any:
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": widths, "latent_channels": channels, "layers_per_block": 2, "sample_size": 1024}
    return diffusers.AutoencoderKL(**{**sizes, **more}, **blocks)


def _cogview_autoencoder(channels: int) -> Any:
    pointwise = {"use_quant_conv": False, "use_post_quant_conv": False}
    return _image_autoencoder(channels, (128, 512, 1024, 1024), layers_per_block=3, mid_block_add_attention=False, **pointwise)


def _named(name: str, **config: Any) -> Callable[..., Any]:
    """A function that builds a class of diffusers, whatever it is called with."""

    def build(*_: Any) -> Any:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


_SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_SD35 = {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
_COGVIEW4 = {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}
_HIDREAM = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}  # fmt: skip
_HUNYUAN = {
    "in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637,
    "use_style_cond_and_image_meta_size": False,
}  # fmt: skip
_HUNYUAN_AUTOENCODER = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": 2, "spatial_compression_ratio": 32, "sample_size": 384,
}  # fmt: skip
_NUCLEUS = {
    "out_channels": 16, "num_layers": 32, "num_key_value_heads": 4, "joint_attention_dim": 4096, "num_experts": 64,
    "dense_moe_strategy": "leave_first_three_blocks_dense", "capacity_factors": [0.0] * 3 + [4.0] * 2 + [2.0] * 27,
}  # fmt: skip
_ERNIE = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288, "text_in_dim": 3072}
_BRIA = {"in_channels": 16, "num_layers": 8, "num_single_layers": 28, "attention_head_dim": 96, "axes_dims_rope": [0, 48, 48]}
_WAN22 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "temperal_downsample": [False, True, True], "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
_CLIPS = ("CLIP ViT-L/14", "OpenCLIP ViT-bigG/14")
_SIZES = {"original_size": (1, 2), "target_size": (1, 2), "crop_coords": (1, 2)}

# By name: the checkpoint, and where its configuration is published. "Class default" is the default of the class in diffusers.
MODELS: Mapping[str, Model] = {
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": Model(_named("UNet2DConditionModel", **_SDXL), sdxl_inputs, 4, 8, guided=True, doubled=True, texts=_CLIPS),
    # black-forest-labs/FLUX.1-dev: class default
    "flux": Model(
        _named("FluxTransformer2DModel", guidance_embeds=True), packed(text=512, width=4096, pooled_projections=(1, 768), guidance=(1,)),
        16, 16, guided=False, texts=("CLIP ViT-L/14", "T5 v1.1 XXL"),
    ),
    # stabilityai/stable-diffusion-3.5-large: diffusers' script convert_sd3_to_diffusers.py; 77 tokens of CLIP and 256 of T5
    "sd3.5-large": Model(
        _named("SD3Transformer2DModel", **_SD35), latents(text=77 + 256, width=4096, channels=16, pooled_projections=(1, 2048)),
        16, 16, guided=True, doubled=True, texts=(*_CLIPS, "T5 v1.1 XXL"),
    ),
    # black-forest-labs/FLUX.2-dev: class default
    "flux2": Model(
        _named("Flux2Transformer2DModel"), packed(text=512, width=15360, channels=128, axes=4, guidance=(1,)), 32, 16, guided=False,
        texts=("Mistral Small 3.1 24B",), autoencoder=_named("AutoencoderKLFlux2"),
    ),
    # lodestones/Chroma1-HD: class default
    "chroma": Model(_named("ChromaTransformer2DModel"), chroma_inputs, 16, 16, guided=True, texts=("T5 v1.1 XXL",)),
    # Qwen/Qwen-Image: class default
    "qwen-image": Model(
        _named("QwenImageTransformer2DModel"), qwen_inputs, 16, 16, guided=True, texts=("Qwen2.5-VL 7B",),
        autoencoder=_named("AutoencoderKLQwenImage"),
    ),
    # Tongyi-MAI/Z-Image: class default
    "z-image": Model(_named("ZImageTransformer2DModel"), z_image_inputs, 16, 16, guided=True, doubled=True, texts=("Qwen3 4B",)),
    # Alpha-VLLM/Lumina-Image-2.0: class default, and the width of Gemma 2
    "lumina2": Model(
        _named("Lumina2Transformer2DModel", cap_feat_dim=2304), lumina2_inputs, 16, 16, guided=True, texts=("Gemma 2 2B",)
    ),
    # Alpha-VLLM/Lumina-Next-SFT-diffusers: diffusers' script convert_lumina_to_diffusers.py
    "lumina-next": Model(
        _named("LuminaNextDiT2DModel", num_layers=24, num_kv_heads=8), lumina_next_inputs, 4, 16, guided=True, doubled=True,
        texts=("Gemma 2B",),
    ),
    # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS: class default, and the width of T5
    "pixart-sigma": Model(
        _named("PixArtTransformer2DModel", caption_channels=4096, interpolation_scale=2, use_additional_conditions=False),
        pixart_inputs, 4, 16, guided=True, doubled=True, texts=("T5 v1.1 XXL",),
    ),
    # zai-org/CogView4-6B: diffusers' script convert_cogview4_to_diffusers.py
    "cogview4": Model(
        _named("CogView4Transformer2DModel", **_COGVIEW4), latents(text=224, width=4096, channels=16, **_SIZES), 16, 16, guided=True,
        texts=("GLM-4 9B",), autoencoder=_cogview_autoencoder,
    ),
    # AIDC-AI/Ovis-Image-7B: class default
    "ovis-image": Model(_named("OvisImageTransformer2DModel"), packed(text=256, width=2048), 16, 16, guided=True, texts=("Qwen3 1.7B",)),
    # fal/AuraFlow-v0.3: class default, and its table of 96 x 96 positions
    "auraflow": Model(
        _named("AuraFlowTransformer2DModel", pos_embed_max_size=96**2), latents(text=256, width=2048, channels=4), 4, 16, guided=True,
        doubled=True, texts=("Pile-T5 XL",),
    ),
    # briaai/BRIA-3.2: the config.json of a copy, SahilCarterr/BRIA-3.2; the card's number of parameters agrees
    "bria-3.2": Model(
        _named("BriaTransformer2DModel", **_BRIA), packed(text=128, width=4096, channels=16), 4, 16, guided=True, doubled=True,
        texts=("T5 v1.1 XXL",),
    ),
    # briaai/FIBO: its config.json, and for the autoencoder that of briaai/Fibo-Edit, which is Wan 2.2's
    "fibo": Model(
        _named("BriaFiboTransformer2DModel", in_channels=48, num_layers=8), fibo_inputs, 48, 16, guided=True, doubled=True,
        texts=("SmolLM3 3B",), autoencoder=_named("AutoencoderKLWan", **_WAN22), factor=16,
    ),
    # baidu/ERNIE-Image: its config.json
    "ernie-image": Model(
        _named("ErnieImageTransformer2DModel", **_ERNIE), ernie_inputs, 32, 16, guided=True, doubled=True, texts=("Ministral 3 3B",),
        autoencoder=_named("AutoencoderKLFlux2"),
    ),
    # HiDream-ai/HiDream-I1-Full: the config.json that all its variants share; CLIP's longer tables and projections are not counted
    "hidream-i1": Model(
        _named("HiDreamImageTransformer2DModel", **_HIDREAM), hidream_inputs, 16, 16, guided=True, doubled=True,
        texts=(*_CLIPS, "T5 v1.1 XXL", "Llama 3.1 8B"),
    ),
    # Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers: the config.json of v1.1, and of v1.2's ControlNets, without the style
    "hunyuan-dit": Model(
        _named("HunyuanDiT2DModel", **_HUNYUAN), hunyuan_dit_inputs, 4, 16, guided=True, doubled=True,
        texts=("BERT large, 47020 words", "mT5 XL"),
    ),
    # hunyuanvideo-community/HunyuanImage-2.1-Diffusers: class default, and diffusers' script convert_hunyuan_image_to_diffusers.py
    "hunyuan-image": Model(
        _named("HunyuanImageTransformer2DModel", text_embed_2_dim=1472), hunyuan_image_inputs, 64, 32, guided=True,
        texts=("Qwen2.5-VL 7B", "ByT5 small, 1510 words"), autoencoder=_named("AutoencoderKLHunyuanImage", **_HUNYUAN_AUTOENCODER),
        factor=32,
    ),
    # krea/Krea-2-Raw: class default
    "krea-2": Model(
        _named("Krea2Transformer2DModel"), krea2_inputs, 16, 16, guided=True, texts=("Qwen3-VL 4B",),
        autoencoder=_named("AutoencoderKLQwenImage"),
    ),
    # meituan-longcat/LongCat-Image: class default, with as many blocks as its checkpoint has; the card's number of parameters agrees
    "longcat-image": Model(
        _named("LongCatImageTransformer2DModel", num_layers=10, num_single_layers=20), packed(text=512, width=3584), 16, 16, guided=True,
        texts=("Qwen2.5-VL 7B",),
    ),
    # NucleusAI/Nucleus-Image: its config.json
    "nucleus-image": Model(
        _named("NucleusMoEImageTransformer2DModel", **_NUCLEUS), nucleus_inputs, 16, 16, guided=True, texts=("Qwen3-VL 8B",),
        autoencoder=_named("AutoencoderKLQwenImage"),
    ),
    # Photoroom/prx-512-t2i: class default, as in diffusers' script convert_prx_to_diffusers.py; T5Gemma's encoder is as large as Gemma 2
    "prx": Model(
        _named("PRXTransformer2DModel"), prx_inputs, 16, 16, guided=True, doubled=True, texts=("Gemma 2 2B",), native=(32, 32),
    ),
}  # fmt: skip
