"""Upsample, noise, denoise: a picture far above a model's native size, through the pipeline's own call.

    base stage at native size, the model's own attention
    for each stage (x2 until the target):
        Z_LU = bicubic(latent);  Z_RU = encode(bicubic(decode(latent)));  Z_ref = LFM(Z_RU, Z_LU)
        x = add_noise(Z_ref, restart);  denoise from there with NPA on and SG at every step

ScaleDiff, arXiv:2510.25818.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.borrowing import borrowed, guidance_in_halves, tiled
from scalediff.cascade.generators import fresh_generator, set_states, states_of
from scalediff.cascade.latents import decode, encode, packed, to_pil_images, unpacked
from scalediff.cascade.memory import images_per_call, needs_tiling, out_of_memory
from scalediff.cascade.pipeline import Sizes, call_pipeline, cascade_of, check_run, native_size
from scalediff.cascade.progress import Progress
from scalediff.cascade.schedule import Guidance, Watch, guided_scheduler, recording_scheduler, upsampled
from scalediff.cascade.stage import RunOptions, Stage
from scalediff.cascade.workdir import Saved
from scalediff.patching.handle import Handle
from scalediff.settings import PerStage, Settings
from scalediff_kernels import mix_frequencies

_LATENT = {"output_type": "latent", "return_dict": False}


@torch.no_grad()
def run(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: Sizes,
    settings: Settings,
    around: RunOptions,
    *,
    picture: Tensor | None = None,
    base: tuple[int, int] | None = None,
) -> Any:
    """All stages. With `around.on_stage` every one is decoded for it; without, the last call's own return value is returned.

    A picture, `[B, 3, height, width]` in [-1, 1], stands for the base stage, whose size `base` then is.
    """
    check_run(pipe, arguments, sizes, settings, restarts=len(sizes) - (picture is None))
    with borrowed(pipe, settings, around.vae_attention) as handle:
        return _Run(pipe, arguments, list(sizes), settings, around, handle, base or sizes[0]).all(picture)


class _Run:
    """A run under way, and what one stage hands to the next: `latents`, the picture `decoded` from them, and from the base stage what it
    asked of its scheduler and what it took for the clean latents on its way."""

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        sizes: list[tuple[int, int]],
        settings: Settings,
        around: RunOptions,
        handle: Handle | None,
        base: tuple[int, int],
    ) -> None:
        self.pipe, self.arguments, self.sizes, self.settings, self.around, self.handle, self.base = (
            pipe, arguments, sizes, settings, around, handle, base,
        )  # fmt: skip
        self.scheduler = pipe.scheduler
        self.latents = self.decoded = torch.empty(0)
        self.asked: Mapping[str, Any] = {}
        self.trajectory: list[Tensor] = []

    def all(self, picture: Tensor | None) -> Any:
        workdir, device = self.around.workdir, self.pipe._execution_device
        done = workdir.finished() if workdir is not None else []
        self.first = 1 if picture is None else 0  # stages without a restart
        if picture is not None:
            self.decoded = picture.to(device)
            with self._within(self.base, "the given picture"):
                self.latents = encode(self.pipe, self.decoded).to(self.pipe.dtype)
        if picture is not None or 0 < len(done) < len(self.sizes):
            self.asked = self._rehearsed()
        with self._progress() as self.progress:
            for index, size in enumerate(self.sizes, start=1):
                if index <= len(done):
                    self._take(index, done[index - 1])
                    continue
                what = f"stage {index}/{len(self.sizes)}"
                with self._within(size, what):
                    if index == len(self.sizes) and self.around.on_stage is None:
                        return self._called(index, size, {})
                    self._draw(index, size)
                    if getattr(self.pipe, "interrupt", False):  # diffusers' flag, set by a callback: this stage is the last
                        return None if self.around.on_stage is not None else self._as_it_is(size)
        return None

    def _draw(self, index: int, size: tuple[int, int]) -> None:
        """One stage, kept and told of."""
        since = time.perf_counter()
        self.latents = unpacked(self.pipe, self._called(index, size, _LATENT)[0], size)
        self.decoded = decode(self.pipe, self.latents)
        if self.around.on_stage is None:
            return
        images, seconds = to_pil_images(self.pipe, self.decoded), time.perf_counter() - since
        if self.around.workdir is not None and not getattr(self.pipe, "interrupt", False):
            states, in_tiles = states_of(self.arguments["generator"]), getattr(self.pipe.vae, "use_tiling", False)
            trajectory = self.trajectory if index == 1 else []
            self.around.workdir.save(index, Saved(self.latents, states, seconds, in_tiles, trajectory), images)
        self._tell(index, images, seconds)

    def _take(self, index: int, saved: Saved) -> None:
        """A stage that an earlier run has finished."""
        self.latents = saved.latents.to(self.pipe._execution_device)
        with self._within(self.sizes[index - 1], f"stage {index}/{len(self.sizes)}, kept", saved.in_tiles):
            self.decoded = decode(self.pipe, self.latents)
        if index == 1:
            self.trajectory = saved.trajectory
        set_states(self.arguments["generator"], saved.states)
        self.progress.skip(index)
        self._tell(index, to_pil_images(self.pipe, self.decoded), saved.seconds)

    def _tell(self, index: int, images: list[Any], seconds: float) -> None:
        if self.around.on_stage is not None:
            size, steps = self.sizes[index - 1], self._settings(index).stage_steps if index > self.first else self.settings.steps
            self.around.on_stage(Stage(index, len(self.sizes), *size, images, self.latents, steps, seconds, self.settings))

    def _called(self, index: int, size: tuple[int, int], output: Mapping[str, Any]) -> Any:
        """What the pipeline's call returns for a stage."""
        changes: dict[str, Any] = {"height": size[0], "width": size[1]}
        settings, restarts, pipe = self._settings(index), index > self.first, self.pipe
        unguided = None
        if restarts:
            changes |= self._restart(index, size, settings)
            if _one(settings.guidance_until) < 1:
                unguided = math.ceil(_one(settings.guidance_until) * len(pipe.scheduler.levels))
        elif len(self.sizes) > 1 or self.around.progress or self.around.on_step is not None:
            pipe.scheduler = recording_scheduler(self.scheduler, watch=self._watch(index))
        if self.handle is not None:
            self.handle.attention = settings.attention if restarts else "full"
            self.handle.restart_jitter()
        trained_size = cascade_of(pipe).trained_size
        if trained_size and restarts and settings.attention == "npa":
            setattr(pipe, trained_size, round(math.sqrt(size[0] * size[1])))
        if self.around.progress is not None:
            pipe.set_progress_bar_config(disable=True)
        self.progress.begin(index)
        with guidance_in_halves(pipe, unguided_from=unguided, split=self.around.split_guidance):
            result = call_pipeline(pipe, {**self.arguments, **changes, **output})
        if not restarts and len(self.sizes) > 1:
            self.asked = pipe.scheduler.asked
        return result

    def _restart(self, index: int, size: tuple[int, int], settings: Settings) -> dict[str, Any]:
        """Hand the pipeline this stage's guided scheduler, a tail of the schedule that the base stage asked for.

        Returns what the pipeline's call starts from.
        """
        from diffusers.utils.torch_utils import randn_tensor

        pipe, generator = self.pipe, self.arguments["generator"]
        reference = _reference(pipe, self.latents, self.decoded, size, settings)
        steps = settings.stage_steps
        start = settings.sg_cutoff_start
        calls = pipe.scheduler.order * (steps - 1) + 1
        guidance = Guidance(
            reference if settings.sg else None,
            _one(settings.sg_cutoff),
            start=None if start is None else _one(start),
            kind=settings.filter,
            trajectory=self.trajectory[-calls:] if settings.anchor == "trajectory" else None,
            packed=cascade_of(pipe).packed,
        )
        pipe.scheduler = guided_scheduler(
            self.scheduler, steps=settings.steps, kept=steps, guidance=guidance, asked=self.asked, watch=self._watch(index)
        )
        pipe.scheduler.set_timesteps(steps)
        level = pipe.scheduler.levels[0]
        noise = randn_tensor(reference.shape, generator=generator, device=reference.device, dtype=reference.dtype)
        changes = {"latents": packed(pipe, level.signal * reference + level.noise * noise), "num_inference_steps": steps}
        if settings.size_conditioning == "native":
            told = {name: native_size(pipe) for name in ("original_size", "target_size")}
            changes |= {name: size for name, size in told.items() if self.arguments.get(name) is None}
        return changes

    def _watch(self, index: int) -> Watch:
        """What sees the model calls of a stage."""
        keeps = index == 1 and self.first == 1 and self.settings.sg and self.settings.anchor == "trajectory"
        longest = max((self._calls(i) for i in range(2, len(self.sizes) + 1)), default=0)

        def watch(call: int, denoised: Callable[[], Tensor]) -> None:
            if keeps and call >= self._calls(1) - longest:
                self.trajectory.append(unpacked(self.pipe, denoised(), self.sizes[0]))
            self.progress.call(index, call, denoised)

        return watch

    def _calls(self, index: int) -> int:
        """Model calls of a stage: a solver of order two calls twice a step, but for the last."""
        steps = self.settings.steps if index <= self.first else self._settings(index).stage_steps
        return int(self.scheduler.order) * (steps - 1) + 1

    def _settings(self, index: int) -> Settings:
        """Those of a stage, with one number each; of the base stage, the run's."""
        above = len(self.sizes) - self.first
        return self.settings.of_stage(index - self.first, above) if index > self.first else self.settings

    @contextmanager
    def _within(self, size: tuple[int, int], what: str, in_tiles: bool | None = None) -> Iterator[None]:
        """Something of a size is drawn: the autoencoder in tiles if it is to be, and words where memory runs out."""
        tiles = self._tiles(size) if in_tiles is None else in_tiles
        with tiled(self.pipe.vae, on=tiles):
            now = {"tiled": getattr(self.pipe.vae, "use_tiling", False), "split": self.around.split_guidance}
            with out_of_memory(self.pipe, self.scheduler, self.arguments, size, what, **now):
                yield

    def _tiles(self, size: tuple[int, int]) -> bool | None:
        """Whether the autoencoder is to tile; None: as it does."""
        if self.around.vae_tiling is not None:
            return self.around.vae_tiling
        return needs_tiling(self.pipe, size, images_per_call(self.arguments)) or None

    def _progress(self) -> Progress:
        calls = [self._calls(i) for i in range(1, len(self.sizes) + 1)]
        return Progress(self.sizes, calls, bar=bool(self.around.progress), on_step=self.around.on_step, preview=self._preview)

    def _preview(self, index: int, denoised: Tensor) -> list[Any]:
        """Pictures of an estimate of the clean latents, no larger than the model's native size."""
        latents = unpacked(self.pipe, denoised, self.sizes[index - 1])
        shrunk = math.sqrt(math.prod(native_size(self.pipe)) / math.prod(self.sizes[index - 1]))
        if shrunk < 1:
            latents = F.interpolate(latents, scale_factor=shrunk, mode="area")
        return to_pil_images(self.pipe, decode(self.pipe, latents))

    def _rehearsed(self) -> Mapping[str, Any]:
        """What the pipeline would ask of its scheduler for a picture of the base size: its call, with a schedule of no steps."""
        self.pipe.scheduler = recording_scheduler(self.scheduler, runs=False)
        if self.around.progress is not None:
            self.pipe.set_progress_bar_config(disable=True)
        changes = {"height": self.base[0], "width": self.base[1], "generator": fresh_generator()}
        call_pipeline(self.pipe, {**self.arguments, **changes, **_LATENT})
        asked: Mapping[str, Any] = self.pipe.scheduler.asked
        self.pipe.scheduler = self.scheduler
        return asked

    def _as_it_is(self, size: tuple[int, int]) -> Any:
        """The pipeline's own return value for the latents of now: its call, with a schedule of no steps."""
        self.pipe.scheduler = guided_scheduler(self.scheduler, steps=1, kept=0, guidance=Guidance(None, 1.0))
        changes = {"height": size[0], "width": size[1], "latents": packed(self.pipe, self.latents), "num_inference_steps": 1}
        return call_pipeline(self.pipe, {**self.arguments, **changes})


def _one(value: PerStage) -> float:
    """A number that is chosen for a stage."""
    assert isinstance(value, float | int)
    return value


def _reference(pipe: Any, latents: Tensor, decoded: Tensor, size: tuple[int, int], settings: Settings) -> Tensor:
    """The stage's clean reference `[B, C, Y, X]`: upsampled in RGB, its low band replaced by the latent's own."""
    z_ru = encode(pipe, upsampled(decoded, size)).to(latents.dtype)
    if not z_ru.isfinite().all():
        raise ValueError(f"the autoencoder overflows in {pipe.vae.dtype}: load the pipeline in bfloat16 or float32")
    if not settings.lfm:
        return z_ru
    z_lu = upsampled(latents, z_ru.shape[-2:])
    return mix_frequencies(z_ru, z_lu, cutoff=_one(settings.lfm_cutoff), kind=settings.filter)
