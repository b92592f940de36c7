"""FLOPs of every stage of a run for full-size models, counted on the meta device without weights.

The count covers matrix products and convolutions of the denoiser and the autoencoder, at 2 FLOPs per multiply-add. Linear layers,
convolutions and the autoencoder are counted as torch runs them; attention of the denoiser by formula, 4 D for every query, key and head.
Text encoders, filters and elementwise operations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalediff.cost.tally import FusedAttention, KnownResults
from scalediff.families import family_of
from scalediff.families.base import Family, Reader
from scalediff.families.grid import patch_of, window_of
from scalediff.settings import Attention, Settings, plan_sizes
from scalediff_kernels.neighborhood.api import TextQueries
from scalediff_kernels.neighborhood.geometry import attention_flops, text_attention_flops

FACTOR = 8  # pixels per latent along an axis, in all of these models


@dataclass(frozen=True)
class Work:
    """TFLOPs of one stage.

    Attributes:
        height, width: Size in pixels.
        steps: Number of denoising steps.
        passes: Number of forward passes of the denoiser, including guidance.
        attention, linear, convolution: TFLOPs of all passes.
        vae: TFLOPs of decoding this stage and encoding the reference of the next.
    """

    height: int
    width: int
    steps: int
    passes: int
    attention: float
    linear: float
    convolution: float
    vae: float

    @property
    def total(self) -> float:
        """TFLOPs of the stage."""
        return self.attention + self.linear + self.convolution + self.vae


class Forward(NamedTuple):
    """TFLOPs of one forward pass of a denoiser.

    Attributes:
        attention: Self-attention of the image, including text in the same softmax.
        cross: Cross-attention of the image to text.
        linear, convolution: Linear layers and convolutions.
    """

    attention: float
    cross: float
    linear: float
    convolution: float


@dataclass(frozen=True)
class Model:
    """How to build a model on the meta device.

    Attributes:
        denoiser: Function that builds the denoiser.
        inputs: Function from a latent grid `(Y, X)` to the arguments of the denoiser.
        channels: Number of latent channels.
        tokens: Pixels per token along an axis, at the finest level.
        guided: Whether classifier-free guidance needs a second pass.
        texts: Function that builds the text encoders.
    """

    denoiser: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    channels: int
    tokens: int
    guided: bool
    texts: Callable[[], list[nn.Module]] = list


def _sdxl() -> nn.Module:
    """The U-Net of stabilityai/stable-diffusion-xl-base-1.0."""
    import diffusers

    unet: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    return unet


def _sdxl_inputs(y: int, x: int) -> dict[str, Any]:
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    text = torch.empty(1, 77, 2048)
    return {"sample": torch.empty(1, 4, y, x), "timestep": torch.tensor(1.0), "encoder_hidden_states": text, "added_cond_kwargs": added}


def _flux() -> nn.Module:
    """The transformer of black-forest-labs/FLUX.1-dev, whose config is the default of its class."""
    import diffusers

    transformer: nn.Module = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    return transformer


def _flux_inputs(y: int, x: int) -> dict[str, Any]:
    ids = torch.zeros(y // 2, x // 2, 3, device="cpu")  # the values are read, so not on the meta device
    ids[..., 1] += torch.arange(y // 2, device="cpu")[:, None]
    ids[..., 2] += torch.arange(x // 2, device="cpu")[None, :]
    return {
        "hidden_states": torch.empty(1, y * x // 4, 64), "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768), "timestep": torch.empty(1), "guidance": torch.empty(1),
        "img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(512, 3, device="cpu"),
    }  # fmt: skip


def _clip(width: int, layers: int, heads: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, projection_dim=width
    )


def _sdxl_texts() -> list[nn.Module]:
    """OpenAI's CLIP ViT-L/14 and OpenCLIP's ViT-bigG/14."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return [CLIPTextModel(_clip(768, 12, 12)), CLIPTextModelWithProjection(_clip(1280, 32, 20))]


def _flux_texts() -> list[nn.Module]:
    """OpenAI's CLIP ViT-L/14 and the encoder of T5 v1.1 XXL."""
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    return [CLIPTextModel(_clip(768, 12, 12)), T5EncoderModel(t5)]


MODELS: Mapping[str, Model] = {
    "sdxl": Model(_sdxl, _sdxl_inputs, channels=4, tokens=8, guided=True, texts=_sdxl_texts),
    "flux": Model(_flux, _flux_inputs, channels=16, tokens=16, guided=False, texts=_flux_texts),
}


