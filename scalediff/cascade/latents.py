"""Convert between latents and pictures with a pipeline's autoencoder, pack and unpack latents, and resize them.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.pipeline import cascade_of, latent_size
from scalediff.families.packing import Form, arrange, restore


def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Decode latents `[B, C, Y, X]` to pictures `[B, 3, height, width]` in [-1, 1]."""
    mean, std = _latent_statistics(pipe, latents)
    latents = latents * std / _scale(pipe.vae) + mean
    with _upcast_vae(pipe.vae) as vae:
        if is_video_vae(vae):
            return vae.decode(latents[:, :, None].to(vae.dtype)).sample[:, :, 0]  # type: ignore[no-any-return]
        image: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return image


def decode_finite(pipe: Any, latents: Tensor) -> Tensor:
    """Decode the latents of a stage as `decode`.

    Raises:
        ValueError: They have values that are not finite: the denoiser overflowed.
    """
    if not latents.isfinite().all():
        raise ValueError(
            f"the latents of a stage must be finite, got NaN or infinity in {latents.dtype}: the denoiser overflows; "
            "use a smaller guidance scale, or bfloat16 or float32 in place of float16"
        )
    return decode(pipe, latents)


def encode(pipe: Any, image: Tensor) -> Tensor:
    """Encode pictures `[B, 3, height, width]` in [-1, 1] to latents `[B, C, Y, X]`, the mode (mean) of the posterior.

    The authors of ScaleDiff draw a sample of it.
    """
    with _upcast_vae(pipe.vae) as vae:
        frames = is_video_vae(vae)
        latents = encoded_mode(vae, (image[:, :, None] if frames else image).to(vae.dtype))
    return _normalised(pipe, latents[:, :, 0] if frames else latents)


def encoded_mode(vae: Any, picture: Tensor) -> Tensor:
    """The mode of the posterior of an autoencoder, or what it encodes without one."""
    encoded = vae.encode(picture)
    latents: Tensor = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return latents


def _normalised(pipe: Any, latents: Tensor) -> Tensor:
    """The autoencoder's latents `[B, C, Y, X]` as the denoiser takes them."""
    mean, std = _latent_statistics(pipe, latents)
    return latents.sub(mean).mul(_scale(pipe.vae)).div(std)


def is_video_vae(vae: Any) -> bool:
    """Whether this is a video autoencoder, which takes a picture as a single frame (Qwen-Image, Wan)."""
    return "temperal_downsample" in vae.config


def _scale(vae: Any) -> float:
    return float(vae.config.get("scaling_factor") or 1.0)


def pack(latents: Tensor) -> Tensor:
    """Pack latents `[B, C, Y, X]` to tokens `[B, Y X / 4, 4 C]`, as FLUX does: 2 x 2 latents of every channel in each token."""
    return arrange(latents, "tokens")


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `pack`, for a latent grid `(Y, X)`."""
    return restore(tokens, "tokens", size)


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents `[B, C, Y, X]` in the form that the pipeline takes."""
    cascade = cascade_of(pipe)
    return arrange(latents, cascade.input_form or cascade.form, cascade.patch)


def unpacked(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Latents `[B, C, Y, X]` from the form that the pipeline returns, or that its steps have; `size` is (height, width) in pixels."""
    cascade = cascade_of(pipe)
    if cascade.form == "tokens" and latents.ndim == 4:  # FLUX.2 Klein returns the latents of the autoencoder, not those of its steps
        return _normalised(pipe, latents)
    if not has_size(pipe, latents, latent_size(pipe, size), cascade.form):
        grid = "{} x {}".format(*latent_size(pipe, size))
        raise ValueError(f"{type(pipe).__name__} must return latents of {grid} as {cascade.form}, got {tuple(latents.shape)=}")
    return restore(latents, cascade.form, latent_size(pipe, size), cascade.patch)


def has_size(pipe: Any, latents: Tensor, grid: tuple[int, int], form: Form) -> bool:
    """Whether latents of a form have a latent grid `(Y, X)`."""
    patch = cascade_of(pipe).patch
    tokens = grid[0] // patch, grid[1] // patch
    if form == "tokens":
        return latents.ndim == 3 and latents.shape[1] == tokens[0] * tokens[1]
    return latents.ndim == 4 and tuple(latents.shape[-2:]) == (tokens if form == "patches" else grid)


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


def _latent_statistics(pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, `[1, C or 1, 1, 1]`, or like `like` `[B, C, Y, X]`, by which they are normalised.

    FLUX.2's autoencoder has a batch norm over 2 x 2 latents as channels: each of the four has its own mean and variance.
    """
    config, norm = pipe.vae.config, getattr(pipe.vae, "bn", None)
    if norm is not None:
        eps = cascade_of(pipe).batch_norm_eps
        variance = norm.running_var + (config.batch_norm_eps if eps is None else eps)
        return _tiled(norm.running_mean, like), _tiled(variance.sqrt(), like)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return mean, std


def _tiled(values: Tensor, like: Tensor) -> Tensor:
    """One value for each of 2 x 2 latents as channels, `[4 C]`, repeated over `like` `[B, C, Y, X]`."""
    height, width = like.shape[-2:]
    token = restore(values.to(like)[None, :, None, None], "patches", (2, 2))
    return token.repeat(1, 1, math.ceil(height / 2), math.ceil(width / 2))[..., :height, :width]


def to_pil_images(pipe: Any, decoded: Tensor) -> list[Any]:
    """Convert decoded pictures to PIL, and apply the pipeline's safety checker if it has one."""
    flagged = None
    if getattr(pipe, "safety_checker", None) is not None:
        decoded, flagged = pipe.run_safety_checker(decoded.clone(), decoded.device, decoded.dtype)  # it modifies its input
    denormalise = [not flag for flag in flagged] if flagged is not None else None
    pictures: list[Any] = pipe.image_processor.postprocess(decoded, output_type="pil", do_denormalize=denormalise)
    return pictures
