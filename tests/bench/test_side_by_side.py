"""What is timed side by side and what alone; gates that fail, what breaks and what loses the device are rows without a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import attention, roofline, side_by_side
from bench.gate import GateFailed
from bench.providers_compiled import PROVIDERS
from bench.shapes import Task
from bench.side_by_side import Entrant
from bench.timing import Timing
from tests.bench.made_up import EVEN

TWICE = [Entrant({"row": "a"}, [lambda: None]), Entrant({"row": "b", "status": "skipped"}, []), Entrant({"row": "c"}, [lambda: None])]


@pytest.mark.parametrize(("device", "name"), [("cpu", "measure_side_by_side"), ("cuda", "measure_in_turn")])
def test_what_breaks_while_it_is_timed_is_an_error(monkeypatch: pytest.MonkeyPatch, device: str, name: str) -> None:
    def broken(*calls: Any, **how: Any) -> Any:
        raise RuntimeError("out of memory\nat last")

    monkeypatch.setattr(side_by_side, name, broken)
    for lost, status in ((False, "error"), (True, "FAILED")):
        monkeypatch.setattr("bench.harness.device_lost", lambda device, lost=lost: lost)
        told = {"status": status, "note": "RuntimeError: out of memory"}
        assert side_by_side.timed(TWICE, device, seconds=1.0) == [
            ({"row": "a"} | told, None), ({"row": "b", "status": "skipped"}, None), ({"row": "c"} | told, None),
        ]  # fmt: skip


def test_what_is_skipped_takes_no_time() -> None:
    assert side_by_side.timed(TWICE[1:2], "cpu", seconds=1.0) == [({"row": "b", "status": "skipped"}, None)]
    found = side_by_side.timed(TWICE, "cpu", seconds=0.001)
    assert [timing is not None for _, timing in found] == [True, False, True]


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
    monkeypatch.setattr("bench.harness.forget", lambda device: made.append("forgotten"))
    providers = [PROVIDERS["sdpa"], PROVIDERS["full"]]
    one = roofline.one_window(Task("even", EVEN, torch.float32, "cpu"))
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
