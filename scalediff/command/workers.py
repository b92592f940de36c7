"""Pictures that a driver hands out to workers, one at a time: a picture whose worker is lost is put back, and another worker draws it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from scalediff.command.loading import UsageError
from scalediff.command.reporting import Job, print_status

ATTEMPTS = 3  # workers that are lost with a picture; and for each place, one after the other while they load the model


@dataclass(frozen=True)
class Outcome:
    """What a worker did: it loaded the model, or drew a picture.

    Attributes:
        error: Why it could not, by its input; empty if it could.
        lost: Why the worker is lost; empty if it can go on.
        printed: Text for the standard output of the driver.
    """

    error: str = ""
    lost: str = ""
    printed: str = ""


class Pool(Protocol):
    """Workers on any machines."""

    @property
    def size(self) -> int:
        """How many workers can run at once."""

    def start(self) -> Hashable:
        """Start a worker, which loads the model."""

    def draw(self, worker: Hashable, job: Job) -> None:
        """Let a worker that is ready draw a picture."""

    def wait(self) -> tuple[Hashable, Outcome]:
        """Wait for a worker that has loaded the model or drawn its picture, or is lost."""


class PicturesFailedError(RuntimeError):
    """Some pictures could not be drawn."""


def hand_out(pool: Pool, jobs: Sequence[Job]) -> None:
    """Let workers draw all pictures. Those that fail do not keep the others from being drawn.

    Raises:
        UsageError: The model cannot be loaded, or does not support the options.
        PicturesFailedError: Pictures could not be drawn, or no worker is left and none comes up.
    """
    waiting, attempts, failed = deque(jobs), Counter[Job](), dict[Job, str]()
    busy: dict[Hashable, Job | None] = {pool.start(): None for _ in range(min(pool.size, len(jobs)))}
    idle: list[Hashable] = []
    left, lost_loading = len(jobs), 0
    while left:
        worker, outcome = pool.wait()
        job = busy.pop(worker)
        print(outcome.printed, end="", flush=True)
        if job is None and outcome.error:
            raise UsageError(outcome.error)
        if outcome.lost and job is None:
            lost_loading += 1
            print_status(f"a worker was lost while it loaded the model: {outcome.lost}")
        elif outcome.lost:
            assert job is not None
            attempts[job] += 1
            print_status(f"{job.out}: its worker was lost, attempt {attempts[job]} of {ATTEMPTS}: {outcome.lost}")
            if attempts[job] < ATTEMPTS:
                waiting.append(job)
            else:
                failed[job] = outcome.lost
                left -= 1
        else:
            lost_loading = 0
            if job is not None:
                left -= 1
                if outcome.error:
                    failed[job] = outcome.error
        if not outcome.lost:
            idle.append(worker)
        while idle and waiting:
            worker, job = idle.pop(), waiting.popleft()
            busy[worker] = job
            pool.draw(worker, job)
        loading = list(busy.values()).count(None)
        if outcome.lost and len(busy) + len(idle) < min(pool.size, left) and lost_loading + loading < ATTEMPTS * pool.size:
            busy[pool.start()] = None
        if not busy and left:
            failed |= dict.fromkeys(waiting, f"no worker is left, the last one was lost: {outcome.lost}")
            break
    for job, why in failed.items():
        print_status(f"{job.out}: not drawn: {why}")
    if failed:
        raise PicturesFailedError(f"{len(failed)} of {len(jobs)} pictures are not drawn")
