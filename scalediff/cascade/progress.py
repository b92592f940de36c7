"""Progress of a run: one bar over all stages, and a callback for every step."""

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
        stage, stages: Number of the current stage, from 1, and number of stages.
        step, steps: Number of the step within the stage, from 1, and number of steps. A solver of order two counts every model call.
        left: Estimated seconds to the end of the run, assuming the same time per pixel for all steps.
        preview: Function that returns PIL pictures of the model's current prediction of the clean picture, at most at native size.
    """

    stage: int
    stages: int
    step: int
    steps: int
    left: float
    preview: Callable[[], list[Any]]


class Progress(AbstractContextManager["Progress"]):
    """Count the model calls of a run. The work of a call is measured by the number of its pixels.

    Args:
        sizes: (height, width) of every stage in pixels.
        calls: Number of model calls of every stage.
        bar: Show a progress bar on stderr.
        on_step: Called after every step.
        preview: Function from a stage's number and clean latents to PIL pictures.
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
        """Start a stage; the first one is 1."""
        if self._began is None:
            self._began = time.perf_counter(), self._done
        if self._bar is not None:
            height, width = self._sizes[stage - 1]
            self._bar.set_description(f"stage {stage}/{len(self._sizes)}  {height} x {width}")

    def skip(self, stage: int) -> None:
        """Count a stage that is loaded from the workdir."""
        self._advance(self._work[stage - 1] * self._calls[stage - 1])

    def call(self, stage: int, number: int, denoised: Callable[[], Tensor]) -> None:
        """Count a model call of this stage; the first one is number 0. `denoised` computes the predicted clean latents."""
        self._advance(self._work[stage - 1])
        if self._on_step is not None:
            left = self._left()
            pictures = lambda: self._preview(stage, denoised())  # noqa: E731  # computed only if on_step asks for it
            calls = max(number + 1, self._calls[stage - 1])  # PNDM, at the native size, makes one more call
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
    from tqdm import tqdm  # a dependency of diffusers

    return tqdm(total=total, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
