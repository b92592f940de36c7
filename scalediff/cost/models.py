"""Models of published size as data: how each is built on the meta device, without its weights.

Every configuration names where it is published. Families whose configuration is published nowhere that we can name have no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FACTOR = 8  # pixels per latent along an axis, in all of these models

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
}


@dataclass(frozen=True)
class Model:
    """How to build a model on the meta device.

    Attributes:
        denoiser: Function that builds the denoiser.
        inputs: Function from a latent grid `(Y, X)` to the arguments of the denoiser, for one picture. Masks are on the CPU, because
            their values are read.
        channels: Number of latent channels.
        tokens: Pixels per token along an axis, at the finest level.
        guided: Whether classifier-free guidance needs a second pass.
        texts: Names of the text encoders, of `TEXT_ENCODERS`.
        doubled: Whether the two passes of guidance are one of a doubled batch.
        autoencoder: Function from the number of latent channels that builds the autoencoder.
    """

    denoiser: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    channels: int
    tokens: int
    guided: bool
    texts: tuple[str, ...] = ()
    doubled: bool = False
    autoencoder: Callable[[int], Any] | None = None


def built(model: Model) -> tuple[nn.Module, Any]:
    """Build the denoiser and the autoencoder of a model on the meta device."""
    with torch.device("meta"):
        return model.denoiser().eval(), (model.autoencoder or _autoencoder)(model.channels).eval()


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


def _empty(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def _mask(tokens: int) -> Tensor:
    """A mask of text without padding."""
    return torch.ones(1, tokens, dtype=torch.int64, device="cpu")


def _ids(y: int, x: int, axes: int) -> Tensor:
    """Position ids of a token grid; the values are read, so not on the meta device."""
    ids = torch.zeros(y, x, axes, device="cpu")
    ids[..., 1] += torch.arange(y, device="cpu")[:, None]
    ids[..., 2] += torch.arange(x, device="cpu")[None, :]
    return ids.flatten(0, 1)


def _sdxl_inputs(y: int, x: int) -> dict[str, Any]:
    added = _empty(text_embeds=(1, 1280), time_ids=(1, 6))
    text = torch.empty(1, 77, 2048)
    return {"sample": torch.empty(1, 4, y, x), "timestep": torch.tensor(1.0), "encoder_hidden_states": text, "added_cond_kwargs": added}


def _packed(*, text: int, width: int, channels: int = 64, axes: int = 3, **more: tuple[int, ...]) -> Callable[[int, int], dict[str, Any]]:
    """Arguments of FLUX-like transformers, with `text` tokens of this width."""

    def inputs(y: int, x: int) -> dict[str, Any]:
        tensors = _empty(hidden_states=(1, y * x // 4, channels), encoder_hidden_states=(1, text, width), timestep=(1,), **more)
        return {**tensors, "img_ids": _ids(y // 2, x // 2, axes), "txt_ids": torch.zeros(text, axes, device="cpu")}

    return inputs


def _latents(*, text: int, width: int, channels: int, **more: tuple[int, ...]) -> Callable[[int, int], dict[str, Any]]:
    """Arguments of transformers that take latents, with `text` tokens of this width."""

    def inputs(y: int, x: int) -> dict[str, Any]:
        tensors = _empty(hidden_states=(1, channels, y, x), encoder_hidden_states=(1, text, width), timestep=(1,))
        return {**tensors, **_empty(**more)}

    return inputs


def _chroma_inputs(y: int, x: int) -> dict[str, Any]:
    """All text tokens are real, as for a long prompt."""
    mask = torch.ones(1, 512 + y * x // 4, dtype=torch.bool, device="cpu")
    return {**_packed(text=512, width=4096)(y, x), "attention_mask": mask}


def _qwen_inputs(y: int, x: int) -> dict[str, Any]:
    tensors = _empty(hidden_states=(1, y * x // 4, 64), encoder_hidden_states=(1, 512, 3584), timestep=(1,))
    return {**tensors, "img_shapes": [[(1, y // 2, x // 2)]], "encoder_hidden_states_mask": None}


def _z_image_inputs(y: int, x: int) -> dict[str, Any]:
    return {"x": [torch.empty(16, 1, y, x)], "t": torch.empty(1), "cap_feats": [torch.empty(512, 2560)]}


def _lumina2_inputs(y: int, x: int) -> dict[str, Any]:
    return {**_latents(text=256, width=2304, channels=16)(y, x), "encoder_attention_mask": _mask(256)}


def _lumina_next_inputs(y: int, x: int) -> dict[str, Any]:
    """256 tokens of Gemma, padding included, and the table of 384 positions along an axis that the pipeline has."""
    rotary = torch.empty(384, 384, 36, dtype=torch.complex64)
    inputs = {**_latents(text=256, width=2048, channels=4)(y, x), "encoder_mask": torch.empty(1, 256)}
    return {**inputs, "image_rotary_emb": rotary, "cross_attention_kwargs": {}}


def _pixart_inputs(y: int, x: int) -> dict[str, Any]:
    inputs = _latents(text=300, width=4096, channels=4)(y, x)
    return {**inputs, "encoder_attention_mask": torch.empty(1, 300), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


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
_CLIPS = ("CLIP ViT-L/14", "OpenCLIP ViT-bigG/14")
_SIZES = {"original_size": (1, 2), "target_size": (1, 2), "crop_coords": (1, 2)}

# By name: the checkpoint, and where its configuration is published. "Class default" is the default of the class in diffusers.
MODELS: Mapping[str, Model] = {
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": Model(_named("UNet2DConditionModel", **_SDXL), _sdxl_inputs, 4, 8, guided=True, doubled=True, texts=_CLIPS),
    # black-forest-labs/FLUX.1-dev: class default
    "flux": Model(
        _named("FluxTransformer2DModel", guidance_embeds=True), _packed(text=512, width=4096, pooled_projections=(1, 768), guidance=(1,)),
        16, 16, guided=False, texts=("CLIP ViT-L/14", "T5 v1.1 XXL"),
    ),
    # stabilityai/stable-diffusion-3.5-large: diffusers' script convert_sd3_to_diffusers.py; 77 tokens of CLIP and 256 of T5
    "sd3.5-large": Model(
        _named("SD3Transformer2DModel", **_SD35), _latents(text=77 + 256, width=4096, channels=16, pooled_projections=(1, 2048)),
        16, 16, guided=True, doubled=True, texts=(*_CLIPS, "T5 v1.1 XXL"),
    ),
    # black-forest-labs/FLUX.2-dev: class default
    "flux2": Model(
        _named("Flux2Transformer2DModel"), _packed(text=512, width=15360, channels=128, axes=4, guidance=(1,)), 32, 16, guided=False,
        texts=("Mistral Small 3.1 24B",), autoencoder=_named("AutoencoderKLFlux2"),
    ),
    # lodestones/Chroma1-HD: class default
    "chroma": Model(_named("ChromaTransformer2DModel"), _chroma_inputs, 16, 16, guided=True, texts=("T5 v1.1 XXL",)),
    # Qwen/Qwen-Image: class default
    "qwen-image": Model(
        _named("QwenImageTransformer2DModel"), _qwen_inputs, 16, 16, guided=True, texts=("Qwen2.5-VL 7B",),
        autoencoder=_named("AutoencoderKLQwenImage"),
    ),
    # Tongyi-MAI/Z-Image: class default
    "z-image": Model(_named("ZImageTransformer2DModel"), _z_image_inputs, 16, 16, guided=True, doubled=True, texts=("Qwen3 4B",)),
    # Alpha-VLLM/Lumina-Image-2.0: class default, and the width of Gemma 2
    "lumina2": Model(
        _named("Lumina2Transformer2DModel", cap_feat_dim=2304), _lumina2_inputs, 16, 16, guided=True, texts=("Gemma 2 2B",)
    ),
    # Alpha-VLLM/Lumina-Next-SFT-diffusers: diffusers' script convert_lumina_to_diffusers.py
    "lumina-next": Model(
        _named("LuminaNextDiT2DModel", num_layers=24, num_kv_heads=8), _lumina_next_inputs, 4, 16, guided=True, doubled=True,
        texts=("Gemma 2B",),
    ),
    # PixArt-alpha/PixArt-Sigma-XL-2-1024-MS: class default, and the width of T5
    "pixart-sigma": Model(
        _named("PixArtTransformer2DModel", caption_channels=4096, interpolation_scale=2, use_additional_conditions=False),
        _pixart_inputs, 4, 16, guided=True, doubled=True, texts=("T5 v1.1 XXL",),
    ),
    # zai-org/CogView4-6B: diffusers' script convert_cogview4_to_diffusers.py
    "cogview4": Model(
        _named("CogView4Transformer2DModel", **_COGVIEW4), _latents(text=224, width=4096, channels=16, **_SIZES), 16, 16, guided=True,
        texts=("GLM-4 9B",), autoencoder=_cogview_autoencoder,
    ),
    # AIDC-AI/Ovis-Image-7B: class default
    "ovis-image": Model(_named("OvisImageTransformer2DModel"), _packed(text=256, width=2048), 16, 16, guided=True, texts=("Qwen3 1.7B",)),
}  # fmt: skip
