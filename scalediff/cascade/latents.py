"""Convert between latents and pictures with a pipeline's autoencoder, pack and unpack latents, and resize them.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.pipeline import cascade_of


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents `[B, C, Y, X]` to pictures `[B, 3, height, width]` in [-1, 1]."""
    mean, std = _latent_statistics(pipe.vae, latents)
    latents = latents * std / _scale(pipe.vae) + mean
    with _upcast_vae(pipe.vae) as vae:
        if _is_video_vae(vae):
            return vae.decode(latents[:, :, None].to(vae.dtype)).sample[:, :, 0]  # type: ignore[no-any-return]
        image: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return image


def encode(pipe: Any, image: Tensor) -> Tensor:
    """Encode pictures `[B, 3, height, width]` in [-1, 1] to latents `[B, C, Y, X]`, the mode (mean) of the posterior.

    The authors of ScaleDiff draw a sample of it.
    """
    with _upcast_vae(pipe.vae) as vae:
        frames = _is_video_vae(vae)
        latents: Tensor = vae.encode((image[:, :, None] if frames else image).to(vae.dtype)).latent_dist.mode()
    latents = latents[:, :, 0] if frames else latents
    mean, std = _latent_statistics(pipe.vae, latents)
    return latents.sub(mean).mul(_scale(pipe.vae)).div(std)


def _is_video_vae(vae: Any) -> bool:
    """Whether this is a video autoencoder, which takes a picture as a single frame (Qwen-Image)."""
    return type(vae).__name__ == "AutoencoderKLQwenImage"


def _scale(vae: Any) -> float:
    return float(vae.config.get("scaling_factor") or 1.0)


def pack(latents: Tensor) -> Tensor:
    """Pack latents `[B, C, Y, X]` to tokens `[B, Y X / 4, 4 C]`, as FLUX does: 2 x 2 latents of every channel in each token."""
    return rearrange(latents, "b c (y i) (x j) -> b (y x) (c i j)", i=2, j=2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`, for a latent grid `(Y, X)`."""
    return rearrange(tokens, "b (y x) (c i j) -> b c (y i) (x j)", y=size[0] // 2, x=size[1] // 2, i=2, j=2)


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents `[B, C, Y, X]` in the form that the pipeline takes."""
    return pack(latents) if cascade_of(pipe).packed else latents


def unpacked(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents `[B, C, Y, X]` from the form that the pipeline returns; `size` is (height, width) in pixels."""
    factor = pipe.vae_scale_factor
    return unpack(latents, (size[0] // factor, size[1] // factor)) if cascade_of(pipe).packed else latents


def upsampled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic upsampling of latents or pictures `[B, C, y, x]` to a size `(Y, X)`."""
    return F.interpolate(x, size=tuple(size), mode="bicubic", align_corners=False)


@contextmanager
def _upcast_vae(vae: Any) -> Iterator[Any]:
    """Run an fp16 autoencoder in fp32 if its config has `force_upcast`, as diffusers does, because it would overflow."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if upcast:
            vae.to(torch.float16)


def _latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents `[1, C or 1, 1, 1]`, from the autoencoder's config."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return mean, std


def to_pil_images(pipe: Any, decoded: Tensor) -> list[Any]:
    """Convert decoded pictures to PIL, and apply the pipeline's safety checker if it has one."""
    flagged = None
    if getattr(pipe, "safety_checker", None) is not None:
        decoded, flagged = pipe.run_safety_checker(decoded.clone(), decoded.device, decoded.dtype)  # it modifies its input
    denormalise = [not flag for flag in flagged] if flagged is not None else None
    pictures: list[Any] = pipe.image_processor.postprocess(decoded, output_type="pil", do_denormalize=denormalise)
    return pictures
