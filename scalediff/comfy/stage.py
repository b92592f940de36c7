"""Sampling in ComfyUI: the base picture, and a stage above the native size from the latents of a finished picture.

Legend: B batch, C channels, Y x X latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.pictures import picture_at, upsampled
from scalediff.families.grid import Grid
from scalediff.settings import Settings
from scalediff_kernels import guide_structure, mix_frequencies

Callback = Callable[[int, Tensor, Tensor, int], None]  # step, denoised, x, steps


@dataclass(frozen=True)
class Sampling:
    """What ComfyUI's samplers need beside a model and latents.

    Attributes:
        steps: Steps of the whole schedule.
        cfg: Scale of classifier-free guidance.
        sampler_name, scheduler: Names of ComfyUI's sampler and of its schedule of noise levels.
        positive, negative: Conditioning.
        seed: Seed of the noise.
    """

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    positive: Any
    negative: Any
    seed: int

    def sigmas(self, model: Any) -> Tensor:
        """The noise levels of the whole schedule, the last one zero."""
        import comfy.samplers

        sampler = comfy.samplers.KSampler(
            model, steps=self.steps, device=model.load_device, sampler=self.sampler_name, scheduler=self.scheduler, denoise=1.0,
            model_options=model.model_options,
        )  # fmt: skip
        sigmas: Tensor = sampler.sigmas
        return sigmas

    def run(self, model: Any, latent: Mapping[str, Any], *, start: int, callback: Callback) -> Tensor:
        """Add noise to the `samples` of a latent at a step of the schedule, and denoise them from there to the end.

        As ComfyUI's own sampler nodes do, it keeps to the latent's `noise_mask` and `batch_index`, if there are any. Of latents with an
        axis for frames, ComfyUI would take several masks for those of the frames, so it gets them in the latents' shape.
        """
        import comfy.sample
        import comfy.utils

        samples, mask = latent["samples"], latent.get("noise_mask")
        noise = comfy.sample.prepare_noise(samples, self.seed, latent.get("batch_index"))
        sampled: Tensor = comfy.sample.sample(
            model, noise, self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive, self.negative, samples, denoise=1.0,
            start_step=start, force_full_denoise=True, noise_mask=None if mask is None else mask_at(mask, samples), callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=self.seed,
        )  # fmt: skip
        return sampled


class Progress:
    """ComfyUI's progress bar over several runs of a sampler, with previews of the picture.

    Args:
        model: The model.
        total: Steps of all runs.
    """

    def __init__(self, model: Any, total: int) -> None:
        import comfy.utils
        import latent_preview

        self._bar, self._total, self._done = comfy.utils.ProgressBar(total), total, 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))

    def run(self, steps: int) -> Callback:
        """The callback of the next run."""
        before = self._done
        self._done += steps

        def callback(step: int, denoised: Tensor, x: Tensor, steps_of_run: int) -> None:
            preview = None
            if self._previewer is not None:
                preview = self._previewer.decode_latent_to_preview_image("JPEG", denoised)
            self._bar.update_absolute(before + step + 1, self._total, preview)

        return callback


def stage_steps(sigmas: Tensor, settings: Settings) -> int:
    """Number of steps that a stage runs by its `restart`, the last ones of the schedule; at least one.

    ComfyUI's `denoise` is something else: it lays out a longer schedule and runs its last steps, at other noise levels.
    """
    return max(1, round((len(sigmas) - 1) * _number(settings.restart)))


def run_stage(
    model: Any,
    vae: Any,
    latent: Mapping[str, Any],
    size: Grid,
    settings: Settings,
    sampling: Sampling,
    *,
    callback: Callback,
    picture: Tensor | None = None,
) -> dict[str, Any]:
    """One stage above the native size.

    Args:
        model: ComfyUI's `ModelPatcher`; not changed.
        vae: ComfyUI's `VAE`.
        latent: ComfyUI's latent of a finished picture: `samples` of `[B, C, y, x]` or `[B, C, 1, y, x]`, and what belongs to them. The
            sampler keeps the reference where a `noise_mask` is zero.
        size: `(Y, X)` of the stage in latents.
        settings: `restart` and the switches of latent frequency mixing and structure guidance; the others are not used.
        sampling: Sampler, conditioning and seed.
        callback: Called after every step.
        picture: `[B, height, width, 3]` in [0, 1], which the reference is where the latent's `noise_mask` is zero; None leaves it as it is.

    Returns:
        The latent of the larger picture, with the axes of the autoencoder's latents.

    Raises:
        ValueError: The autoencoder overflows or has another number of pixels per latent than it says; the latents have neither one mask
            nor one each, or the picture is neither one nor one each.
        NotImplementedError: The model's noise is of a kind that structure guidance does not support.

    ScaleDiff, arXiv:2510.25818.
    """
    reference = make_reference(vae, latent["samples"], size, settings)
    if picture is not None:
        mask = mask_at(latent["noise_mask"], reference)
        reference = mask * reference + (1 - mask) * encoded_at(vae, picture, size, len(reference)).to(reference)
    sigmas = sampling.sigmas(model)
    start = len(sigmas) - 1 - stage_steps(sigmas, settings)
    if settings.sg:
        model = guided(model, reference, settings, restart=float(sigmas[start]))
    return {**latent, "samples": sampling.run(model, {**latent, "samples": reference}, start=start, callback=callback)}


def make_reference(vae: Any, latents: Tensor, size: Grid, settings: Settings) -> Tensor:
    """The clean reference of a stage: upsampled in RGB, with the low frequencies of the upsampled latents."""
    picture: Tensor = vae.decode(latents)
    picture = picture.flatten(0, -4).movedim(-1, 1)  # a video autoencoder returns [B, 1, height, width, 3]
    ratio = vae.spacial_compression_decode()
    enlarged = upsampled(picture, (size[0] * ratio, size[1] * ratio))
    z_ru = _encoded(vae, enlarged, size)
    if not settings.lfm:
        return z_ru
    z_lu = upsampled(as_picture(latents).to(z_ru), size)
    mixed = mix_frequencies(as_picture(z_ru), z_lu, cutoff=_number(settings.lfm_cutoff), kind=settings.filter)
    return mixed.reshape(z_ru.shape)


def encoded_at(vae: Any, picture: Tensor, size: Grid, count: int) -> Tensor:
    """Latents of a size `(Y, X)` of `count` pictures, from ComfyUI's pictures `[B, height, width, 3]` in [0, 1].

    Raises:
        ValueError: There are neither one nor `count` pictures; as `run_stage`.
    """
    if len(picture) not in (1, count):
        raise ValueError(f"the picture must be one, or one for each of the {count} latents, got {len(picture)}")
    ratio = vae.spacial_compression_decode()
    resized = picture_at(picture[..., :3].movedim(-1, 1), (size[0] * ratio, size[1] * ratio)).clamp(0, 1)
    latents = _encoded(vae, resized, size)
    return latents.expand(count, *latents.shape[1:])


def _encoded(vae: Any, picture: Tensor, size: Grid) -> Tensor:
    """Latents of pictures `[B, 3, height, width]` in [0, 1], one at a time: a video autoencoder takes a batch for the frames of one."""
    latents = torch.cat([vae.encode(one[None, ..., :3]) for one in picture.movedim(1, -1)])
    if tuple(latents.shape[-2:]) != size:
        ratio, found = vae.spacial_compression_decode(), tuple(latents.shape[-2:])
        raise ValueError(f"the VAE does not fit the model: it must have {ratio} pixels per latent, got {found} for {size}")
    if not latents.isfinite().all():
        raise ValueError("the VAE overflows in 16 bit: start ComfyUI with --fp32-vae or --bf16-vae")
    return latents


def as_noise_mask(mask: Tensor) -> Tensor:
    """ComfyUI's mask `[B, height, width]` in the form in which latents have it, `[B, 1, height, width]`."""
    return mask.reshape(-1, 1, *mask.shape[-2:])


