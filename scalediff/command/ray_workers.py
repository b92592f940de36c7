"""`scalediff generate --ray`: a worker on every GPU of the machines that Ray has joined."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from scalediff.command.drawing import plan_pictures, prepare
from scalediff.command.loading import UsageError, one_line
from scalediff.command.ranks import own_jobs, place
from scalediff.command.reporting import Job, print_status
from scalediff.command.workers import Outcome, hand_out

_OF_THE_INPUT = (UsageError, ValueError, TypeError, NotImplementedError, ImportError)  # a worker can go on; another would fail too


def generate_pictures(options: Namespace) -> None:
    """Generate a picture for every prompt and seed by workers of Ray.

    Raises:
        UsageError: Ray is missing, or the options do not fit together.
        PicturesFailedError: Some pictures could not be drawn.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(f'--ray needs Ray: pip install "scalediff[ray]" ({error})') from error
    if options.split_picture or place().world > 1:
        raise UsageError("--ray starts its own workers, each of which draws whole pictures: leave out --split-picture and torchrun")
    planned = plan_pictures(options)
    jobs = own_jobs(options, planned)
    if jobs:
        jobs = [Job(job.prompt, job.seed, job.out.absolute()) for job in jobs]
        ray.init()  # joins the Ray of this machine or of RAY_ADDRESS, or else starts one for this run
        try:
            pool = RayPool(ray, with_absolute_paths(options), jobs[0], several=len(planned) > 1)
            print_status(f"{len(jobs)} pictures, {min(pool.size, len(jobs))} workers")
            hand_out(pool, jobs)
        finally:
            ray.shutdown()  # ends the workers too


def with_absolute_paths(options: Namespace) -> Namespace:
    """The options with absolute paths: workers run in other folders."""
    paths = {name: value.absolute() for name, value in vars(options).items() if isinstance(value, Path)}
    model = str(Path(options.model).absolute()) if options.model != "demo" and Path(options.model).is_dir() else options.model
    return Namespace(**{**vars(options), **paths, "model": model})


class Worker:
    """One process of Ray, which loads the model once.

    Args:
        options: The options of the command.
        several: As in `prepare`.
    """

    def __init__(self, options: Namespace, several: bool) -> None:
        self._options, self._several = options, several

    def load(self, first: Job) -> Outcome:
        """Load the model."""
        try:
            _, self._draw = prepare(self._options, first, several=self._several)
        except _OF_THE_INPUT as error:
            return Outcome(error=one_line(error))
        return Outcome()

    def draw(self, job: Job) -> Outcome:
        """Draw a picture and save it. What it prints goes to the driver; other errors than those of the input end the worker."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                self._draw(job, True)
            except _OF_THE_INPUT as error:
                return Outcome(error=one_line(error), printed=printed.getvalue())
        return Outcome(printed=printed.getvalue())


class RayPool:
    """Workers of Ray, each with a GPU of its own; where there are none, with a core of a CPU.

    Args:
        ray: The module.
        options, several: As in `Worker`.
        first: The first picture.
    """

    def __init__(self, ray: Any, options: Namespace, first: Job, *, several: bool) -> None:
        self._ray, self._arguments, self._first = ray, (options, several), first
        there = ray.cluster_resources()
        gpus = 0 if options.device == "cpu" else int(there.get("GPU", 0))
        self.size = gpus or max(1, int(there.get("CPU", 1)))
        self._worker = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Worker)
        self._running: dict[Any, Any] = {}

    def start(self) -> Any:
        worker = self._worker.remote(*self._arguments)
        self._running[worker.load.remote(self._first)] = worker
        return worker

    def draw(self, worker: Any, job: Job) -> None:
        self._running[worker.draw.remote(job)] = worker

    def wait(self) -> tuple[Hashable, Outcome]:
        finished = self._ray.wait(list(self._running), num_returns=1)[0][0]
        worker = self._running.pop(finished)
        try:
            return worker, self._ray.get(finished)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(worker)  # also one that has raised: its GPU may be in no state to go on
            return worker, Outcome(lost=one_line(getattr(error, "cause", None) or error))
