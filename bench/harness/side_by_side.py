"""Rows that are gated one by one and then timed, on a CPU side by side: what `bench.attention` and `bench.lowpass` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from bench.attention.gate import GateFailed
from bench.harness import rows as harness
from bench.harness.command import Row
from bench.harness.timing import Call, Timing, measure_in_turn, measure_side_by_side

Item = TypeVar("Item")


class Entrant(NamedTuple):
    """A row so far, and the call that it is of on every set of inputs: none where there is nothing to time."""

    row: Row
    calls: Sequence[Call]


def groups(items: Sequence[Item], device: str) -> Iterator[Sequence[Item]]:
    """What is prepared and timed together: all on a CPU, where other work comes and goes; one on a GPU, whose memory is short."""
    if items:
        yield from [items] if device == "cpu" else [[item] for item in items]


def gated(row: Row, prepare: Callable[[Row], Entrant], device: str) -> Entrant:
    """As it is prepared; FAILED where a gate says so, an error where it breaks."""
    try:
        return prepare(row)
    except GateFailed as failed:
        return Entrant(row | {"status": "FAILED", "note": harness.first_line(failed)}, [])
    except Exception as problem:
        return Entrant(row | harness.broken(problem, device), [])
    finally:
        harness.forget(device)


def timed(entrants: Sequence[Entrant], device: str, *, seconds: float) -> list[tuple[Row, Timing | None]]:
    """Their rows, with a time where there was something to time and it did not break.

    `seconds` are for each; on a CPU rounds of all take what they have together.
    """
    running = [one.calls for one in entrants if one.calls]
    if device == "cpu":
        found = iter(measure_side_by_side(running, seconds=seconds * len(running)))
    else:
        found = iter([_measured(calls, device, seconds) for calls in running])
    rows = list[tuple[Row, Timing | None]]()
    for row, calls in entrants:
        result = next(found) if calls else None
        rows.append((row | harness.broken(result, device), None) if isinstance(result, Exception) else (row, result))
    return rows


def finished(row: Row, more: Callable[[], Row], device: str) -> Row:
    """A row that was timed, with what is told of it after the clock; an error where that breaks."""
    try:
        return row | more() | {"status": "ok"}
    except Exception as problem:
        return row | harness.broken(problem, device)


def _measured(calls: Sequence[Call], device: str, seconds: float) -> Timing | Exception:
    try:
        return measure_in_turn(calls, device, seconds=seconds)
    except Exception as problem:
        return problem