def mask_at(noise_mask: Tensor, latents: Tensor) -> Tensor:
    """The mask of a latent, one for each of other latents and at their size, with their number of axes; resized as ComfyUI does it.

    Raises:
        ValueError: There are neither one mask nor as many as latents.
    """
    masks, count = as_noise_mask(noise_mask), len(latents)
    if len(masks) not in (1, count):
        raise ValueError(f"the mask must be one, or one for each of the {count} latents, got {len(masks)}")
    resized = F.interpolate(masks.to(latents), size=latents.shape[-2:], mode="bilinear").expand(count, -1, -1, -1)
    return resized.unsqueeze(2) if latents.ndim == 5 else resized


def guided(model: Any, reference: Tensor, settings: Settings, *, restart: float) -> Any:
    """Clone a model with structure guidance: a function that ComfyUI calls with every estimate of the clean picture.

    Args:
        model: ComfyUI's `ModelPatcher`.
        reference: Latents of the stage, as nodes pass them. The estimates are scaled as the model's own latents.
        settings: `sg_cutoff` and `filter` are used.
        restart: Noise level at which the stage starts.

    Raises:
        NotImplementedError: The model's noise is of an unknown kind.

    ScaleDiff, arXiv:2510.25818: gamma_t = (1 - abar_t) / (1 - abar_restart); gamma_t = sigma_t of a flow.
    """
    clone, target = model.clone(), as_picture(model.model.process_latent_in(reference))
    strength = _strength(model.get_model_object("model_sampling"), restart)
    cutoff, kept = _number(settings.sg_cutoff), dict[tuple[torch.device, torch.dtype], Tensor]()

    def guide(args: Mapping[str, Any]) -> Tensor:
        denoised: Tensor = args["denoised"]
        x0 = as_picture(denoised)
        key = x0.device, x0.dtype
        if key not in kept:
            kept[key] = target.to(x0)
        gamma = strength(float(args["sigma"].max()))
        return guide_structure(x0, kept[key].expand_as(x0), gamma=gamma, cutoff=cutoff, kind=settings.filter).reshape(denoised.shape)

    clone.set_model_sampler_post_cfg_function(guide)
    return clone


