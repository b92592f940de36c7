"""Measuring the rows of a comparison: each passes its gate and is then timed, on a CPU side by side with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from bench.harness.device import broken, first_line, forget
from bench.harness.rows import Row
from bench.harness.timing import Call, Timing, kernels, measure_together, peak_memory


class GateFailed(Exception):
    """A result is wrong; the message says how."""


class Candidate(NamedTuple):
    """What becomes one row."""

    row: Row  # the columns that are known before anything runs
    prepare: Callable[[], tuple[Row, Sequence[Call]]]  # runs the gate; more columns, and the call on every set of inputs
    numbers: Callable[[Timing, Timing | None], Row]  # columns made from the timing, and that of what was timed beside it
    skipped: str = ""  # why it cannot run; empty where it may


def measured(
    candidates: Sequence[Candidate], device: str, *, seconds: float, beside: Callable[[], Sequence[Call]] | None = None
) -> Iterator[Row]:
    """Rows in order: skipped, FAILED at the gate, an error, or ok with its times.

    On a CPU all candidates are prepared and then timed together, and with them, where given, what is to be timed `beside` them. On a GPU,
    where memory is short, each is prepared and timed alone.
    """
    for group in [candidates] if device == "cpu" else [[one] for one in candidates]:
        prepared = [_prepared(one, device) for one in group]
        running = [calls for _, calls in prepared if calls]
        more = [beside()] if beside and running and device == "cpu" else []
        timings = measure_together(running + more, device, seconds=seconds * len(running))
        other = timings.pop() if more else None
        for one, (row, calls) in zip(group, prepared, strict=True):
            yield row | _finished(one, calls[0], timings.pop(0), other, device) if calls else row
        del prepared, running, more
        forget(device)


def _prepared(one: Candidate, device: str) -> tuple[Row, Sequence[Call]]:
    if one.skipped:
        return one.row | {"status": "skipped", "note": one.skipped}, []
    try:
        columns, calls = one.prepare()
        return one.row | columns | {"sets": str(len(calls))}, calls
    except GateFailed as failed:
        return one.row | {"status": "FAILED", "note": first_line(failed)}, []
    except Exception as problem:
        return one.row | broken(problem, device), []
    finally:
        forget(device)


def _finished(one: Candidate, call: Call, timing: Timing | Exception, other: Timing | Exception | None, device: str) -> Row:
    try:
        if isinstance(timing, Exception):
            raise timing
        row = {f"{name}_ms": f"{value:.4g}" for name, value in timing._asdict().items()}
        row |= one.numbers(timing, other if isinstance(other, Timing) else None)
    except Exception as problem:
        return broken(problem, device)
    return row | profiled(call, device) | {"status": "ok"}


def profiled(call: Call, device: str) -> Row:
    """Memory and kernels of a call on a GPU; what cannot be found out is a note, for the time is good."""
    row, notes = Row(), []
    for what, find in (("peak memory", _memory), ("kernels", _kernels)):
        try:
            row |= find(call, device)
        except Exception as problem:
            notes.append(f"{what} unknown: {type(problem).__name__}: {first_line(problem)}")
    return row | {"note": "; ".join(notes)}


def _memory(call: Call, device: str) -> Row:
    peak = peak_memory(call, device)
    return {} if peak is None else {"peak_megabytes": f"{peak / 1e6:.4g}"}


def _kernels(call: Call, device: str) -> Row:
    """How many kernels a call launches, the longest one by name, and the milliseconds of the five that take the most."""
    if (found := kernels(call, device)) is None:
        return {}
    if not found:
        raise RuntimeError("the profiler saw none")
    times = Counter[str]()
    for name, microseconds in found:
        times[name[:80]] += microseconds / 1000  # type: ignore[assignment]
    longest = ", ".join(f"{name[:40]} {time:.4g}" for name, time in times.most_common(5))
    return {"launches": str(len(found)), "kernel": max(found, key=lambda kernel: kernel[1])[0][:80], "kernels_ms": longest}
