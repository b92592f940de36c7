"""Rows that appear whole, stand or are measured again, and are compared with a word about what differs; clocks and ceilings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import harness, roofline, timing
from bench.timing import Timing, kernels, measure_in_turn, peak_memory

ROOT = Path(__file__).parents[2]
FACTS = {"machine": "X", "commit": "abc", "torch": "2"}


def row(name: str, time: str, **facts: str) -> dict[str, str]:
    return {"row": name, "p50_ms": time} | FACTS | facts


def test_rows_stand_only_with_the_same_facts_of_one_commit() -> None:
    rows = {"a": row("a", "1"), "b": row("b", "1", commit="def"), "c": row("c", "1", machine="Y"), "d": {"row": "d"}}
    assert harness.standing(rows, FACTS) == {"a"}
    for commit in ("unknown", "abc with changes"):
        changed = {"a": row("a", "1", commit=commit)}
        assert harness.standing(changed, FACTS | {"commit": commit}) == set()


def test_a_comparison_says_what_differs_before_any_ratio() -> None:
    here = {"a": row("a", "2"), "b": row("b", ""), "c": row("c", "1"), "d": row("d", "1")}
    there = {"a": row("a", "3", commit="def"), "b": row("b", "1", commit="def"), "c": row("c", "", commit="def"), "e": row("e", "1")}
    assert harness.compared(here, there, facts=tuple(FACTS)) == [
        "not the same commit: here abc, there def; the ratios below hold that too",
        "a: 2 ms here, 3 ms there, 1.500x",
        "b: no time here",
        "c: no time there",
        "1 rows are only here",
        "1 rows are only there",
    ]
    same = {"a": row("a", "2")}
    assert harness.compared(same, same, facts=tuple(FACTS)) == ["a: 2 ms here, 2 ms there, 1.000x"]
    empty = {"a": row("a", "")}
    assert harness.compared(empty, empty, facts=tuple(FACTS)) == ["a: no time in either"]
    assert harness.compared(same, {"z": row("z", "1")}, facts=tuple(FACTS)) == ["no row is in both files: 1 rows here, 1 there"]


def test_a_fact_that_is_not_told_differs_from_one_that_is() -> None:
    (said, _) = harness.compared({"a": row("a", "1")}, {"a": {"row": "a", "p50_ms": "1", "machine": "X", "torch": "2"}}, facts=tuple(FACTS))
    assert said == "not the same commit: here abc, there nothing said; the ratios below hold that too"


def test_rows_are_read_back_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    assert harness.read_rows(path) == {}
    harness.write_rows(path, ("row", "p50_ms"), [{"row": "a", "p50_ms": "1"}])
    assert harness.read_rows(path) == {"a": {"row": "a", "p50_ms": "1"}}
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"], "nothing half written is left"
    path.write_text("row,p50_ms\na,1\na,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv must name every row once, got 1 names again"):
        harness.read_rows(path)
    path.write_text("name\na\n")
    with pytest.raises(ValueError, match=r"rows\.csv must have a column 'row', got \['name'\]"):
        harness.read_rows(path)


def test_the_commit_is_given_found_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert harness.facts(commit="0123abc")["commit"] == "0123abc"
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert harness.facts()["commit"] == "unknown"


def test_sets_are_taken_in_turn_after_each_was_warmed_up() -> None:
    called: list[int] = []
    calls = [lambda i=i: called.append(i) for i in range(3)]
    timing = measure_in_turn(calls, "cpu", seconds=1e-4)
    assert called[:3] == [0, 1, 2]
    timed = called[next(i for i in range(3, len(called)) if called[i] == 1) - 1 :]
    assert timed == [i % 3 for i in range(len(timed))]
    assert len(timed) >= 3
    assert 0 <= timing.p20 <= timing.p50 <= timing.p80
    assert peak_memory(lambda: None, "cpu") is None
    assert kernels(lambda: None, "cpu") is None


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 256 MB in 100 ms moves twice that; a product of 2048^3 is 2 x 2048^3 operations."""

    def fixed(calls: Any, device: str, *, seconds: float) -> Timing:
        calls[0]()
        return Timing(90.0, 100.0, 110.0)

    monkeypatch.setattr(roofline, "measure_in_turn", fixed)
    found = roofline.ceilings("cpu", torch.float32)
    assert found.copy_gbs == pytest.approx(2 * 2**28 / 0.1 / 1e9)
    assert found.matrix_tflops == pytest.approx(2 * 2048**3 / 0.1 / 1e12)


def test_the_attention_benchmark_loads_neither_triton_nor_model_libraries() -> None:
    code = "import sys, torch; before = set(sys.modules); import bench.attention; print(*(set(sys.modules) - before))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout.split()
    assert {"triton", "diffusers", "transformers", "natten", "scalediff"}.isdisjoint(loaded)


def test_attention_takes_the_fastest_backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own switches say inside; cuDNN has no kernel here."""

    def measured(call: Any, device: str, *, seconds: float) -> Timing:
        if torch.backends.cuda.cudnn_sdp_enabled():
            raise RuntimeError("No available kernel")
        return Timing(1.0, 2.0 if torch.backends.cuda.flash_sdp_enabled() else 1.5, 3.0)

    monkeypatch.setattr(timing, "measure", measured)
    timing.by_speed.cache_clear()
    assert timing.by_speed("cpu", torch.float16) == (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION)
    timing.by_speed.cache_clear()


def test_rows_of_another_benchmark_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    harness.write_rows(tmp_path / "x.csv", ["row", "part"], [{"row": "a", "part": "run"}])
    assert harness.read_rows(tmp_path / "x.csv", ["part", "row"]) == {"a": {"row": "a", "part": "run"}}
    with pytest.raises(ValueError, match=r"x.csv is not of this benchmark and version of it.* differ in p50_ms, part"):
        harness.read_rows(tmp_path / "x.csv", ["row", "p50_ms"])
