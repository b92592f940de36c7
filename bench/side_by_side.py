"""Rows that are gated one by one and then timed, on a CPU side by side: what `bench.attention` and `bench.lowpass` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from bench import harness
from bench.gate import GateFailed
from bench.timing import Call, Timing, measure_in_turn, measure_side_by_side

Row = dict[str, str]
Item = TypeVar("Item")


class Entrant(NamedTuple):
    """A row so far, and the call that it is of on every set of inputs: none where there is nothing to time."""

    row: Row
    calls: Sequence[Call]


def groups(items: Sequence[Item], device: str) -> Iterator[Sequence[Item]]:
    """What is prepared and timed together: all on a CPU, where other work comes and goes; one on a GPU, whose memory is short."""
    yield from [items] if device == "cpu" else [[item] for item in items]


def gated(row: Row, prepare: Callable[[Row], Entrant], device: str) -> Entrant:
    """As it is prepared; FAILED where a gate says so, an error where it breaks: a baseline that cannot run is a result."""
    try:
        return prepare(row)
    except GateFailed as failed:
        return Entrant(row | {"status": "FAILED", "note": harness.first_line(failed)}, [])
    except Exception as problem:
        return Entrant(row | _broken(problem, device), [])


def timed(entrants: Sequence[Entrant], device: str, *, seconds: float) -> list[tuple[Row, Timing | None]]:
    """Their rows, with a time where there was something to time; `seconds` are for each."""
    running = [entrant for entrant in entrants if entrant.calls]
    try:
        if device == "cpu":
            timings = measure_side_by_side([one.calls for one in running], seconds=seconds * len(running)) if running else []
        else:
            timings = [measure_in_turn(one.calls, device, seconds=seconds) for one in running]
    except Exception as problem:
        return [(one.row | (_broken(problem, device) if one.calls else {}), None) for one in entrants]
    left = iter(timings)
    return [(one.row, next(left) if one.calls else None) for one in entrants]


def _broken(problem: Exception, device: str) -> Row:
    """What loses the device is not tried again."""
    status = "FAILED" if harness.device_lost(device) else "error"
    return {"status": status, "note": f"{type(problem).__name__}: {harness.first_line(problem)}"}
