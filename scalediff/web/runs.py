"""Draw a job in a thread of its own, with progress that others can read and a way to cancel it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from scalediff.cascade.changing import blank_arguments, changing_pipeline
from scalediff.cascade.describing import describe_run, describe_stage
from scalediff.cascade.fitting import Switches, describe_fit, fit_of
from scalediff.cascade.holding import held
from scalediff.cascade.pipeline import call_pipeline, guidance_argument, named_preset, wrap_of
from scalediff.cascade.progress import Step
from scalediff.draw import Result, generate, upscale
from scalediff.methods import METHODS
from scalediff.methods.running import with_full_attention
from scalediff.web.gallery import COMPANIONS, Gallery
from scalediff.web.jobs import Job, method_label

PREVIEW_SHARE = 0.1  # of the time of a run that its previews may take


class Cancelled(Exception):
    """Raised in a run at its next step after `Run.cancel`."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        text: What is done now.
        share: Share of the current picture that is done, in [0, 1].
        preview: A PIL picture of the unfinished result, or None.
        name: The name of the finished picture in the gallery, once it is saved.
    """

    text: str
    share: float = 0.0
    preview: Any = None
    name: str | None = None


@dataclass
class _Pace:
    """When the next preview may be made: the time for previews is a share of the whole."""

    next: float = 0.0

    def due(self) -> bool:
        return time.perf_counter() >= self.next

    def took(self, seconds: float) -> None:
        self.next = time.perf_counter() + seconds * (1 / PREVIEW_SHARE - 1)


@dataclass
class Run:
    """One job on one pipeline. `progress` starts it and must be read to the end, or closed, which cancels it.

    Args:
        pipe: The pipeline.
        job: The job.
        gallery: Where the pictures are saved.
        model: The name that the pipeline was loaded by, for the metadata.

    Attributes:
        ended: Set when the run has ended, and the pipeline is free.
        closed: For whoever reads `progress`, to set when it reads no more.
    """

    pipe: Any
    job: Job
    gallery: Gallery
    model: str
    ended: threading.Event = field(default_factory=threading.Event, init=False)
    closed: threading.Event = field(default_factory=threading.Event, init=False)
    _events: queue.SimpleQueue[Progress | BaseException | None] = field(default_factory=queue.SimpleQueue, init=False)
    _cancel: threading.Event = field(default_factory=threading.Event, init=False)
    _pace: _Pace = field(default_factory=_Pace, init=False)

    def cancel(self) -> None:
        """End the run at its next step; what is saved by then stays."""
        self._cancel.set()

    def progress(self) -> Generator[Progress, None, None]:
        """Run the job, and yield its progress as often as it is read. Raises what the run raises, and `Cancelled`."""
        thread = threading.Thread(target=self._work, name="scalediff-run", daemon=True)
        thread.start()
        try:
            while (event := self._newest()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.cancel()  # the reader has gone away, if the run has not ended
            thread.join()

    def _newest(self) -> Progress | BaseException | None:
        """Wait for an event, and pass over those that newer progress has overtaken."""
        event = self._events.get()
        while isinstance(event, Progress) and event.name is None and not self._events.empty():
            newer = self._events.get()
            keeps = isinstance(newer, Progress) and newer.preview is None and newer.name is None
            event = replace(newer, preview=event.preview) if keeps and isinstance(newer, Progress) else newer
        return event

    def _work(self) -> None:
        try:
            self._draw()
        except BaseException as error:  # the reader raises it in its own thread
            self._events.put(error)
        else:
            self._events.put(None)
        finally:
            self.ended.set()

    def _draw(self) -> None:
        pipe = self._pipeline()
        self._check_memory(pipe)
        name = self.gallery.new_name(self.job.prompt, self.job.seed)
        try:
            label = method_label(self.job.method)
            result = self._run_method(pipe, self.job, label)
            seconds = sum(stage.seconds for stage in result.stages)
            self._save(result, name, label, seconds)
            if self.job.compare:
                full = replace(self.job, settings=replace(self.job.settings, attention="full"), compare=False)
                result = self._run_method(pipe, full, COMPANIONS["full"].capitalize())
                seconds = sum(stage.seconds for stage in result.stages)
                self._save(result, _companion(name, "full"), COMPANIONS["full"], seconds, shows=name)
                self._draw_direct(name)
        finally:
            self.gallery.drop(name)

    def _pipeline(self) -> Any:
        """The pipeline that draws the job: with a strength, one that changes pictures and has the same components."""
        if self.job.strength is None:
            return self.pipe
        with held(self.pipe):
            return changing_pipeline(self.pipe, with_mask=self.job.mask is not None)

    def _check_memory(self, pipe: Any) -> None:
        """Refuse a run that does not fit into memory by estimate. Methods whose denoiser sees a part at a time need less than that.

        Raises:
            ValueError: It does not fit, and the job is not forced.
        """
        job = self.job
        method = METHODS.get(job.method)
        if method is not None and method.in_parts:
            return  # a picture that the device could not even hold is refused by `generate`
        self._put(Progress("Estimating the memory"))
        try:
            with held(pipe):
                switches = Switches(job.vae_tiling, job.split_guidance, wrap_of(pipe, job.settings))
                fit = fit_of(pipe, {**self._arguments(), **blank_arguments(pipe)}, job.size, switches)
        except NotImplementedError as why:
            self._put(Progress(f"No estimate of the memory: {one_line(why)}"))
            return
        if fit.advice and not job.force:
            raise ValueError(f"{fit.describe()}; {describe_fit(fit.size)}; a switch under Memory runs it all the same")

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that do not depend on the method, without the generator."""
        job = self.job
        own = {"prompt": job.prompt, **guidance_argument(self.pipe, job.settings.guidance_scale), "num_inference_steps": job.settings.steps}
        return own if job.negative_prompt is None else {**own, "negative_prompt": job.negative_prompt}

    def _run_method(self, pipe: Any, job: Job, label: str) -> Result:
        preset = replace(named_preset(pipe, job.preset), settings=job.settings)
        height, width = job.size
        shared: dict[str, Any] = {"negative_prompt": job.negative_prompt, "generator": torch.Generator().manual_seed(job.seed)}
        shared["force"] = True  # `_check_memory` has refused what does not fit
        if job.method != "scalediff":
            call = {"callback_on_step_end": self._step_callback(label)}
            return generate(pipe, job.prompt, height=height, width=width, preset=preset, method=job.method, call=call, **shared)
        shared |= {"preset": preset, "sizes": job.sizes, "vae_tiling": job.vae_tiling, "vae_attention": job.vae_attention}
        shared |= {"split_guidance": job.split_guidance, "on_step": self._on_step(label)}
        if job.picture is not None:
            shared |= {"mask_image": job.mask, "strength": job.strength}
            return upscale(pipe, job.picture, job.prompt, height=height, width=width, **shared)
        return generate(pipe, job.prompt, height=height, width=width, **shared)

    def _draw_direct(self, name: str) -> None:
        """Direct inference: the pipeline's own call at the target size."""
        height, width = self.job.size
        changes = {"height": height, "width": width, "generator": torch.Generator().manual_seed(self.job.seed)}
        since = time.perf_counter()
        call = {**self._arguments(), **changes, "callback_on_step_end": self._step_callback(COMPANIONS["direct"].capitalize())}
        with held(self.pipe), with_full_attention(self.pipe):
            self.pipe.set_progress_bar_config(disable=True)
            image = call_pipeline(self.pipe, call).images[0]
        metadata = self._describe(self.job) | {"height": height, "width": width, "seconds": round(time.perf_counter() - since, 3)}
        companion = _companion(name, "direct")
        self.gallery.save(image, companion, metadata | {"kind": COMPANIONS["direct"]})
        self._put(Progress(f"{COMPANIONS['direct'].capitalize()} is finished", 1.0, name=name))

    def _save(self, result: Result, name: str, kind: str, seconds: float, *, shows: str | None = None) -> None:
        last = result.stages[-1]
        settings = replace(last.settings, restart=self.job.settings.restart)  # a strength may have taken its place in the run
        metadata = self._describe(replace(self.job, settings=settings)) | describe_stage(last)
        metadata |= {"seconds": round(seconds, 3), "kind": kind, "stages": [describe_stage(stage) for stage in result.stages]}
        self.gallery.save(result.images[0], name, metadata)
        self._put(Progress(f"{kind[0].upper()}{kind[1:]} is finished", 1.0, name=shows or name))

    def _describe(self, job: Job) -> dict[str, Any]:
        metadata = describe_run(
            self.pipe,
            job.settings,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            seed=job.seed,
            model=self.model,
            preset=job.preset,
            vae_tiling=job.vae_tiling,
            vae_attention=job.vae_attention,
            split_guidance=job.split_guidance,
        )
        metadata["method"] = job.method
        if job.sizes is not None:
            metadata["asked_sizes"] = ", ".join(f"{height}x{width}" for height, width in job.sizes)
        sizes = {"picture_size": job.picture, "mask_size": job.mask}
        metadata |= {name: f"{image.height}x{image.width}" for name, image in sizes.items() if image is not None}
        return metadata if job.strength is None else metadata | {"strength": job.strength}

    def _on_step(self, label: str) -> Callable[[Step], None]:
        since = time.perf_counter()

        def show(step: Step) -> None:
            self._stop_if_cancelled()
            taken = time.perf_counter() - since
            text = f"{label}: stage {step.stage} of {step.stages}, step {step.step} of {step.steps}, {format_seconds(step.left)} left"
            self._put(Progress(text, taken / max(taken + step.left, 1e-9), self._preview(step)))

        return show

    def _preview(self, step: Step) -> Any:
        if not self.job.preview or not self._pace.due():
            return None
        began = time.perf_counter()
        picture = step.preview()[0]
        self._pace.took(time.perf_counter() - began)
        return picture

    def _step_callback(self, label: str) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
        """A `callback_on_step_end` of diffusers. It knows the steps of one call only, so the time left is that of this stage."""
        since = time.perf_counter()

        def show(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            nonlocal since
            self._stop_if_cancelled()
            if index == 0:
                since = time.perf_counter()  # the first step of a stage has no time to compare with
            steps = getattr(pipe, "num_timesteps", index + 1)
            left = (time.perf_counter() - since) / max(index, 1) * (steps - index - 1)
            remaining = f", {format_seconds(left)} left in this stage" if index else ""
            self._put(Progress(f"{label}: step {index + 1} of {steps}{remaining}", (index + 1) / steps))
            return kwargs

        return show

    def _put(self, progress: Progress) -> None:
        self._stop_if_cancelled()
        self._events.put(progress)

    def _stop_if_cancelled(self) -> None:
        if self._cancel.is_set():
            raise Cancelled


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _companion(name: str, kind: str) -> str:
    return f"{name.removesuffix('.png')}.{kind}.png"


def format_seconds(seconds: float) -> str:
    """A time for people: `about 12 s`, `about 3 min`."""
    if seconds < 1:
        return "less than 1 s"
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"
