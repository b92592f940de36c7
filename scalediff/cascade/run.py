"""The cascade: upsample, add noise, denoise, stage by stage, each stage by one call of the pipeline.

    base stage at native size, with full attention
    for each stage (x2 until the target):
        Z_LU = bicubic(latent);  Z_RU = encode(bicubic(decode(latent)));  Z_ref = LFM(Z_RU, Z_LU)
        x = add_noise(Z_ref, restart);  denoise from there with NPA, and SG at every step

ScaleDiff, arXiv:2510.25818.

Legend: B batch, C channels, Y x X latent grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.borrowing import borrowed, guidance_in_halves, is_tiled, tiled
from scalediff.cascade.caches import caches_of_stage, check_caches
from scalediff.cascade.checks import check_run
from scalediff.cascade.fitting import check_possible
from scalediff.cascade.generators import fresh_generator, set_states, states_of
from scalediff.cascade.keeping import Given, ScheduleSet, resting_scheduler, start_arguments, stopping_scheduler, strength_steps
from scalediff.cascade.latents import decode, decode_finite, encode, packed, to_pil_images, unpacked
from scalediff.cascade.memory import images_per_call, joined_sizes, needs_tiling, out_of_memory
from scalediff.cascade.pictures import picture_at
from scalediff.cascade.pipeline import Sizes, call_stage, cascade_of, native_size, wrap_of
from scalediff.cascade.progress import Progress
from scalediff.cascade.ranks import check_stages, largest_of_ranks
from scalediff.cascade.results import RunOptions, Stage
from scalediff.cascade.schedule import Guidance, Watch, guided_scheduler, model_calls, recording_scheduler
from scalediff.cascade.splitting import AutoencoderSplit, split_autoencoder
from scalediff.cascade.stage import prepare_stage, scalar
from scalediff.cascade.workdir import SavedStage
from scalediff.patching.handle import Handle
from scalediff.patching.networks import changes_picture
from scalediff.settings import Settings

_SCHEDULE = ("timesteps", "sigmas")  # a custom schedule is that of the base stage; stages above run its last steps
_LATENT = {"output_type": "latent", "return_dict": False}


@torch.no_grad()
def run(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: Sizes,
    settings: Settings,
    options: RunOptions,
    *,
    given: Given | None = None,
) -> Any:
    """Run all stages.

    Args:
        pipe: The pipeline; its state is restored afterwards.
        arguments: Arguments of the pipeline's call.
        sizes: (height, width) of every stage in pixels.
        settings: Settings of the method.
        options: Options of the run. With `on_stage`, every stage is decoded and passed to it.
        given: The picture to start from, if any; without a strength it replaces the base stage.

    Returns:
        The return value of the pipeline's last call, or None with `on_stage`.
    """
    if any(wrap := wrap_of(pipe, settings)):
        settings = replace(settings, wrap=wrap)
    restarts = len(sizes) - (given is None or given.strength is not None)
    check_run(pipe, arguments, sizes, settings, restarts=restarts)
    check_possible(pipe, arguments, sizes[-1])
    with (
        borrowed(pipe, settings, options.vae_attention, mesh=options.mesh) as handle,
        _split_autoencoder(pipe, handle, sizes, settings, options) as split,
    ):
        if handle is not None:
            check_stages(pipe, handle, sizes, settings, restarts=restarts)
        jitter, calls = handle.jitter if handle is not None else "none", model_calls(pipe.scheduler, settings.steps)
        late = restarts + (given is not None and strength_steps(pipe, settings.steps, given.strength) < settings.steps)
        check_caches(pipe, settings, calls=calls, late=late, jitter=jitter, split_guidance=options.split_guidance)
        return _Run(pipe, arguments, list(sizes), settings, options, handle, given, split).run_stages()


@contextmanager
def _split_autoencoder(
    pipe: Any, handle: Handle | None, sizes: Sizes, settings: Settings, options: RunOptions
) -> Iterator[AutoencoderSplit | None]:
    """Split the autoencoder over the ranks over which the denoiser is split, if it is; errors as in `split_autoencoder`.

    Ranks with other stages would wait for each other in different places, so stages and settings are compared here too.
    """
    if handle is None or not handle.groups:
        yield None
        return
    same = {"sizes": list(sizes), **asdict(settings)}
    same |= {name: getattr(options, name) for name in ("vae_tiling", "vae_attention", "split_guidance")}
    with split_autoencoder(pipe.vae, handle.groups, native_size(pipe), same) as split:
        yield split


class _Run:
    """The state of a run.

    One stage passes to the next its `latents` and the picture `decoded` from them. The base stage also passes the arguments of its
    `set_timesteps` and, if later stages are guided by it, its predictions of the clean latents (`trajectory`).
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        sizes: list[tuple[int, int]],
        settings: Settings,
        options: RunOptions,
        handle: Handle | None,
        given: Given | None,
        split: AutoencoderSplit | None,
    ) -> None:
        self.pipe, self.arguments, self.sizes, self.settings, self.options, self.handle, self.given, self.split = (
            pipe, arguments, sizes, settings, options, handle, given, split,
        )  # fmt: skip
        self.base = sizes[0] if given is None else given.base
        self.base_steps = settings.steps if given is None else strength_steps(pipe, settings.steps, given.strength)
        self.first = 0 if given is not None and given.strength is None else 1  # stages without a restart
        self.scheduler = pipe.scheduler
        self.latents = self.decoded = torch.empty(0)
        self.base_schedule_arguments: Mapping[str, Any] = {}
        self.trajectory: list[Tensor] = []

    def run_stages(self) -> Any:
        """Run the stages that the workdir does not have; returns as `run`."""
        workdir = self.options.workdir
        done = workdir.finished() if workdir is not None else []
        if self.given is not None and not self.first:
            self._enter_picture(self.given.picture)
        if not self.first or 0 < len(done) < len(self.sizes):
            self.base_schedule_arguments = self._record_base_schedule()
        with self._progress() as self.progress:
            for index, size in enumerate(self.sizes, start=1):
                if index <= len(done):
                    self._resume_stage(index, done[index - 1])
                    continue
                with self._stage_context(size, f"stage {index}/{len(self.sizes)}"):
                    if index == len(self.sizes) and self.options.on_stage is None:
                        return self._call_pipeline(index, size, {})
                    self._run_stage(index, size)
                    if getattr(self.pipe, "interrupt", False):  # diffusers' flag, set by a callback: this stage is the last
                        return None if self.options.on_stage is not None else self._output_of_latents(size)
        return None

    def _enter_picture(self, picture: Tensor) -> None:
        """Put the given picture in place of the base stage, shrunk to the first stage if it is larger."""
        first = self.sizes[0]
        fits = picture.shape[-2] <= first[0] and picture.shape[-1] <= first[1]
        fitting = picture if fits else picture_at(picture, first, wrap=wrap_of(self.pipe, self.settings))
        self.decoded = fitting.to(self.pipe._execution_device)
        with self._stage_context((self.decoded.shape[-2], self.decoded.shape[-1]), "encoding the picture"):
            self.latents = encode(self.pipe, self.decoded).to(self.pipe.dtype)

    def _run_stage(self, index: int, size: tuple[int, int]) -> None:
        """Run one stage, save it in the workdir and report it."""
        since = time.perf_counter()
        self.latents = unpacked(self.pipe, self._call_pipeline(index, size, _LATENT)[0], size)
        self.decoded = decode_finite(self.pipe, self.latents)
        if self.options.on_stage is None:
            return
        images, seconds = to_pil_images(self.pipe, self.decoded), time.perf_counter() - since
        if self.options.workdir is not None and not getattr(self.pipe, "interrupt", False):
            states, in_tiles = states_of(self.arguments["generator"]), is_tiled(self.pipe.vae)
            trajectory = self.trajectory if index == 1 else []
            self.options.workdir.save(index, SavedStage(self.latents, states, seconds, in_tiles, trajectory), images)
        self._report_stage(index, images, seconds)

    def _resume_stage(self, index: int, saved: SavedStage) -> None:
        """Load a stage that an earlier run has finished."""
        self.latents = saved.latents.to(self.pipe._execution_device)
        with self._stage_context(self.sizes[index - 1], f"decoding saved stage {index}/{len(self.sizes)}", saved.in_tiles):
            self.decoded = decode(self.pipe, self.latents)
        if index == 1:
            self.trajectory = saved.trajectory
        set_states(self.arguments["generator"], saved.states)
        self.progress.skip(index)
        self._report_stage(index, to_pil_images(self.pipe, self.decoded), saved.seconds)

    def _report_stage(self, index: int, images: list[Any], seconds: float) -> None:
        if self.options.on_stage is not None:
            size, steps = self.sizes[index - 1], self._steps(index)
            self.options.on_stage(Stage(index, len(self.sizes), *size, images, self.latents, steps, seconds, self.settings))

    def _call_pipeline(self, index: int, size: tuple[int, int], output: Mapping[str, Any]) -> Any:
        """Call the pipeline for a stage and return its output."""
        settings, restarts, pipe = self._settings(index), index > self.first, self.pipe
        changes: dict[str, Any] = {}
        unguided = None
        if restarts:
            pipe.scheduler = self.scheduler  # the stage before left its guided one
            changes = self._without_schedule() | prepare_stage(
                pipe,
                self.arguments,
                size,
                settings,
                latents=self.latents,
                decoded=self.decoded,
                trajectory=self.trajectory,
                base_schedule_arguments=self.base_schedule_arguments,
                watch=self._watch(index),
                upsampler=self.options.upsampler,
                given=self.given,
            )
            if scalar(settings.guidance_until) < 1:
                unguided = math.ceil(scalar(settings.guidance_until) * len(pipe.scheduler.levels))
        elif len(self.sizes) > 1 or self.options.progress or self.options.on_step is not None:
            skipped = int(self.scheduler.order) * (self.settings.steps - self.base_steps)
            pipe.scheduler = recording_scheduler(self.scheduler, watch=self._watch(index), skipped=skipped)
        if not restarts and self.given is not None:
            changes = {"strength": self.given.strength}
        if self.handle is not None:
            self.handle.attention = settings.attention if restarts else "full"
            self.handle.restart_jitter()
        trained_size = cascade_of(pipe).trained_size
        if trained_size and restarts and settings.attention == "npa":
            setattr(pipe, trained_size, round(math.sqrt(size[0] * size[1])))
        if self.options.progress is not None:
            pipe.set_progress_bar_config(disable=True)
        self.progress.begin(index)
        scale = float(self.arguments.get(cascade_of(pipe).guidance) or 1.0)
        calls = self._calls(index)
        dropped = model_calls(self.scheduler, self.settings.steps) - calls
        with (
            caches_of_stage(pipe, calls=calls, dropped=dropped),
            guidance_in_halves(pipe, unguided_from=unguided, split=self.options.split_guidance, guidance_scale=scale),
        ):
            result = self._call_stage(size, {**changes, **output})
        if not restarts and len(self.sizes) > 1:
            self.base_schedule_arguments = pipe.scheduler.schedule_arguments
        return result

    def _call_stage(self, size: tuple[int, int], changes: Mapping[str, Any]) -> Any:
        return call_stage(self.pipe, size, {**self.arguments, **changes}, wrap=wrap_of(self.pipe, self.settings))

    def _without_schedule(self) -> dict[str, None]:
        return {name: None for name in _SCHEDULE if name in self.arguments}

    def _watch(self, index: int) -> Watch:
        """The callback for the model calls of a stage: it records the trajectory and the progress."""
        records_trajectory = index == 1 and self.first == 1 and self.settings.sg and self.settings.anchor == "trajectory"
        longest = max((self._calls(i) for i in range(2, len(self.sizes) + 1)), default=0)

        def watch(call: int, denoised: Callable[[], Tensor]) -> None:
            if records_trajectory and call >= self._calls(1) - longest:
                self.trajectory.append(unpacked(self.pipe, denoised(), self.sizes[0]))
            self.progress.call(index, call, denoised)

        return watch

    def _calls(self, index: int) -> int:
        """Number of model calls of a stage."""
        return model_calls(self.scheduler, self._steps(index))

    def _steps(self, index: int) -> int:
        """Number of steps of a stage."""
        return self._settings(index).stage_steps if index > self.first else self.base_steps

    def _settings(self, index: int) -> Settings:
        """The settings of a stage, with a single number in place of each tuple; for the base stage, those of the run."""
        above = len(self.sizes) - self.first
        return self.settings.of_stage(index - self.first, above) if index > self.first else self.settings

    @contextmanager
    def _stage_context(self, size: tuple[int, int], stage: str, in_tiles: bool | None = None) -> Iterator[None]:
        """Run the autoencoder in parts where a size needs it on any rank, and explain out-of-memory errors."""
        tiles = self._tiles(size) if in_tiles is None else in_tiles
        joined = self._largest(joined_sizes(self.pipe, size, images_per_call(self.arguments), ranks=self._ranks(size)) if tiles else 1)
        with tiled(self.pipe.vae, on=tiles, joined=joined):
            used = {"tiled": is_tiled(self.pipe.vae), "split": self.options.split_guidance}
            with out_of_memory(self.pipe, self.scheduler, self.arguments, size, stage, **used):
                yield

    def _tiles(self, size: tuple[int, int]) -> bool | None:
        """Whether to run the autoencoder in parts or in one piece; None leaves it unchanged."""
        if self.options.vae_tiling is not None:
            return self.options.vae_tiling
        return bool(self._largest(needs_tiling(self.pipe, size, images_per_call(self.arguments), ranks=self._ranks(size)))) or None

    def _ranks(self, size: tuple[int, int]) -> int:
        """Number of ranks that share the pictures of a size out in the autoencoder."""
        return 1 if self.split is None else self.split.ranks_at(*size)

    def _largest(self, value: int) -> int:
        """The largest of the numbers that the ranks have, over which the picture is split, if it is."""
        return largest_of_ranks(value, () if self.handle is None else self.handle.groups)

    def _progress(self) -> Progress:
        calls = [self._calls(i) for i in range(1, len(self.sizes) + 1)]
        return Progress(self.sizes, calls, bar=bool(self.options.progress), on_step=self.options.on_step, preview=self._preview)

    def _preview(self, index: int, denoised: Tensor) -> list[Any]:
        """Decode the predicted clean latents, reduced to at most the model's native size."""
        latents = unpacked(self.pipe, denoised, self.sizes[index - 1])
        shrunk = math.sqrt(math.prod(native_size(self.pipe)) / math.prod(self.sizes[index - 1]))
        if shrunk < 1:
            latents = F.interpolate(latents, scale_factor=shrunk, mode="area")
        return to_pil_images(self.pipe, decode(self.pipe, latents))

    def _record_base_schedule(self) -> Mapping[str, Any]:
        """The arguments of `set_timesteps` in a base stage, from a pipeline call that runs no step."""
        pipe, scheduler = self.pipe, recording_scheduler(self.scheduler, runs=False)
        pipe.scheduler = stopping_scheduler(scheduler) if changes_picture(type(pipe)) else scheduler
        if self.options.progress is not None:
            pipe.set_progress_bar_config(disable=True)
        try:
            self._call_stage(self.base, {"generator": fresh_generator(), **_LATENT})
        except ScheduleSet:
            pipe.maybe_free_model_hooks()
        pipe.scheduler = self.scheduler
        arguments: Mapping[str, Any] = scheduler.schedule_arguments
        return arguments

    def _output_of_latents(self, size: tuple[int, int]) -> Any:
        """The pipeline's output for the current latents, from a pipeline call that changes them in no step."""
        changes: dict[str, Any] = {**self._without_schedule(), "num_inference_steps": 1}
        resting = changes_picture(type(self.pipe))
        self.pipe.scheduler = guided_scheduler(self.scheduler, steps=1, last_steps=int(resting), guidance=Guidance(None, 1.0))
        if resting:
            self.pipe.scheduler = resting_scheduler(self.pipe.scheduler, self.latents)
            changes |= {name: None for name in self.arguments if name == "callback_on_step_end"}
        start = start_arguments(self.pipe, self.latents, packed(self.pipe, self.latents))
        return self._call_stage(size, {**changes, **start})
