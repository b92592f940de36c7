"""Between the denoiser's latents and pictures, through a pipeline's own autoencoder.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from scalediff.cascade.pipeline import cascade_of


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """`[B, 3, height, width]` in [-1, 1]."""
    mean, std = _latent_statistics(pipe.vae, latents)
    latents = latents * std / _scale(pipe.vae) + mean
    with _upcast_vae(pipe.vae) as vae:
        if _is_video_vae(vae):
            return vae.decode(latents[:, :, None].to(vae.dtype)).sample[:, :, 0]  # type: ignore[no-any-return]
        image: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return image


def encode(pipe: Any, image: Tensor) -> Tensor:
    """`[B, C, Y, X]`, the mode of the posterior; the inverse of `decode` as far as the autoencoder goes."""
    with _upcast_vae(pipe.vae) as vae:
        frames = _is_video_vae(vae)
        latents: Tensor = vae.encode((image[:, :, None] if frames else image).to(vae.dtype)).latent_dist.mode()
    latents = latents[:, :, 0] if frames else latents
    mean, std = _latent_statistics(pipe.vae, latents)
    return latents.sub(mean).mul(_scale(pipe.vae)).div(std)


def _is_video_vae(vae: Any) -> bool:
    """Whether an autoencoder is one for videos, which Qwen-Image uses for a picture as a single frame."""
    return type(vae).__name__ == "AutoencoderKLQwenImage"


def _scale(vae: Any) -> float:
    return float(vae.config.get("scaling_factor") or 1.0)


def pack(latents: Tensor) -> Tensor:
    """`[B, C, Y, X]` as the tokens `[B, Y X / 4, 4 C]` of FLUX: a token holds, per channel, 2 x 2 latents row by row."""
    return rearrange(latents, "b c (y i) (x j) -> b (y x) (c i j)", i=2, j=2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack` for latents of a size `(Y, X)`."""
    return rearrange(tokens, "b (y x) (c i j) -> b c (y i) (x j)", y=size[0] // 2, x=size[1] // 2, i=2, j=2)


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """As the pipeline takes latents."""
    return pack(latents) if cascade_of(pipe).packed else latents


def unpacked(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, C, Y, X]` of what the pipeline hands out for a picture of a size in pixels."""
    factor = pipe.vae_scale_factor
    return unpack(latents, (size[0] // factor, size[1] // factor)) if cascade_of(pipe).packed else latents


@contextmanager
def _upcast_vae(vae: Any) -> Iterator[Any]:
    """diffusers' rule: an fp16 autoencoder whose config says `force_upcast` overflows, and runs in fp32."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if upcast:
            vae.to(torch.float16)


def _latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[1, C or 1, 1, 1]` that the autoencoder's config gives for its latents."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return mean, std


def to_pil_images(pipe: Any, decoded: Tensor) -> list[Any]:
    """PIL pictures, through the pipeline's safety checker where it has one."""
    flagged = None
    if getattr(pipe, "safety_checker", None) is not None:
        decoded, flagged = pipe.run_safety_checker(decoded.clone(), decoded.device, decoded.dtype)  # it blackens in place
    denormalise = [not flag for flag in flagged] if flagged is not None else None
    pictures: list[Any] = pipe.image_processor.postprocess(decoded, output_type="pil", do_denormalize=denormalise)
    return pictures
