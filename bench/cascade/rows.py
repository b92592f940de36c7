"""The rows of one picture by one method: its gate, its parts, its run, measured or composed, and never the one for the other.

A watched run has few steps in every stage, after one that warms up. The time of a true run is composed of it: so many steps, each as
long as the median of the timed ones, and what a stage does once. Where that is below the limit, the true run is measured as well, and
three times where that takes few seconds.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from bench.cascade.clock import Clock, DeviceClock, HostClock, Memory
from bench.cascade.gate import Gate, Verdict
from bench.cascade.methods import OURS, Drawn, Method, Planned, Work
from bench.cascade.models import SUBJECTS
from bench.cascade.watch import StageTimes, Watch, composed
from bench.harness import rows as harness
from bench.harness.timing import fused_attention
from bench.roofline.ceilings import Ceilings
from scalediff.patching.networks import denoiser_of

Row = dict[str, str]
COMPILE = ("eager", "compiled")
BACKEND = "inductor"
_GUESS = {"cuda": 0.3, "cpu": 0.7}  # of a matrix product's speed, before anything is measured
_RUNS, _AGAIN = 3, 20.0  # true runs at most, and the seconds of them after which none is begun
_GRAPHS = 128  # sizes, widths and levels that one block is compiled for


class Unit(NamedTuple):
    """What is measured in one go; its rows' names begin with `name`."""

    model: str
    size: int
    method: str
    compile: str

    @property
    def name(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Attributes:
        seconds: Of a run that is measured, and of what is watched to compose one; longer ones are composed, or skipped.
        steps: Steps of every watched stage that are timed.
    """

    seconds: float
    steps: int


class Bench:
    """One model: built when it is first needed, and shared by all its units."""

    def __init__(self, model: str, device: str, ceiling: Callable[[torch.dtype], Ceilings], limits: Limits, *, view_batch: int) -> None:
        self._subject, self._device, self._limits, self._ceiling = SUBJECTS[model], device, limits, ceiling
        self._view_batch, self.memory = view_batch, Memory(device)
        self.clock: Clock = DeviceClock() if device == "cuda" else HostClock()

    @cached_property
    def drawn(self) -> Drawn:
        return Drawn(self._subject, self._device, view_batch=self._view_batch)

    @cached_property
    def work(self) -> Work:
        return Work(self.drawn)

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.drawn)

    def rows(self, unit: Unit, method: Method) -> Iterator[Row]:
        """Parts as they are measured, and at last the run; a skipped, refused or failed unit has that row alone, or with its gate.

        What torch's attention is called for, by any method, has the backend that is fastest on the device.
        """
        with fused_attention(self._device, self._subject.dtype, self._subject.head_dim):
            yield from self._rows(unit, method)

    def _rows(self, unit: Unit, method: Method) -> Iterator[Row]:
        about: Row = {"model": unit.model, "size": str(unit.size), "method": unit.method, "compile": unit.compile}
        run = {**about, "row": f"{unit.name}/run", "part": "run"}
        try:
            if refusal := self._refusal(unit, method):
                yield run | {"status": "skipped", "note": refusal}
                return
            self.gate.prepare(method)
            with _compiled(self.drawn.pipe, on=unit.compile == "compiled"):
                for verdict in self.gate.check(method, unit.size, compiled=unit.compile == "compiled"):
                    yield {**about, "row": f"{unit.name}/gate-{verdict.name}", "part": "gate"} | _judged(verdict)
                    if not verdict.passed:
                        yield run | {"status": "FAILED", "note": f"not timed: it is not {verdict.what}"}
                        return
                yield from self._timed(unit, method, about, run)
        except NotImplementedError as refused:
            status = "error" if unit.method in OURS else "skipped"  # the library refuses nothing of what is its own
            yield run | {"status": status, "note": harness.first_line(refused)}
        except Exception as problem:
            yield run | harness.broken(problem, self._device)
        finally:
            harness.forget(self._device)

    def _refusal(self, unit: Unit, method: Method) -> str:
        if unit.compile == "compiled" and method.authors == "jitter":
            return "a new offset in every call would be a new graph in every call"
        if refusal := self.drawn.refusal(method):
            return refusal
        try:
            planned = self.drawn.plan(method, unit.size)
        except ValueError as wrong:
            return harness.first_line(wrong)
        guess = _GUESS[self._device]
        rate = guess * self._ceiling(self._subject.dtype).matrix_tflops
        step = sum(sum(self.work.step(method, one)) for one in planned)
        needed = (self._watched_steps + 1) * step / rate
        if needed > self._limits.seconds:
            speed = f"at {guess:.0%} of a matrix product's speed"
            return f"to watch it would take about {needed:.0f} s, {speed}, --limit is {self._limits.seconds:g} s"
        return ""

    @property
    def _watched_steps(self) -> int:
        return self._limits.steps + 2

    def _timed(self, unit: Unit, method: Method, about: Row, run: Row) -> Iterator[Row]:
        planned = self.drawn.plan(method, unit.size)
        before, watch, times = self._watched(unit, method)
        for index, (one, stage) in enumerate(zip(planned, times, strict=True), start=1):
            yield from self._parts(unit, method, about | {"stage": f"{index}-{one.size[0]}"}, one, stage, watch.backends[index - 1])
        told = composed(times, [one.steps for one in planned])
        useful = self.work.run(method, planned)
        row = run | {
            "status": "ok",
            "composed_s": f"{told:.5g}",
            "useful_tflop": f"{useful:.6g}",
            "steps": "+".join(str(p.steps) for p in planned),
        }
        if told <= self._limits.seconds:
            measured = self._whole(unit, method)
            row |= _percentiles(measured, 1) | {"measured_s": f"{statistics.median(measured):.5g}", "runs": str(len(measured))}
            row |= self._rate(useful, statistics.median(measured)) | {"rate_of": "measured"}
        else:
            row["note"] = f"composed, not measured: above --limit {self._limits.seconds:g} s"
            row |= self._rate(useful, told) | {"rate_of": "composed"}
        peaks = [stage.peak for stage in times]
        if before is not None and all(peak is not None for peak in peaks):
            row |= {"peak_megabytes": _mega(max(p for p in peaks if p is not None)), "before_megabytes": _mega(before)}
        yield row

    def _watched(self, unit: Unit, method: Method) -> tuple[int | None, Watch, list[StageTimes]]:
        """Bytes that are there before, the watch, and what it saw."""
        self.drawn.draw(method, unit.size, steps=1)
        gc.collect()
        self.memory.give_back()
        self.memory.reset()
        before = self.memory.now()
        watch = Watch(self.clock, self.memory, steps=self._watched_steps, deep=unit.compile == "eager")
        with watch.over(self.drawn.pipe):
            watch.begin()
            self.drawn.draw(method, unit.size, steps=self._watched_steps, on_stage=watch.on_stage, on_step=watch.on_step)
        return before, watch, watch.stages()

    def _whole(self, unit: Unit, method: Method) -> list[float]:
        """Seconds of true runs, with nothing watched."""
        seconds: list[float] = []
        while len(seconds) < _RUNS and sum(seconds) < _AGAIN:
            self.clock.wait()
            begin = self.clock.mark()
            self.drawn.draw(method, unit.size)
            end = self.clock.mark()
            self.clock.wait()
            seconds.append(self.clock.seconds(begin, end))
        return seconds

    def _parts(self, unit: Unit, method: Method, about: Row, one: Planned, stage: StageTimes, backends: str) -> Iterator[Row]:
        """Of one stage; what it does not have has no row, attention inside compiled graphs has one that says so."""
        forward = self.work.step(method, one)
        every: dict[str, tuple[list[float] | None, float | None]] = {  # seconds of a step, and its useful TFLOPs where they are counted
            "step": (stage.steps, sum(forward)),
            "denoiser": (stage.denoiser, sum(forward)),
            "attention": (None if stage.attention is None else [stage.attention], forward.attention),
            "cross": (None if stage.cross is None else [stage.cross], forward.cross),
            "guidance": (stage.guidance, None),
        }
        peak = {} if stage.peak is None else {"peak_megabytes": _mega(stage.peak)}
        for part, (seconds, useful) in every.items():
            row = about | {"row": f"{unit.name}/{about['stage']}/{part}", "part": part, "status": "ok"}
            if seconds is None:
                if part == "attention":
                    yield row | {"status": "skipped", "note": "inside compiled graphs, where it is not told apart"}
                continue
            if not any(seconds):
                continue
            row |= _percentiles(seconds, one.steps)
            if useful:
                row |= {"useful_tflop": f"{useful:.6g}"} | self._rate(useful, float(row["p50_ms"]) / 1000)
            yield row | (peak if part == "step" else {}) | ({"backend": backends} if part == "attention" else {})
        for part in ("encode", "decode", "mixing", "rest"):
            if seconds_once := getattr(stage, part):
                yield (
                    about | {"row": f"{unit.name}/{about['stage']}/{part}", "part": part, "status": "ok"} | _percentiles([seconds_once], 1)
                )

    def _rate(self, tflop: float, seconds: float) -> Row:
        ceiling = self._ceiling(self._subject.dtype).matrix_tflops
        rate = tflop / seconds if seconds > 0 else math.nan
        return {"tflops": f"{rate:.4g}", "matrix_percent": f"{100 * rate / ceiling:.3g}", "matrix_tflops": f"{ceiling:.4g}"}


@contextmanager
def _compiled(pipe: Any, *, on: bool) -> Iterator[None]:
    """With the denoiser's repeated blocks compiled, each of them whole; as they come after."""
    if not on:
        yield
        return
    denoiser: Any = denoiser_of(pipe)
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=BACKEND)
        try:
            yield
        finally:
            for module in denoiser.modules():
                module._compiled_call_impl = None
            torch._dynamo.reset()


def _judged(verdict: Verdict) -> Row:
    judged = {"error": f"{verdict.error:.3g}", "allowed": f"{verdict.allowed:.3g}"}
    return judged | {"status": "ok" if verdict.passed else "FAILED", "note": f"against {verdict.what}"}


def _percentiles(seconds: list[float], count: int) -> Row:
    """Milliseconds of each, and what that is in a run; of a single one the median alone."""
    p20, p50, p80 = torch.quantile(torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    row = {"p50_ms": f"{1000 * p50:.5g}", "count": str(count), "in_run_s": f"{count * p50:.5g}"}
    return row | ({"p20_ms": f"{1000 * p20:.5g}", "p80_ms": f"{1000 * p80:.5g}"} if len(seconds) > 1 else {})


def _mega(size: int) -> str:
    return f"{size / 1e6:.5g}"
