"""The stages of methods that draw a base and then restart, size after size, from the enlarged picture of the stage before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scalediff.cascade.latents import decode_finite, packed, unpacked
from scalediff.cascade.pipeline import cascade_of, guidance_argument
from scalediff.cascade.results import Stage
from scalediff.cascade.schedule import Change, Guidance, Watch, check_scheduler, guided_scheduler, recording_scheduler
from scalediff.cascade.stage import add_noise
from scalediff.families.grid import Grid
from scalediff.families.packing import arrange
from scalediff.methods import running
from scalediff.settings import Settings


def tail_steps(steps: int, share: float) -> int:
    """Number of steps of a stage that runs this share of the whole schedule, at least one."""
    return max(1, round(steps * share))


class Restarts:
    """The state of a run; use it within `running.with_full_attention`.

    Args:
        pipe: The pipeline.
        arguments: Arguments of the pipeline's call, complete.
        sizes: (height, width) of every stage in pixels, base first.
        settings: Settings of the run.
        on_stage: Called with every stage when it is finished.
        progress: Show or hide the pipeline's progress bar.

    Attributes:
        stages: The finished stages.
        latents: `[B, C, Y, X]`, of the last finished stage.
        decoded: `[B, 3, height, width]` in [-1, 1], its picture, not clamped.

    Raises:
        ValueError: The call has a custom schedule.
        NotImplementedError: The scheduler cannot start in the middle of a schedule.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        sizes: list[Grid],
        settings: Settings,
        *,
        on_stage: Callable[[Stage], None] | None,
        progress: bool | None,
    ) -> None:
        if len(sizes) > 1:
            check_scheduler(pipe.scheduler)
            running.check_own_schedule(arguments)
        self._pipe, self._arguments, self._sizes, self._settings = pipe, arguments, sizes, settings
        self._on_stage, self._progress = on_stage, progress
        self._scheduler, self._schedule = pipe.scheduler, dict[str, Any]()
        self._since = 0.0
        self.steps: int = arguments["num_inference_steps"]
        self.stages = list[Stage]()
        self.latents = self.decoded = torch.empty(0)

    @property
    def interrupted(self) -> bool:
        """Whether a callback has set diffusers' flag, which makes the stage that it was set in the last one."""
        return bool(getattr(self._pipe, "interrupt", False))

    def draw_base(self, *, watch: Watch | None = None, changes: Mapping[str, Any] | None = None) -> None:
        """Run the first stage, with all steps. `changes` are arguments of the pipeline's call that differ."""
        with self.stage():
            self._pipe.scheduler = recording_scheduler(self._scheduler, watch=watch)
            self._draw({**self._arguments, **(changes or {})})
            self._schedule = self._pipe.scheduler.schedule_arguments

    @contextmanager
    def stage(self) -> Iterator[Grid]:
        """The context of the next stage; yields its (height, width) in pixels. The autoencoder runs in parts if it needs to."""
        index, of = len(self.stages) + 1, len(self._sizes)
        size = self._sizes[index - 1]
        self._since = time.perf_counter()
        running.show_progress(self._pipe, self._progress, index=index, of=of, size=size)
        with running.in_tiles_if_needed(self._pipe, self._arguments, size, f"stage {index} of {of}"):
            yield size

    def restart(
        self, reference: Tensor, *, last_steps: int, change: Change, guidance_scale: float | None, changes: Mapping[str, Any] | None = None
    ) -> None:
        """Run a stage from its noised reference; within `stage`.

        Args:
            reference: Clean latents `[B, C, Y, X]` that the stage starts from.
            last_steps: Number of steps to run, the last ones of the base stage's schedule.
            change: As in `guided_scheduler`, but with latents `[B, C, Y, X]`, packed or not.
            guidance_scale: Scale of the guidance; the run's when None.
            changes: Further arguments of the pipeline's call that differ.
        """
        pipe, size, cascade = self._pipe, self._sizes[len(self.stages)], cascade_of(self._pipe)

        def change_unpacked(call: int, level: Any, x: Tensor, denoised: Tensor) -> Tensor:
            changed = change(call, level, unpacked(pipe, x, size), unpacked(pipe, denoised, size))
            return arrange(changed, cascade.form, cascade.patch)

        guidance = Guidance(None, 1.0)
        pipe.scheduler = guided_scheduler(
            self._scheduler,
            steps=self.steps,
            last_steps=last_steps,
            guidance=guidance,
            base_schedule_arguments=self._schedule,
            change=change_unpacked,
        )
        pipe.scheduler.set_timesteps(last_steps)
        noised = add_noise(pipe.scheduler, reference, self._arguments["generator"])
        own: dict[str, Any] = {"latents": packed(pipe, noised), "num_inference_steps": last_steps}
        if guidance_scale is not None:
            own |= guidance_argument(pipe, guidance_scale)
        self._draw({**self._arguments, **own, **(changes or {})})

    def _draw(self, arguments: Mapping[str, Any]) -> None:
        """Call the pipeline for the next stage and report it."""
        index, of = len(self.stages) + 1, len(self._sizes)
        size = self._sizes[index - 1]
        self.latents = running.generate_latents(self._pipe, arguments, size)
        self.decoded = decode_finite(self._pipe, self.latents)
        stage = running.finished(
            self._pipe, arguments, self.latents, size, self._settings, index=index, of=of, since=self._since, decoded=self.decoded
        )
        self.stages.append(stage)
        if self._on_stage is not None:
            self._on_stage(stage)
