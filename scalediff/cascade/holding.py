"""One run at a time for every pipeline: a run changes the pipeline's scheduler and the attention of its denoiser until it ends."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from torch import nn

from scalediff.patching.networks import denoiser_of

P = ParamSpec("P")
R = TypeVar("R")


class _Hold:
    """A lock that knows which thread holds it."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), 0


# By denoiser and not by pipeline, because two pipelines may share their networks (`from_pipe`).
_HOLDS: weakref.WeakKeyDictionary[nn.Module, _Hold] = weakref.WeakKeyDictionary()
_HOLDS_LOCK = threading.Lock()


@contextmanager
def held(model: Any) -> Iterator[None]:
    """Hold a pipeline, and every other one with the same denoiser; wait if another thread holds it.

    Raises:
        RuntimeError: This thread already holds it, so it would wait for itself: the call comes from a callback of a run.
    """
    denoiser = denoiser_of(model)
    with _HOLDS_LOCK:
        hold = _HOLDS.setdefault(denoiser, _Hold())
    thread = threading.get_ident()
    if hold.thread == thread:
        raise RuntimeError(
            f"this {type(model).__name__} is in a run, and a callback of that run must not use it again: wait until the run has ended"
        )
    with hold.lock:
        hold.thread = thread
        try:
            yield
        finally:
            hold.thread = 0


def holds_pipeline(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator for functions whose first argument is `pipe`: they hold the pipeline, as `held` does."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with held(args[0] if args else kwargs.get("pipe")):
            return function(*args, **kwargs)

    return call
