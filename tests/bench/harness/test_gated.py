"""What is timed side by side and what alone; gates that fail, what breaks and what loses the device are rows without a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.attention import __main__ as attention
from bench.attention.compiled import PROVIDERS
from bench.attention.sdpa import one_window
from bench.attention.shapes import Task
from bench.harness import gated
from bench.harness import timing as roofline
from bench.harness.gated import Candidate, GateFailed
from bench.harness.timing import Timing
from tests.bench.made_up import EVEN


def candidate(name: str, call: Any = lambda: None, numbers: Any = lambda timing, beside: {}) -> Candidate:
    return Candidate({"row": name}, lambda: ({}, [call]), numbers)


def raising(problem: Exception) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise problem

    return call


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_breaks_while_it_is_timed_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("bench.harness.timing._by_events", lambda calls, seconds: Timing(1.0, 2.0, 3.0) if calls[0]() is None else None)
    monkeypatch.setattr(gated, "profiled", lambda call, device: {})
    monkeypatch.setattr("bench.harness.gated.forget", lambda device: None)
    group = [
        candidate("a", raising(RuntimeError("out of memory\nat last"))),
        Candidate({"row": "b"}, raising(AssertionError()), lambda timing, beside: {}, "no kernel"),
        candidate("c"),
    ]
    for lost, status in ((False, "error"), (True, "FAILED")):
        monkeypatch.setattr("bench.harness.device.device_lost", lambda device, lost=lost: lost)
        a, b, c = gated.measured(group, device, seconds=0.001)
        assert a == {"row": "a", "sets": "1", "status": status, "note": "RuntimeError: out of memory"}
        assert b == {"row": "b", "status": "skipped", "note": "no kernel"}
        assert (c["row"], c["status"]) == ("c", "ok")
        assert float(c["p20_ms"]) <= float(c["p50_ms"]) <= float(c["p80_ms"])


def test_what_breaks_after_the_clock_is_an_error() -> None:
    a, b = gated.measured(
        [candidate("a", numbers=raising(MemoryError("of the ceiling"))), candidate("b", numbers=lambda timing, beside: {"tflops": "1"})],
        "cpu",
        seconds=0.001,
    )
    assert a == {"row": "a", "sets": "1", "status": "error", "note": "MemoryError: of the ceiling"}
    assert (b["tflops"], b["status"]) == ("1", "ok")


def test_a_failed_gate_is_not_an_error() -> None:
    failing, broken = raising(GateFailed("image: NaN\nand more")), raising(AssertionError("of a compiler"))
    rows = list(gated.measured([Candidate({}, prepare, lambda timing, beside: {}) for prepare in (failing, broken)], "cpu", seconds=0.001))
    assert rows == [{"status": "FAILED", "note": "image: NaN"}, {"status": "error", "note": "AssertionError: of a compiler"}]
    assert list(gated.measured([], "cpu", seconds=1.0)) == list(gated.measured([], "cuda", seconds=1.0)) == []


def test_what_breaks_beside_the_rows_leaves_them() -> None:
    seen: list[Any] = []
    one = candidate("a", numbers=lambda timing, beside: seen.append(beside) or {})
    for call in (raising(MemoryError()), lambda: None):
        (row,) = gated.measured([one], "cpu", seconds=0.001, beside=lambda call=call: [call])
        assert row["status"] == "ok"
    assert seen[0] is None
    assert isinstance(seen[1], Timing)


def test_on_a_cpu_rows_are_timed_side_by_side_and_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared on a GPU is gone before the next one is; beside windows on a CPU one window alone."""
    made: list[str] = []

    def prepare(self: attention.Bench, provider: Any) -> Any:
        made.append(provider.name)
        return {"provider": provider.name}, [lambda: None]

    def together(entrants: Any, device: str, *, seconds: float) -> list[Timing]:
        made.append(f"{len(entrants)} in {seconds:g} s")
        return [Timing(1.0, 4.0, 5.0)] * len(entrants)

    monkeypatch.setattr(attention.Bench, "_prepare", prepare)
    monkeypatch.setattr(gated, "measure_together", together)
    monkeypatch.setattr(gated, "profiled", lambda call, device: {})
    monkeypatch.setattr("bench.harness.gated.forget", lambda device: made.append("."))
    providers = [PROVIDERS["sdpa"], PROVIDERS["full"]]
    flops = one_window(Task("even", EVEN, torch.float32, "cpu"))[1]
    for device, order, rate in (
        ("cuda", ["sdpa", ".", "1 in 2 s", ".", "full", ".", "1 in 2 s", "."], None),
        ("cpu", ["sdpa", ".", "full", ".", "3 in 4 s", "."], f"{flops / 4e9:.4g}"),
    ):
        bench = attention.Bench(Task("even", EVEN, torch.float32, device), lambda dtype: roofline.Ceilings(10.0, 0.1), seconds=2)
        rows = list(bench.measured(providers))
        assert [(r["provider"], r["status"], r["p50_ms"]) for r in rows] == [("sdpa", "ok", "4"), ("full", "ok", "4")]
        assert [r.get("window_tflops") for r in rows] == [rate, None], "full attention has no window"
        assert made == order
        made.clear()
    assert len(list(bench.measured(providers[1:]))) == 1
    assert made == ["full", ".", "1 in 2 s", "."], "nothing stands beside full attention"