def count(name: str, size: tuple[int, int], *, attention: Attention = "npa") -> tuple[Settings, list[Work]]:
    """Count the FLOPs of every stage of a run with the default preset.

    Args:
        name: `"sdxl"` or `"flux"`.
        size: Target (height, width) in pixels.
        attention: Attention of the stages above the native size.

    Returns:
        The preset's settings, and the work of every stage.

    Raises:
        ValueError: The model is not one of these, or does not support the size.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    denoiser, vae = built(model)
    settings, sizes = stages(model, denoiser, size)
    rows = []
    for index, (height, width) in enumerate(sizes):
        steps = settings.steps if index == 0 else settings.stage_steps
        passes = steps * passes_of_a_step(model, settings)
        one = forward_work(denoiser, model.inputs(height // FACTOR, width // FACTOR), attention=attention)
        after = sizes[index + 1] if index + 1 < len(sizes) else None
        coded = autoencoder_work(vae, (height, width), after)
        attended, linear, convolution = (passes * part for part in (one.attention + one.cross, one.linear, one.convolution))
        rows.append(Work(height, width, steps, passes, attended, linear, convolution, coded))
    return settings, rows


def built(model: Model) -> tuple[nn.Module, Any]:
    """Build the denoiser and the autoencoder of a model on the meta device."""
    with torch.device("meta"):
        return model.denoiser().eval(), _autoencoder(model.channels)


def stages(model: Model, denoiser: nn.Module, size: tuple[int, int]) -> tuple[Settings, list[tuple[int, int]]]:
    """The settings of the default preset, and (height, width) in pixels of every stage up to a target; raises as `plan_sizes`."""
    family = _family(denoiser)
    assert family.cascade is not None
    native = family.native_grid(denoiser)
    assert native is not None
    sizes = plan_sizes(size, native=(native[0] * model.tokens, native[1] * model.tokens), multiple=model.tokens)
    return family.cascade.presets(denoiser)["default"].settings, sizes


def passes_of_a_step(model: Model, settings: Settings) -> int:
    """Number of forward passes in a denoising step, including guidance."""
    return 2 if model.guided and settings.guidance_scale > 1 else 1


def forward_work(
    denoiser: nn.Module, inputs: dict[str, Any], *, attention: Attention = "npa", text_queries: TextQueries = "window"
) -> Forward:
    """Count the FLOPs of one forward pass.

    Args:
        denoiser: A denoiser of a known family on the meta device.
        inputs: Arguments of the forward pass.
        attention: `"npa"` or `"full"` attention above the native area.
        text_queries: Rule for text queries, as in `patch_model`.

    Returns:
        The TFLOPs of the pass.
    """
    return Forward(*attention_work(denoiser, inputs, attention=attention, text_queries=text_queries), *layer_work(denoiser, inputs))


def attention_work(
    denoiser: nn.Module, inputs: dict[str, Any], *, attention: Attention = "npa", text_queries: TextQueries = "window"
) -> tuple[float, float]:
    """TFLOPs of self-attention (including text in the same softmax) and of cross-attention; arguments as in `forward_work`.

    Nothing is run: the layout comes from the family, and the FLOPs from the formulas in `scalediff_kernels.neighborhood.geometry`.
    """
    family = _family(denoiser)
    layout, native = family.layout(denoiser, inputs, Reader()), family.native_grid(denoiser)
    assert native is not None
    windows = attention == "npa" and layout.grid[0] * layout.grid[1] > native[0] * native[1]
    attended = cross = 0
    for site in family.sites(denoiser):
        assert site.role != "text", site  # text-only attention: in none of these models
        module: Any = denoiser.get_submodule(site.name)
        heads = {"heads": module.heads, "head_dim": module.inner_dim // module.heads}
        one = next(s for s in layout.sequences if s.level == site.level and (s.text > 0) == (site.role == "joint"))
        window, patch = (window_of(native, site.level), patch_of(native, site.level)) if windows else (one.grid, one.grid)
        if site.role == "cross":
            cross += attention_flops(grid=one.grid, window=(0, 0), text=sum(layout.others), **heads)
        else:
            attended += attention_flops(grid=one.grid, window=window, text=one.text, **heads)
        if site.role == "joint":
            rule = text_queries if windows else "global"
            attended += text_attention_flops(grid=one.grid, window=window, patch=patch, text=one.text, rule=rule, **heads)
    return attended / 1e12, cross / 1e12


def layer_work(denoiser: nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    """TFLOPs of linear layers and of convolutions in one forward pass, in which attention only allocates its output."""
    with FusedAttention():
        parts = _count_flops(lambda: denoiser(**_on_meta(inputs)))
    convolutions = sum((flops for op, flops in parts.items() if "conv" in op), 0.0)
    return sum(parts.values()) - _attention_flops(parts) - convolutions, convolutions


def autoencoder_work(vae: Any, size: tuple[int, int], after: tuple[int, int] | None = None) -> float:
    """TFLOPs of decoding a picture of (height, width) pixels and, if `after` is given, of encoding a picture of that size."""
    latents = torch.empty(1, vae.config.latent_channels, size[0] // FACTOR, size[1] // FACTOR, device="meta")
    total = sum(_count_flops(lambda: vae.decode(latents)).values())
    if after is not None:
        total += sum(_count_flops(lambda: vae.encode(torch.empty(1, 3, *after, device="meta"))).values())
    return total


def _family(denoiser: nn.Module) -> Family:
    family = family_of(denoiser)
    assert family is not None
    return family


def _autoencoder(channels: int) -> Any:
    """The autoencoder of all these models; with 4 latent channels it also has a pointwise convolution of the latents."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pointwise = {"use_quant_conv": channels == 4, "use_post_quant_conv": channels == 4}
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**sizes, **blocks, **pointwise).eval()


def _on_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_meta(part) for name, part in value.items()}
    return value.to("meta") if isinstance(value, Tensor) else value


def _count_flops(run: Callable[[], Any]) -> dict[str, float]:
    """TFLOPs by operator, from torch's FLOP counter."""
    from torch.utils.flop_counter import FlopCounterMode  # this import loads Triton, so it is not at the top

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), KnownResults(), counter:
        run()
    return {str(op): flops / 1e12 for op, flops in counter.get_flop_counts()["Global"].items()}


def _attention_flops(parts: dict[str, float]) -> float:
    """The TFLOPs of attention among those of `_count_flops`: fused attention and batched matrix products."""
    return sum(flops for op, flops in parts.items() if "bmm" in op or "attention" in op)
