"""A stage above the native size: make its reference, add noise to it, and give the pipeline the guided scheduler.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from scalediff.cascade.keeping import Given, entering_scheduler, kept_of, masked, start_arguments
from scalediff.cascade.latents import encode, packed
from scalediff.cascade.pictures import upsampled
from scalediff.cascade.pipeline import cascade_of, native_size
from scalediff.cascade.schedule import Guidance, Watch, guided_scheduler, model_calls
from scalediff.cascade.upsampling import Upsampler, upsampled_picture
from scalediff.settings import PerStage, Settings
from scalediff_kernels import mix_frequencies


def scalar(value: PerStage) -> float:
    """A per-stage setting after `Settings.of_stage`, which leaves a single number."""
    assert isinstance(value, float | int)
    return value


def make_reference(
    pipe: Any, latents: Tensor, decoded: Tensor, size: tuple[int, int], settings: Settings, upsampler: Upsampler | None = None
) -> Tensor:
    """The clean reference of a stage `[B, C, Y, X]`: upsampled in RGB, with the low frequencies of the upsampled latents."""
    wrap = settings.wrap or (False, False)
    z_ru = encode_finite(pipe, upsampled_picture(decoded, size, upsampler, wrap=wrap)).to(latents.dtype)
    if not settings.lfm:
        return z_ru
    z_lu = upsampled(latents, z_ru.shape[-2:], wrap=wrap)
    return mix_frequencies(z_ru, z_lu, cutoff=scalar(settings.lfm_cutoff), kind=settings.filter, wrap=wrap)


def encode_finite(pipe: Any, picture: Tensor) -> Tensor:
    """Encode pictures as `encode`.

    Raises:
        ValueError: The autoencoder overflows.
    """
    latents = encode(pipe, picture)
    if not latents.isfinite().all():
        raise ValueError(f"the autoencoder overflows in {pipe.vae.dtype}: load the pipeline in bfloat16 or float32")
    return latents


def add_noise(scheduler: Any, reference: Tensor, generator: Any) -> Tensor:
    """Add noise to the reference, at the noise level of the guided scheduler's first step."""
    return _noised(scheduler, reference, draw_noise(reference, generator))


def draw_noise(like: Tensor, generator: Any) -> Tensor:
    """Normal noise of the shape, device and dtype of a tensor."""
    from diffusers.utils.torch_utils import randn_tensor

    noise: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise


def _noised(scheduler: Any, reference: Tensor, noise: Tensor) -> Tensor:
    level = scheduler.levels[0]
    return level.signal * reference + level.noise * noise  # type: ignore[no-any-return]


def prepare_stage(
    pipe: Any,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    settings: Settings,
    *,
    latents: Tensor,
    decoded: Tensor,
    trajectory: Sequence[Tensor],
    base_schedule_arguments: Mapping[str, Any],
    watch: Watch,
    upsampler: Upsampler | None = None,
    given: Given | None = None,
) -> dict[str, Any]:
    """Prepare a stage above the native size: replace the pipeline's scheduler by a guided one, and add noise to the reference.

    Args:
        pipe: The pipeline, with its own scheduler.
        arguments: Arguments of the pipeline's call.
        size: (height, width) of the stage in pixels.
        settings: Settings of the stage, from `Settings.of_stage`.
        latents: `[B, C, y, x]`, of the previous stage.
        decoded: `[B, 3, height, width]` in [-1, 1], the picture of the previous stage.
        trajectory: Predictions of the clean latents in the base stage; used if `settings.anchor` is `"trajectory"`.
        base_schedule_arguments: Arguments of `set_timesteps` in the base stage.
        watch: Called after every model call of the stage.
        upsampler: Function that enlarges the picture; bicubic when None.
        given: The picture that the run started from, if any; the stage keeps what is outside its mask.

    Returns:
        The arguments of the pipeline's call that differ from `arguments`.
    """
    wrap = settings.wrap or (False, False)
    kept = kept_of(pipe, given, size, upsampler, wrap=wrap) if given is not None else None
    reference = masked(kept, make_reference(pipe, latents, decoded, size, settings, upsampler))
    steps, start = settings.stage_steps, settings.sg_cutoff_start
    calls = model_calls(pipe.scheduler, steps)
    guidance = Guidance(
        reference if settings.sg else None,
        scalar(settings.sg_cutoff),
        start=None if start is None else scalar(start),
        kind=settings.filter,
        trajectory=trajectory[-calls:] if settings.anchor == "trajectory" else None,
        form=cascade_of(pipe).form,
        patch=cascade_of(pipe).patch,
        wrap=wrap,
    )
    pipe.scheduler = guided_scheduler(
        pipe.scheduler,
        steps=settings.steps,
        last_steps=steps,
        guidance=guidance,
        base_schedule_arguments=base_schedule_arguments,
        watch=watch,
    )
    pipe.scheduler.set_timesteps(steps)
    noise = draw_noise(reference, arguments["generator"])
    noised = _noised(pipe.scheduler, reference, noise)
    if given is not None:
        pipe.scheduler = entering_scheduler(pipe, pipe.scheduler, start=noised, noise=noise, kept=kept)
    changes = {**start_arguments(pipe, noised, packed(pipe, noised)), "num_inference_steps": steps}
    if settings.size_conditioning == "native":
        native = {name: native_size(pipe) for name in ("original_size", "target_size")}
        changes |= {name: size for name, size in native.items() if arguments.get(name) is None}
    return changes
