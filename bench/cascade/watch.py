"""Where the time of a run goes: a watch over the parts of a pipeline while it draws.

A watch times, stage by stage, every step and the passes of the denoiser in it, what the autoencoder encodes and decodes, latent frequency
mixing and structure guidance. A stage's first step is not among them, for it pays what is paid once. In the last step, which is not
among them either, it times the attention calls of the denoiser one by one: what it tells is their share of that step's passes, in
seconds of the median step, so that a slow step is not taken for slow attention. On a GPU by events, without waiting in between.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from bench.cascade import authors as cascade_authors
from bench.cascade.clock import Clock, Memory
from scalediff.cascade import run as cascade
from scalediff.cascade import schedule
from scalediff.patching import plan
from scalediff.patching.networks import denoiser_of
from scalediff_kernels import mix_frequencies
from scalediff_kernels.neighborhood import windowed_sdpa


class Span(NamedTuple):
    """One stretch of a run."""

    name: str
    step: int
    begin: Any
    end: Any


@dataclass
class StageTimes:
    """Seconds of one stage of a watched run.

    Attributes:
        seconds: All of it.
        steps: Steps that are timed.
        denoiser, guidance: Of each of these.
        attention, cross: Of the median of `denoiser`, by their share of the passes of the last step: calls of the image to itself, and
            to and of text in one softmax; of the image to text. None where they are inside compiled graphs.
        encode, decode, mixing: Of the stage.
        rest: What is before its first step and after its last, beside these three.
        peak: Bytes; None where nobody counts.
    """

    seconds: float
    steps: list[float]
    denoiser: list[float]
    guidance: list[float]
    attention: float | None
    cross: float | None
    encode: float
    decode: float
    mixing: float
    rest: float
    peak: int | None

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def once(self) -> float:
        """What does not grow with the number of steps."""
        return self.encode + self.decode + self.mixing + self.rest


@dataclass
class _Marks:
    """One stage under way."""

    begin: Any
    spans: list[Span] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    end: Any = None
    peak: int | None = None


class Watch:
    """Watches one run of a pipeline, every stage of which has as many steps.

    Args:
        clock, memory: What to measure with.
        steps: Of every stage, at least 3: the first and the last are not timed.
        deep: Time attention calls in the last step.

    Raises:
        ValueError: too few steps.
    """

    def __init__(self, clock: Clock, memory: Memory, *, steps: int, deep: bool = True) -> None:
        if steps < 3:
            raise ValueError(f"a watched stage needs at least 3 steps, its first and last are not timed, got {steps=}")
        self._clock, self._memory, self._steps, self._deep = clock, memory, steps, deep
        self._inside: list[str] = []
        self._stages: list[_Marks] = []
        self._now: _Marks | None = None
        self._answered: list[str] = []
        self.backends: list[str] = []  # of every stage, who answered its attention calls

    def begin(self) -> None:
        """The run begins."""
        self._clock.wait()
        self._memory.reset()
        self._now = _Marks(self._clock.mark())

    def on_step(self, pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """For diffusers' `callback_on_step_end`."""
        assert self._now is not None
        self._now.steps.append(self._clock.mark())
        return {}

    def on_stage(self, stage: Any) -> None:
        """A stage has ended, and the next begins."""
        assert self._now is not None
        self._now.end = self._clock.mark()
        self._clock.wait()
        self._now.peak = self._memory.peak()
        self._stages.append(self._now)
        self.backends.append(" ".join(sorted(set(self._answered))))
        self._answered = []
        self.begin()

    @contextmanager
    def over(self, pipe: Any) -> Iterator[None]:
        """Inside, what the pipeline calls is timed; nothing is left in it after."""
        denoiser = denoiser_of(pipe)
        with ExitStack() as undo:
            hooks = (
                denoiser.register_forward_pre_hook(lambda *_: self._enter("denoiser")),
                denoiser.register_forward_hook(lambda *_: self._leave("denoiser")),
            )
            for hook in hooks:
                undo.callback(hook.remove)
            for name in ("encode", "decode"):
                pipe.vae.__dict__[name] = self._timed(name, getattr(pipe.vae, name))
                undo.callback(pipe.vae.__dict__.pop, name)
            undo.enter_context(mock.patch.object(cascade, "mix_frequencies", self._timed("mixing", mix_frequencies)))
            undo.enter_context(mock.patch.object(schedule, "_guided", self._timed("guidance", schedule._guided)))
            if self._deep:
                sdpa = F.scaled_dot_product_attention
                undo.enter_context(mock.patch.object(F, "scaled_dot_product_attention", self._attention(sdpa)))
                for module in (windowed_sdpa, cascade_authors):
                    undo.enter_context(mock.patch.object(module, "_sdpa", self._attention(module._sdpa)))
                undo.enter_context(mock.patch.object(plan.Call, "attend", self._windows(plan.Call.attend)))
            yield

    def _enter(self, name: str) -> None:
        assert self._now is not None
        self._inside.append(name)
        self._now.spans.append(Span(name, len(self._now.steps), self._clock.mark(), None))

    def _leave(self, name: str) -> None:
        assert self._now is not None
        innermost = self._inside.pop()
        assert innermost == name, (innermost, name)
        open_span = next(i for i in reversed(range(len(self._now.spans))) if self._now.spans[i].end is None)
        self._now.spans[open_span] = self._now.spans[open_span]._replace(end=self._clock.mark())

    def _wanted(self, name: str) -> bool:
        """Parts that are not within each other; attention of the denoiser alone, in the last step."""
        if name in ("attention", "cross"):
            return self._inside == ["denoiser"] and self._now is not None and len(self._now.steps) == self._steps - 1
        return not self._inside and self._now is not None

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._wanted(name):
                return function(*args, **kwargs)
            self._enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave(name)

        return call

    def _attention(self, sdpa: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for torch's attention: queries and keys of one length are the image's own, or joint."""
        own, cross = self._timed("attention", sdpa), self._timed("cross", sdpa)

        @functools.wraps(sdpa)
        def call(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            same = query.shape[-2] == key.shape[-2]
            if (same and self._wanted("attention")) or self._inside[-1:] == ["attention"]:
                self._answered.append(_backend(query, key, value, *args, **kwargs))
            return (own if same else cross)(query, key, value, *args, **kwargs)

        return call

    def _windows(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for an attention call in windows: by a kernel where torch's attention is not asked."""
        timed = self._timed("attention", attend)

        @functools.wraps(attend)
        def call(*args: Any, **kwargs: Any) -> Any:
            wanted, before = self._wanted("attention"), len(self._answered)
            result = timed(*args, **kwargs)
            if wanted and len(self._answered) == before:
                self._answered.append("triton")
            return result

        return call

    def stages(self) -> list[StageTimes]:
        """Of all stages that have ended.

        Raises:
            RuntimeError: a stage had another number of steps than was said.
        """
        self._clock.wait()
        return [self._read(marks) for marks in self._stages]

    def _read(self, marks: _Marks) -> StageTimes:
        if len(marks.steps) != self._steps:
            raise RuntimeError(f"every stage must run {self._steps} steps, got {len(marks.steps)}")

        def total(name: str, step: int | None = None) -> float:
            found = (s for s in marks.spans if s.name == name and (step is None or s.step == step))
            return sum(self._clock.seconds(s.begin, s.end) for s in found)

        timed, last = range(1, self._steps - 1), self._steps - 1
        denoiser = [total("denoiser", i) for i in timed]
        scale = statistics.median(denoiser) / total("denoiser", last)
        first = next(span.begin for span in marks.spans if span.name == "denoiser")
        seconds = self._clock.seconds(marks.begin, marks.end)
        parts = {name: total(name) for name in ("encode", "decode", "mixing")}
        return StageTimes(
            seconds=seconds,
            steps=[self._clock.seconds(marks.steps[i - 1], marks.steps[i]) for i in timed],
            denoiser=denoiser,
            guidance=[total("guidance", i) for i in timed],
            attention=scale * total("attention", last) if self._deep else None,
            cross=scale * total("cross", last) if self._deep else None,
            **parts,
            rest=max(0.0, seconds - self._clock.seconds(first, marks.steps[-1]) - sum(parts.values())),
            peak=marks.peak,
        )


def _backend(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> str:  # fmt: skip
    """The one that torch chooses for such a call."""
    choice = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def composed(stages: list[StageTimes], steps: list[int]) -> float:
    """Seconds of a run with so many steps in each stage, from one that was watched.

    Raises:
        ValueError: not as many numbers as stages.
    """
    if len(stages) != len(steps):
        raise ValueError(f"every stage needs a number of steps, got {len(stages)} stages, {len(steps)=}")
    return sum(n * stage.step + stage.once for stage, n in zip(stages, steps, strict=True))