def as_picture(latents: Tensor) -> Tensor:
    """Latents `[B, C, Y, X]`, also from those of a video autoencoder, which have an axis for a single frame.

    Raises:
        NotImplementedError: There are several frames.
    """
    if latents.ndim == 5:
        if latents.shape[2] != 1:
            raise NotImplementedError(f"ScaleDiff draws pictures, not videos: latents must have one frame, got {tuple(latents.shape)}")
        return latents.squeeze(2)
    return latents


def _strength(model_sampling: Any, restart: float) -> Callable[[float], float]:
    """gamma of a noise level, by the kind of the model's noise: x = (1 - sigma) x0 + sigma eps, or x = x0 + sigma eps."""
    kinds = {cls.__name__ for cls in type(model_sampling).__mro__}
    if "CONST" in kinds:
        return lambda sigma: sigma
    if "EPS" in kinds and "IMG_TO_IMG" not in kinds:  # ComfyUI derives all others from EPS

        def noise(sigma: float) -> float:
            return sigma**2 / (1 + sigma**2)  # 1 - abar

        return lambda sigma: noise(sigma) / noise(restart)
    raise NotImplementedError(
        f"structure guidance supports models with the noise of diffusion or of a flow, got {type(model_sampling).__qualname__} "
        f"with {', '.join(sorted(kinds - {'object', 'Module'}))}"
    )


def _number(value: Any) -> float:
    """A setting that is a single number here: every stage has settings of its own."""
    assert isinstance(value, float | int)
    return float(value)
