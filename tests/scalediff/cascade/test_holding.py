"""Two threads and one pipeline: the second waits for the first, and both get the picture that they get alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import scalediff
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import picture

RUN: dict[str, Any] = {"height": 96, "width": 96, "steps": 4}


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of functions that start together, each in a thread; an error is raised here."""
    start, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def work(i: int) -> None:
        start.wait()
        try:
            results[i] = jobs[i]()
        except BaseException as error:  # it is raised below
            results[i] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread waits for ever"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def generated(pipe: Any, prompt: str) -> Any:
    return scalediff.generate(pipe, prompt, generator=seeded(), **RUN).stages[-1].latents


def called(pipe: Any, side: int) -> Any:
    size = {"height": side, "width": side, "num_inference_steps": 4}
    return pipe("a moon", output_type="latent", generator=seeded(), **size).images


@pytest.mark.composes("threads", "cascade")
@pytest.mark.parametrize("patched", [False, True])
def test_two_runs_of_one_pipeline(demo: Any, patched: bool) -> None:
    before = state_of(demo.unet), demo.scheduler
    if patched:
        scalediff.patch_model(demo)
    alone = [generated(demo, "a moon"), generated(demo, "a boat")]
    together = in_threads(lambda: generated(demo, "a moon"), lambda: generated(demo, "a boat"))
    scalediff.unpatch_model(demo)
    assert all(map(torch.equal, together, alone))
    assert (state_of(demo.unet), demo.scheduler) == before


def test_a_patched_pipelines_own_call_waits_too(demo: Any) -> None:
    scalediff.patch_model(demo)
    alone = [called(demo, 64), called(demo, 96), generated(demo, "a boat")]
    together = in_threads(lambda: called(demo, 64), lambda: called(demo, 96), lambda: generated(demo, "a boat"))
    assert all(map(torch.equal, together, alone))


def test_pipelines_that_share_a_denoiser_are_one(demo: Any) -> None:
    other = type(demo)(**demo.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    alone = [generated(demo, "a moon"), generated(other, "a boat")]
    together = in_threads(lambda: generated(demo, "a moon"), lambda: generated(other, "a boat"))
    assert all(map(torch.equal, together, alone))


def test_another_pipeline_does_not_wait(demo: Any) -> None:
    """The second run ends inside the first."""
    other = copy.deepcopy(demo)
    ended = []

    def run_the_other(stage: Any) -> None:
        ended.extend(in_threads(lambda: generated(other, "a boat")))

    scalediff.generate(demo, "a moon", generator=seeded(), on_stage=run_the_other, **RUN)
    assert len(ended) == 2


def test_a_callback_that_uses_the_pipeline_is_refused(demo: Any) -> None:
    """It would wait for its own run."""
    uses: list[Callable[[], Any]] = [
        lambda: generated(demo, "a boat"),
        lambda: scalediff.upscale(demo, picture(64, 64), "a boat", **RUN),
        lambda: scalediff.patch_model(demo),
        lambda: scalediff.unpatch_model(demo.unet),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"this .* is in a run, and a callback of that run must not use it again"):
            scalediff.generate(demo, "a moon", generator=seeded(), on_stage=lambda stage, use=use: use(), **RUN)
    assert generated(demo, "a moon").shape == (1, 4, 24, 24), "the failed runs have let go of it"
