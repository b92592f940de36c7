"""The quality benchmark's own arithmetic: the work it counts, the tables it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from bench import harness, quality
from scalediff.pipelines import preset


def test_work_is_the_sum_over_stages_levels_and_steps(demo: Any) -> None:
    """By hand: three modules at 16 x 16 tokens with 2 heads, four at 8 x 8 with 4 heads (D = 32), twice for guidance."""
    settings = preset(demo)

    def one_pass(scale: int, *, npa: bool) -> int:
        upper, lower = (16 * scale) ** 2, (8 * scale) ** 2
        return 4 * 32 * (3 * 2 * upper * (256 if npa else upper) + 4 * 4 * lower * (64 if npa else lower))

    base = 2 * settings.steps * one_pass(1, npa=False)
    npa = base + 2 * settings.stage_steps * (one_pass(2, npa=True) + one_pass(4, npa=True))
    assert quality.work(demo, 256, "npa") == npa
    spared = 9 - math.ceil(9 * 2 / 3)
    assert quality.work(demo, 256, "guided-two-thirds") == npa - spared * (one_pass(2, npa=True) + one_pass(4, npa=True))
    assert quality.work(demo, 256, "multidiffusion") == 49 * base
    assert quality.work(demo, 256, "demofusion") == (1 + (9 + 4) + (25 + 9) + (49 + 16)) * base
    full = base + 2 * settings.stage_steps * (one_pass(2, npa=False) + one_pass(4, npa=False))
    assert quality.work(demo, 256, "full") == full
    assert quality.work(demo, 256, "direct") == 2 * settings.steps * one_pass(4, npa=False)


def test_a_row_reaches_the_csv_and_the_table(tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: demo)
    table, results = tmp_path / "quality.md", tmp_path / "quality.csv"
    arguments = ["--n", "2", "--size", "128", "--rows", "true", "--out", str(table), "--csv", str(results)]
    quality.main(arguments)
    (row,) = harness.read_rows(results).values()
    assert row["row"] == "true"
    assert row["command"] == "python -m bench.quality --n 2 --size 128 --seed 0"
    assert row["torch"] == torch.__version__
    assert float(row["one_disc"]) == 1.0
    text = table.read_text()
    assert "| true renders | 2 | 128 | 100.0% |" in text
    assert "`python -m bench.quality --n 2 --size 128 --seed 0`" in text
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_words_are_counted(demo: Any) -> None:
    (row,) = quality.word_rows(demo, n=1, seed=0).values()
    assert row["n"] == 12
    assert row["hour"] >= 11 / 12
    assert 0 <= row["place"] <= 1


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--rows", "magic"])
    assert "got magic" in capsys.readouterr().err


def test_the_tables_in_docs_and_readme_are_those_of_the_results() -> None:
    (results,) = (harness.ROOT / "bench" / "results").glob("quality-*.csv")
    records = harness.read_rows(results)
    assert quality.summary(records) in (harness.ROOT / "README.md").read_text()
    assert quality.markdown(records) == (harness.ROOT / "docs" / "quality.md").read_text()
