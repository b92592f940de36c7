"""Progress of a run: one bar over all stages, and a callback for every step."""

from __future__ import annotations

import os
import sys
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
        bar: Show the progress on stderr: a bar in a terminal or notebook, and otherwise a line for each stage.
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
        self._bar = _bar(self._total) if bar and shows_bars() else None
        self._lines = bar and self._bar is None

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, stage: int) -> None:
        """Start a stage; the first one is 1."""
        if self._began is None:
            self._began = time.perf_counter(), self._done
        height, width = self._sizes[stage - 1]
        label = f"stage {stage}/{len(self._sizes)}  {height} x {width}"
        if self._bar is not None:
            self._bar.set_description(label)
        if self._lines:
            print_line(label)

    def skip(self, stage: int) -> None:
        """Count a stage that is loaded from the workdir."""
        self._advance(self._work[stage - 1] * self._calls[stage - 1])

    def call(self, stage: int, number: int, denoised: Callable[[], Tensor]) -> None:
        """Count a model call of this stage; the first one is number 0. `denoised` computes the predicted clean latents."""
        self._advance(self._work[stage - 1])
        if self._on_step is not None:
            left = self._left()
            pictures = lambda: self._preview(stage, denoised())  # noqa: E731  # computed only if on_step asks for it
            calls = max(number + 1, self._calls[stage - 1])  # PNDM with Runge-Kutta steps, at the native size, makes more calls
            self._on_step(Step(stage, len(self._sizes), number + 1, calls, left, pictures))

    def _advance(self, work: int) -> None:
        self._done += work
        if self._bar is not None:
            self._bar.update(work)

    def _left(self) -> float:
        assert self._began is not None
        since, before = self._began
        return (time.perf_counter() - since) * max(self._total - self._done, 0) / max(self._done - before, 1)


def shows_bars() -> bool:
    """Whether stderr is a terminal or a notebook. In a file or a pipe, every update of a bar would be one more line."""
    return sys.stderr is not None and (sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel"))


def print_line(label: str) -> None:
    """Print the label of a stage on stderr."""
    print(label, file=sys.stderr, flush=True)


def show_pipeline_bar(pipe: Any, label: str, *, show: bool) -> None:
    """Show the pipeline's own progress bar with a label, or only the label where there are no bars; hide both if `show` is False."""
    pipe.set_progress_bar_config(desc=label, disable=not (show and shows_bars()), ncols=_columns())
    if show and not shows_bars():
        print_line(label)


def _columns() -> int | None:
    """The width that the user sets with the environment variable COLUMNS; None leaves it to tqdm, which measures the terminal."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else None


def _bar(total: int) -> Any:
    from tqdm import tqdm  # a dependency of diffusers

    return tqdm(total=total, bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}", ncols=_columns())
