"""How much work a run is, stage by stage, for models at their true size: counted on the meta device, without weights.

Counted are the matrix products and convolutions of the denoiser and the autoencoder as torch runs them, 2 FLOPs a multiply-add;
text encoders, filters and everything element by element are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.families import family_of
from scalediff.hooks import patch_model
from scalediff.settings import Attention, Settings, plan_sizes

_FACTOR = 8  # pixels of a latent, in all of them


@dataclass(frozen=True)
class Work:
    """TFLOPs of one stage.

    Attributes:
        height, width: Pixels.
        steps: Denoising steps.
        passes: Forward passes of the denoiser, guidance included.
        attention, linear, convolution: Of all passes.
        vae: Decoding the stage, and encoding what the next one starts from.
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
        return self.attention + self.linear + self.convolution + self.vae


@dataclass(frozen=True)
class _Model:
    """How to build a model on the meta device, and what its forward pass and autoencoder take."""

    denoiser: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    channels: int
    tokens: int  # pixels of the finest token
    guided: bool  # guidance is a second pass


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
    """The transformer of black-forest-labs/FLUX.1-dev, which is what its class defaults to."""
    import diffusers

    transformer: nn.Module = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    return transformer


def _flux_inputs(y: int, x: int) -> dict[str, Any]:
    ids = torch.zeros(y // 2, x // 2, 3, device="cpu")  # read, so not on the meta device
    ids[..., 1] += torch.arange(y // 2, device="cpu")[:, None]
    ids[..., 2] += torch.arange(x // 2, device="cpu")[None, :]
    return {
        "hidden_states": torch.empty(1, y * x // 4, 64), "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768), "timestep": torch.empty(1), "guidance": torch.empty(1),
        "img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(512, 3, device="cpu"),
    }  # fmt: skip


MODELS: Mapping[str, _Model] = {
    "sdxl": _Model(_sdxl, _sdxl_inputs, channels=4, tokens=8, guided=True),
    "flux": _Model(_flux, _flux_inputs, channels=16, tokens=16, guided=False),
}


def count(name: str, size: tuple[int, int], *, attention: Attention = "npa") -> tuple[Settings, list[Work]]:
    """The work of every stage of a run with the family's preset.

    Args:
        name: `"sdxl"` or `"flux"`.
        size: Target (height, width) in pixels.
        attention: Of the stages above the native size.

    Raises:
        ValueError: another model, or a size that it cannot draw.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    with torch.device("meta"):
        denoiser, vae = model.denoiser().eval(), _autoencoder(model.channels)
    family = family_of(denoiser)
    assert family is not None
    assert family.cascade is not None
    settings = family.cascade.presets(denoiser)["default"].settings
    native = family.native_grid(denoiser)
    assert native is not None
    sizes = plan_sizes(size, native=(native[0] * model.tokens, native[1] * model.tokens), multiple=model.tokens)
    rows = []
    for index, (height, width) in enumerate(sizes):
        steps = settings.steps if index == 0 else settings.stage_steps
        passes = steps * (2 if model.guided and settings.guidance_scale > 1 else 1)
        one = _forward(denoiser, model.inputs(height // _FACTOR, width // _FACTOR), windows=attention == "npa")
        attended, linear, convolution = (passes * part for part in one)
        after = sizes[index + 1] if index + 1 < len(sizes) else None
        coded = _decode_encode(vae, model, (height, width), after)
        rows.append(Work(height, width, steps, passes, attended, linear, convolution, coded))
    return settings, rows


def _forward(denoiser: nn.Module, inputs: dict[str, Any], *, windows: bool) -> tuple[float, float, float]:
    """TFLOPs of one pass: attention, linear layers, convolutions."""
    with patch_model(denoiser) as handle:
        handle.attention = "npa" if windows else "full"
        parts = _counted(lambda: denoiser(**_on_meta(inputs)))
    products = sum(flops for op, flops in parts.items() if "bmm" in op or "attention" in op)
    convolutions = sum(flops for op, flops in parts.items() if "conv" in op)
    return products, sum(parts.values()) - products - convolutions, convolutions


def _decode_encode(vae: Any, model: _Model, size: tuple[int, int], after: tuple[int, int] | None) -> float:
    latents = torch.empty(1, model.channels, size[0] // _FACTOR, size[1] // _FACTOR, device="meta")
    total = sum(_counted(lambda: vae.decode(latents)).values())
    if after is not None:
        total += sum(_counted(lambda: vae.encode(torch.empty(1, 3, *after, device="meta"))).values())
    return total


def _autoencoder(channels: int) -> Any:
    """The autoencoder of both, but for the channels of its latents."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels, **blocks).eval()


def _on_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    def moved(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: moved(part, key) for key, part in value.items()}
        return value.to("meta") if (isinstance(value, Tensor) and not name.endswith("_ids")) or name == "time_ids" else value

    return {name: moved(value, name) for name, value in inputs.items()}


def _counted(run: Callable[[], Any]) -> dict[str, float]:
    """TFLOPs by operator."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return {str(op): flops / 1e12 for op, flops in counter.get_flop_counts()["Global"].items()}
