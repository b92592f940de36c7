"""The rows of one picture by one method: its gates, its parts, and its run, measured or composed, never one in place of the other.

A watched run has few steps in every stage, after one that warms up. The time of a whole run is composed of it: the true number of steps,
each as long as the median of the timed ones, and what a stage does once. If that is below the limit, the whole run is measured as well,
and up to three times if that takes few seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch

from bench.cascade.gate import Gate
from bench.cascade.methods import METHODS, OURS, Drawn, Method
from bench.cascade.models import SUBJECTS
from bench.cascade.watch import Clock, Memory, StageTimes, Watch, composed
from bench.flops.work import StagePlan, Work
from bench.harness.device import broken, first_line, forget
from bench.harness.facts import FACTS, VERSIONS
from bench.harness.rows import Row
from bench.harness.timing import fused_attention, percentiles
from scalediff.patching.networks import denoiser_of

SAME = (*FACTS, *VERSIONS, "timed_steps", "limit_s", "view_batch")
FIELDS = (
    "row", "status", "model", "size", "method", "compile", "stage", "part", "p20_ms", "p50_ms", "p80_ms", "count", "in_run_s", "steps",
    "composed_s", "measured_s", "runs", "rate_of", "useful_tflop", "tflops", "matrix_percent", "matrix_tflops", "peak_megabytes",
    "before_megabytes", "backend", "error", "allowed", "note", "command", *SAME,
)  # fmt: skip
COMPILE = ("eager", "compiled")
BACKEND = "inductor"
_SPEED = {"cuda": 0.3, "cpu": 0.7}  # share of a matrix product's, before anything is measured
_RUNS, _ENOUGH = 3, 20.0  # whole runs at most, and the seconds after which no further one is started
_GRAPHS = 128  # sizes, widths and levels that one block is compiled for


class Unit(NamedTuple):
    """What is measured in one go; the names of its rows begin with `name`."""

    model: str
    size: int
    method: str
    compile: str

    @property
    def name(self) -> str:
        return "/".join(map(str, self))

    def row(self, *name: str, **columns: str) -> Row:
        return {"row": "/".join([self.name, *name])} | {key: str(value) for key, value in self._asdict().items()} | columns


class Bench:
    """One model, built when it is first needed and shared by all its units."""

    def __init__(
        self, model: str, device: str, matrix_tflops: Callable[[torch.dtype], float], *, limit: float, steps: int, view_batch: int
    ) -> None:  # fmt: skip
        self._subject, self._device, self._matrix_tflops, self._view_batch = SUBJECTS[model], device, matrix_tflops, view_batch
        self.limit = limit  # seconds; longer runs are only composed, and one that would be watched for longer is skipped
        self._watched_steps = steps + 2
        self.memory, self.clock = Memory(device), Clock(device)

    @cached_property
    def drawn(self) -> Drawn:
        return Drawn(self._subject, self._device, view_batch=self._view_batch)

    @cached_property
    def work(self) -> Work:
        return self.drawn.work()

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.drawn)

    def rows(self, unit: Unit) -> Iterator[Row]:
        """Gates, parts as they are measured, and last the run; a unit that is skipped or fails has a row for its run all the same.

        Calls of torch's attention, by any method, take the backend that is fastest on the device.
        """
        try:
            with fused_attention(self._device, self._subject.dtype, self._subject.head_dim):
                yield from self._rows(unit, METHODS[unit.method])
        except NotImplementedError as refused:
            status = "error" if unit.method in OURS else "skipped"  # the library must not refuse a method of its own
            yield unit.row("run", part="run", status=status, note=first_line(refused))
        except Exception as problem:
            yield unit.row("run", part="run") | broken(problem, self._device)
        finally:
            forget(self._device)

    def _rows(self, unit: Unit, method: Method) -> Iterator[Row]:
        compiled = unit.compile == "compiled"
        if refusal := self._refusal(unit, method):
            yield unit.row("run", part="run", status="skipped", note=refusal)
            return
        self.gate.prepare(method)
        with _compiled(self.drawn.pipe) if compiled else nullcontext():
            for verdict in self.gate.check(method, unit.size, compiled=compiled):
                judged = {"error": f"{verdict.error:.3g}", "allowed": f"{verdict.allowed:.3g}", "note": f"against {verdict.what}"}
                yield unit.row(f"gate-{verdict.name}", part="gate", status="ok" if verdict.passed else "FAILED", **judged)
                if not verdict.passed:
                    yield unit.row("run", part="run", status="FAILED", note=f"not timed: it is not {verdict.what}")
                    return
            yield from self._timed(unit, method)

    def _refusal(self, unit: Unit, method: Method) -> str:
        """Why a unit is skipped; empty where it is measured."""
        if unit.compile == "compiled" and not method.repeatable:
            return "a new offset in every call would be a new graph in every call"
        if refusal := self.drawn.refusal(method):
            return refusal
        try:
            plan = self.drawn.plan(method, unit.size)
        except ValueError as wrong:
            return first_line(wrong)
        step, speed = sum(sum(self.work.step(stage)) for stage in plan), _SPEED[self._device]
        seconds = (self._watched_steps + 1) * step / (speed * self._matrix_tflops(self._subject.dtype))
        if seconds <= self.limit:
            return ""
        return f"to watch it would take about {seconds:.0f} s, at {speed:.0%} of a matrix product's speed, --limit is {self.limit:g} s"

    def _timed(self, unit: Unit, method: Method) -> Iterator[Row]:
        plan = self.drawn.plan(method, unit.size)
        before, stages = self._watched(unit, method)
        for number, (planned, times) in enumerate(zip(plan, stages, strict=True), start=1):
            yield from self._parts(unit, f"{number}-{planned.side}", planned, times)
        seconds, rate_of = composed(stages, [stage.steps for stage in plan]), "composed"
        row = unit.row("run", part="run", status="ok", composed_s=f"{seconds:.5g}", steps="+".join(str(stage.steps) for stage in plan))
        if seconds <= self.limit:
            whole = list[float]()
            while len(whole) < _RUNS and sum(whole) < _ENOUGH:
                whole.append(self.clock.timed(lambda: self.drawn.draw(method, unit.size)))
            seconds, rate_of = statistics.median(whole), "measured"
            row |= _percentiles(whole, 1) | {"measured_s": f"{seconds:.5g}", "runs": str(len(whole))}
        else:
            row["note"] = f"composed, not measured: above --limit {self.limit:g} s"
        run, coded = self.work.run(plan)
        row |= self._rate(sum(run) + coded, seconds) | {"rate_of": rate_of}
        peaks = [stage.peak for stage in stages if stage.peak is not None]
        if before is not None and len(peaks) == len(stages):
            row |= {"peak_megabytes": f"{max(peaks) / 1e6:.5g}", "before_megabytes": f"{before / 1e6:.5g}"}
        yield row

    def _watched(self, unit: Unit, method: Method) -> tuple[int | None, list[StageTimes]]:
        """Bytes that are in use before, and the times of every stage."""
        self.drawn.draw(method, unit.size, steps=1)
        forget("cpu")  # a GPU's allocator keeps its cache, as in a whole run
        self.memory.reset()
        before = self.memory.now()
        watch = Watch(self.clock, self.memory, steps=self._watched_steps, deep=unit.compile == "eager")
        hooks: dict[str, Any] = {"on_stage": watch.on_stage, "callback_on_step_end": watch.on_step}
        with watch.over(self.drawn.pipe):
            self.drawn.draw(method, unit.size, steps=self._watched_steps, **hooks)
        return before, watch.stages

    def _parts(self, unit: Unit, stage: str, planned: StagePlan, times: StageTimes) -> Iterator[Row]:
        """The parts of one stage, without those that it does not have."""
        work = self.work.step(planned)
        useful = {"step": sum(work), "denoiser": sum(work), "attention": work.attention, "cross": work.cross}
        peak = "" if times.peak is None else f"{times.peak / 1e6:.5g}"
        more: dict[str, Row] = {"attention": {"backend": times.backends}, "step": {"peak_megabytes": peak}}
        for part, seconds in (times.each | {part: [once] for part, once in times.once.items()}).items():
            if any(seconds):
                row = unit.row(stage, part, stage=stage, part=part, status="ok", **more.get(part, {}))
                row |= _percentiles(seconds, 1 if part in times.once else planned.steps)
                yield row | (self._rate(useful[part], float(row["p50_ms"]) / 1000) if useful.get(part) else {})
        if "attention" not in times.each:
            note = "inside compiled graphs, where it cannot be timed apart"
            yield unit.row(stage, "attention", stage=stage, part="attention", status="skipped", note=note)

    def _rate(self, tflop: float, seconds: float) -> Row:
        matrix = self._matrix_tflops(self._subject.dtype)
        rate = tflop / seconds if seconds > 0 else math.nan
        rates = {"tflops": f"{rate:.4g}", "matrix_percent": f"{100 * rate / matrix:.3g}", "matrix_tflops": f"{matrix:.4g}"}
        return {"useful_tflop": f"{tflop:.6g}", **rates}


@contextmanager
def _compiled(pipe: Any) -> Iterator[None]:
    """Inside, the denoiser's repeated blocks are compiled, each of them whole."""
    denoiser: Any = denoiser_of(pipe)
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
        denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=BACKEND)
        try:
            yield
        finally:
            for module in denoiser.modules():
                module._compiled_call_impl = None
            torch._dynamo.reset()


def _percentiles(seconds: Sequence[float], count: int) -> Row:
    """Milliseconds of each, and seconds of `count` of them in a run; only the median of a single one."""
    p20, p50, p80 = percentiles(seconds)
    row = {"p50_ms": f"{1000 * p50:.5g}", "count": str(count), "in_run_s": f"{count * p50:.5g}"}
    return row | ({"p20_ms": f"{1000 * p20:.5g}", "p80_ms": f"{1000 * p80:.5g}"} if len(seconds) > 1 else {})
