"""The filters' benchmark: one small run through every row, and the page that shows the committed rows."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import lowpass
from bench.timing import launches, measure

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_committed_rows() -> None:
    assert (ROOT / "docs" / "filters-measured.md").read_text() == lowpass.markdown(lowpass.committed())


def test_a_run_gates_and_times_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lowpass, "LATENTS", [lowpass.Case("small", (1, 2, 32, 32))])
    monkeypatch.setattr(lowpass, "FEATURES", [])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(SystemExit) as stop:
        lowpass.main(["--device", "cpu", "--seconds", "0.01", "--csv", str(tmp_path / "rows.csv")])
    assert stop.value.code == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [r for r in rows if r["implementation"] == "scalediff"]
    assert [r["operation"] for r in ours] == ["guided step", "mix frequencies", "low pass"]
    assert all(float(r["p50_ms"]) > 0 and float(r["error"]) < 1e-5 for r in ours)
    assert {"torchvision gaussian_blur", "kornia gaussian_blur2d"} <= {r["implementation"] for r in rows}, "absent or not, they are named"


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lowpass, "LATENTS", [lowpass.Case("small", (1, 2, 32, 32))])
    monkeypatch.setattr(lowpass, "FEATURES", [])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    own = lowpass.low_pass

    def wrong(x: Any, **how: Any) -> Any:
        return own(x, **how) + 1e-3

    monkeypatch.setattr(lowpass, "low_pass", wrong)
    with pytest.raises(SystemExit) as stop:
        lowpass.main(["--device", "cpu", "--seconds", "0.01", "--csv", str(tmp_path / "rows.csv")])
    assert stop.value.code == 1
    with (tmp_path / "rows.csv").open(newline="") as file:
        (row,) = [r for r in csv.DictReader(file) if (r["implementation"], r["operation"]) == ("scalediff", "low pass")]
    assert row["p50_ms"] == ""
    assert "exceeds the budget" in row["note"]


def test_what_was_timed_at_a_commit_is_not_timed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lowpass, "LATENTS", [lowpass.Case("small", (1, 2, 32, 32)), lowpass.Case("other", (1, 2, 32, 32))])
    monkeypatch.setattr(lowpass, "FEATURES", [])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    timed: list[tuple[str, str, str]] = []
    own = lowpass.measured

    def watched(case: Any, row: Any, *rest: Any, **how: Any) -> dict[str, str]:
        timed.append((case.name, row.operation, row.implementation))
        return own(case, row, *rest, **how)

    monkeypatch.setattr(lowpass, "measured", watched)
    path = tmp_path / "rows.csv"

    def run(*arguments: str, commit: str = "abc") -> list[tuple[str, str, str]]:
        timed.clear()
        with pytest.raises(SystemExit):
            lowpass.main(["--device", "cpu", "--seconds", "0.01", "--csv", str(path), "--commit", commit, *arguments])
        return list(timed)

    every = run()
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:4]) + "\n")
    absent = [key for key in every if "gaussian_blur" in key[2]]  # may have no time; these do not stand
    assert run() == every[3:], "the first three rows stand"
    assert len(path.read_text().splitlines()) == len(whole)
    assert set(run()) <= set(absent)
    assert set(run("--cases", "other", "--again")) == {key for key in every if key[0] == "other"}
    assert len(path.read_text().splitlines()) == len(whole), "rows that were not asked for are kept"
    assert run("--again") == every
    assert run(commit="def") == every, "another commit"
    assert run(commit="abc with changes") == run(commit="abc with changes") == every


def test_percentiles_are_in_order() -> None:
    timing = measure(lambda: sum(range(1000)), "cpu", seconds=0.01)
    assert 0 < timing.p20 <= timing.p50 <= timing.p80
    assert launches(lambda: None, "cpu") is None


def test_the_ratios_in_prose_are_those_of_the_committed_rows() -> None:
    """docs/filters.md: guided steps on latents, against the definition line by line and against one filter a step."""
    (rows,) = (rows for rows in lowpass.committed().values() if not rows[0]["launches"])
    ratios: dict[str, list[float]] = {"eager": [], "eager, line by line": []}
    for case in {r["case"] for r in rows if r["case"].startswith("latent")}:
        times = {r["implementation"]: float(r["p50_ms"]) for r in rows if (r["case"], r["operation"]) == (case, "guided step")}
        for name, found in ratios.items():
            found.append(times[name] / times["scalediff"])
    by_line, (worst, *others) = sorted(ratios["eager, line by line"]), sorted(ratios["eager"])
    prose = (ROOT / "docs" / "filters.md").read_text()
    assert (
        f"{by_line[0]:.1f}x to {by_line[-1]:.1f}x; against one filter per step, written by hand, {others[0]:.1f}x to {others[-1]:.1f}x"
        in prose
    )
    assert f"but {worst:.1f}x for a single latent of four channels" in prose
