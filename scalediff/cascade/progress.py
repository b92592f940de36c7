"""How far a run is: one bar over all stages, and what is told of every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One denoising step of a run.

    Attributes:
        stage, stages: The stage's number from 1, and how many there are.
        step, steps: Its number from 1 within the stage, and how many there are. A solver of order two has a step for every model call.
        left: Seconds to the end of the run as far as can be told: every step so far took as long per pixel.
        preview: Makes pictures, at the model's native size, of what the model takes for the final one now.
    """

    stage: int
    stages: int
    step: int
    steps: int
    left: float
    preview: Callable[[], list[Any]]


class Progress(AbstractContextManager["Progress"]):
    """Counts the model calls of a run, a call's work being its pixels.

    Args:
        sizes: (height, width) of every stage.
        calls: Model calls of every stage.
        bar: Show a bar on stderr.
        on_step: Told of every step.
        preview: Makes pictures of a clean latent.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        calls: Sequence[int],
        *,
        bar: bool,
        on_step: Callable[[Step], None] | None,
        preview: Callable[[int, Tensor], list[Any]],
    ) -> None:
        self._sizes, self._calls, self._on_step, self._preview = sizes, calls, on_step, preview
        self._work = [height * width for height, width in sizes]
        self._total = sum(work * count for work, count in zip(self._work, calls, strict=True))
        self._done = 0
        self._began: tuple[float, int] | None = None
        self._bar = _bar(self._total) if bar else None

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, stage: int) -> None:
        """A stage, counted from 1, begins to be drawn."""
        if self._began is None:
            self._began = time.perf_counter(), self._done
        if self._bar is not None:
            height, width = self._sizes[stage - 1]
            self._bar.set_description(f"stage {stage}/{len(self._sizes)}  {height} x {width}")

    def skip(self, stage: int) -> None:
        """A stage is there already."""
        self._advance(self._work[stage - 1] * self._calls[stage - 1])

    def call(self, stage: int, number: int, denoised: Callable[[], Tensor]) -> None:
        """The model was called, for the `number`-th time from 0 in this stage."""
        self._advance(self._work[stage - 1])
        if self._on_step is not None:
            left = self._left()
            pictures = lambda: self._preview(stage, denoised())  # noqa: E731  # made while the step is told of, or not at all
            calls = max(number + 1, self._calls[stage - 1])  # PNDM, at the native size, has a call more
            self._on_step(Step(stage, len(self._sizes), number + 1, calls, left, pictures))

    def _advance(self, work: int) -> None:
        self._done += work
        if self._bar is not None:
            self._bar.update(work)

    def _left(self) -> float:
        assert self._began is not None
        since, before = self._began
        return (time.perf_counter() - since) * max(self._total - self._done, 0) / max(self._done - before, 1)


def _bar(total: int) -> Any:
    from tqdm import tqdm  # diffusers brings it

    return tqdm(total=total, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
