"""What is timed side by side and what alone; gates that fail, what breaks and what loses the device are rows without a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.attention import __main__ as attention
from bench.attention.compiled import PROVIDERS
from bench.attention.gate import GateFailed
from bench.attention.sdpa import one_window
from bench.attention.shapes import Task
from bench.harness import side_by_side
from bench.harness.side_by_side import Entrant
from bench.harness.timing import Timing
from bench.roofline import ceilings as roofline
from tests.bench.made_up import EVEN

SKIPPED = Entrant({"row": "b", "status": "skipped"}, [])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_breaks_while_it_is_timed_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def broken() -> None:
        raise RuntimeError("out of memory\nat last")

    monkeypatch.setattr("bench.harness.timing._wait", lambda device: None)
    monkeypatch.setattr("bench.harness.timing._by_events", lambda calls: [1.0 for call in calls if call() is None])
    entrants = [Entrant({"row": "a"}, [broken]), SKIPPED, Entrant({"row": "c"}, [lambda: None])]
    for lost, status in ((False, "error"), (True, "FAILED")):
        monkeypatch.setattr("bench.harness.rows.device_lost", lambda device, lost=lost: lost)
        (a, a_time), (b, b_time), (c, c_time) = side_by_side.timed(entrants, device, seconds=0.001)
        assert (a, a_time) == ({"row": "a", "status": status, "note": "RuntimeError: out of memory"}, None)
        assert (b, b_time, c) == (SKIPPED.row, None, {"row": "c"})
        assert isinstance(c_time, Timing)


def test_what_breaks_after_the_clock_is_an_error() -> None:
    def broken() -> dict[str, str]:
        raise MemoryError("of the ceiling")

    assert side_by_side.finished({"row": "a"}, broken, "cpu") == {"row": "a", "status": "error", "note": "MemoryError: of the ceiling"}
    assert side_by_side.finished({"row": "a"}, lambda: {"p50_ms": "1"}, "cpu") == {"row": "a", "p50_ms": "1", "status": "ok"}


def test_nothing_to_time_takes_no_time() -> None:
    assert side_by_side.timed([SKIPPED], "cpu", seconds=1.0) == [(SKIPPED.row, None)]
    assert [list(side_by_side.groups([], device)) for device in ("cpu", "cuda")] == [[], []]


def test_a_failed_gate_is_not_an_error() -> None:
    def failing(row: dict[str, str]) -> Entrant:
        raise GateFailed("image: NaN\nand more")

    def broken(row: dict[str, str]) -> Entrant:
        raise AssertionError("of a compiler")

    assert side_by_side.gated({"row": "a"}, failing, "cpu") == ({"row": "a", "status": "FAILED", "note": "image: NaN"}, [])
    assert side_by_side.gated({"row": "a"}, broken, "cpu") == ({"row": "a", "status": "error", "note": "AssertionError: of a compiler"}, [])


def test_on_a_cpu_rows_are_timed_side_by_side_and_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared on a GPU is gone before the next one is; beside windows on a CPU one window alone."""
    made: list[str] = []

    def entrant(self: attention.Bench, provider: Any) -> Entrant:
        made.append(provider.name)
        return Entrant({"provider": provider.name}, [lambda: None])

    def alone(calls: Any, device: str, *, seconds: float) -> Timing:
        made.append("timed")
        return Timing(1.0, 2.0, 3.0)

    def beside(entrants: Any, *, seconds: float) -> list[Timing]:
        made.append(f"{len(entrants)} in {seconds:g} s")
        return [Timing(1.0, 4.0, 5.0)] * len(entrants)

    monkeypatch.setattr(attention.Bench, "_entrant", entrant)
    monkeypatch.setattr(side_by_side, "measure_in_turn", alone)
    monkeypatch.setattr(side_by_side, "measure_side_by_side", beside)
    monkeypatch.setattr(attention, "_counted", lambda call, device: {})
    monkeypatch.setattr("bench.harness.rows.forget", lambda device: made.append("forgotten"))
    providers = [PROVIDERS["sdpa"], PROVIDERS["full"]]
    one = one_window(Task("even", EVEN, torch.float32, "cpu"))
    for device, p50, order, rate in (
        ("cuda", "2", ["sdpa", "timed", "forgotten", "full", "timed", "forgotten"], None),
        ("cpu", "4", ["sdpa", "full", "3 in 6 s", "forgotten"], f"{one.flops / 4e9:.4g}"),
    ):
        bench = attention.Bench(Task("even", EVEN, torch.float32, device), lambda dtype: roofline.Ceilings(10.0, 0.1), seconds=2)
        rows = list(bench.measured(providers))
        assert [(r["provider"], r["status"], r["p50_ms"]) for r in rows] == [("sdpa", "ok", p50), ("full", "ok", p50)]
        assert [r.get("window_tflops") for r in rows] == [rate, None], "full attention has no window"
        assert made == order
        made.clear()
    assert len(list(bench.measured(providers[1:]))) == 1
    assert made == ["full", "1 in 2 s", "forgotten"], "nothing stands beside full attention"
