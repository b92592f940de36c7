"""A patched model: its networks call `scalediff.patching.target` around every forward pass, and its handle undoes that.

A denoiser's class becomes a subclass whose call opens and closes a pass, whatever is raised inside; within a pass, attention
calls are intercepted (`scalediff.patching.interception`). No forward, no processor and no submodule is replaced.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, get_args

import torch
from torch import nn

from scalediff.families.grid import Grid
from scalediff.patching.plan import Options
from scalediff.patching.report import Report, Row
from scalediff.patching.subclass import ATTRIBUTE, mark, unmark
from scalediff.patching.target import Target
from scalediff.settings import Attention, Jitter


class Handle:
    """A patched model: `.report` says what was done, `.remove()` or leaving a `with` block undoes it."""

    def __init__(self, model: Any, targets: list[Target], *, skipped: Sequence[Row] = (), call: str = "") -> None:
        self._model = weakref.ref(model)  # weak: a denoiser must neither keep its pipeline alive nor copy it along
        self._targets, self._skipped, self._call = targets, tuple(skipped), call
        self._attention: Attention = "npa"

    @property
    def report(self) -> Report:
        """Every attention module with its role, window and whether it is patched; of an unlisted model, those seen so far."""
        rows = *(row for target in self._targets for row in target.rows()), *self._skipped
        known = all(target.family.listed for target in self._targets)
        return Report(self._targets[0].family.denoiser, rows, self._call, known)

    @property
    def attention(self) -> Attention:
        """`"npa"`, or `"full"` to let all calls through for a while without unpatching."""
        return self._attention

    @attention.setter
    def attention(self, value: Attention) -> None:
        if value not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {value!r}")
        self._attention = value
        for target in self._targets:
            target.attention = value

    @property
    def jitter(self) -> Jitter:
        """How the patch grid moves from step to step; setting it begins the offsets again."""
        return self._targets[0].offsets.jitter

    @jitter.setter
    def jitter(self, value: Jitter) -> None:
        if value not in get_args(Jitter):
            raise ValueError(f"jitter must be one of {', '.join(get_args(Jitter))}, got jitter={value!r}")
        for target in self._targets:
            target.offsets.jitter = value
        self.restart_jitter()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo the patch; a second call, or one after a later patch has replaced this one, does nothing."""
        for target in self._targets:
            target.active = False
            unmark(target.module(), target)
        unmark(self._model(), self)

    def restart_jitter(self) -> None:
        """Begin the offsets of the patch grid again, as after patching: the same run then has the same offsets."""
        for target in self._targets:
            target.offsets.restart()

    @property
    def window(self) -> Grid:
        """Key/value window in tokens `(Y, X)` of the denoiser's finest level: what counts as its native size."""
        return self._targets[0].native

    @property
    def options(self) -> Options:
        """What the attention was asked to be: implementation and treatment of text."""
        return self._targets[0].options

    @property
    def model(self) -> Any:
        """The pipeline or module that was patched; None once it is gone."""
        return self._model()

    @property
    def active(self) -> bool:
        """False once removed."""
        return any(target.active for target in self._targets)

    def install(self) -> None:
        """Patch the networks; a pipeline only learns that it is patched."""
        for target in self._targets:
            module = target.module()
            assert module is not None
            target.handle = self
            mark(module, target, _attending)
            target.active = True
        model = self._model()
        if model is not None and not isinstance(model, nn.Module):
            model.__dict__[ATTRIBUTE] = self


def _attending(cls: type) -> dict[str, Callable[..., Any]]:
    """The calls of a denoiser class that are a pass of its target.

    torch.compile may have taken hold of `__call__` before (then it still asks the module for `_call_impl`), or of `_call_impl`
    (then the module is called as usual): one of the two is always ours, and a pass within itself does nothing.
    """

    # torch.compile steps over the call itself, does not look into opening and closing, and compiles what lies between.
    begin, end = torch.compiler.disable(Target.begin), torch.compiler.disable(Target.end)

    def within(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            target: Target | None = self.__dict__.get(ATTRIBUTE)
            if target is None:
                return forward(self, *args, **kwargs)
            entered, finished = None, False
            try:
                entered = begin(target, self, args, kwargs)
                result = forward(self, *args, **kwargs)
                finished = True
            finally:
                if entered is not None:
                    end(target, self, entered, finished)
            return result

        stepped_over: Callable[..., Any] = torch.compiler.disable(call, recursive=False)
        return stepped_over

    return {"__call__": within(cls.__call__), "_call_impl": within(cls._call_impl)}  # type: ignore[attr-defined]
