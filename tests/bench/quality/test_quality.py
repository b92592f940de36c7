"""The quality benchmark's own arithmetic: the work it counts, the turns its rows take, the tables it writes, what it refuses."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from bench.harness.facts import ROOT
from bench.harness.rows import read_rows
from bench.quality import __main__ as quality
from bench.quality import pictures
from bench.quality.pictures import Drawn, Task, draw, work
from bench.quality.tables import FACTS, RECORDED, TABLES, sections, summary
from scalediff.cascade.pipeline import preset


@pytest.fixture(autouse=True)
def kept_memory(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Calls of what would change this process for good."""
    calls: list[bool] = []
    monkeypatch.setattr(quality, "keep_freed_memory", lambda: calls.append(True))
    return calls


def test_work_is_the_sum_over_stages_levels_and_steps(demo: Any) -> None:
    """By hand: three modules at 16 x 16 tokens with 2 heads, four at 8 x 8 with 4 heads (D = 32), twice for guidance."""
    settings = preset(demo)

    def one_pass(scale: int, *, npa: bool) -> int:
        upper, lower = (16 * scale) ** 2, (8 * scale) ** 2
        return 4 * 32 * (3 * 2 * upper * (256 if npa else upper) + 4 * 4 * lower * (64 if npa else lower))

    def counted(row: str) -> Any:
        return pytest.approx(1e9 * work(demo, 256, row)[0])

    base = 2 * settings.steps * one_pass(1, npa=False)
    npa = base + 2 * settings.stage_steps * (one_pass(2, npa=True) + one_pass(4, npa=True))
    assert npa == counted("npa")
    spared = 9 - math.ceil(9 * 2 / 3)
    assert npa - spared * (one_pass(2, npa=True) + one_pass(4, npa=True)) == counted("guided-two-thirds")
    assert 49 * base == counted("multidiffusion")
    assert (1 + (9 + 4) + (25 + 9) + (49 + 16)) * base == counted("demofusion")
    full = base + 2 * settings.stage_steps * (one_pass(2, npa=False) + one_pass(4, npa=False))
    assert full == counted("full")
    assert 2 * settings.steps * one_pass(4, npa=False) == counted("direct")


def test_all_work_is_what_torch_counts_in_the_networks(demo: Any) -> None:
    """At native size in a run of the networks themselves; the rows above it differ in passes and in what they attend to."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def gflops(run: Callable[[], Any]) -> float:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    def decoding(side: int) -> float:
        return gflops(lambda: demo.vae.decode(torch.zeros(1, 4, side, side)))

    def encoding(side: int) -> float:
        return gflops(lambda: demo.vae.encode(torch.zeros(1, 3, 4 * side, 4 * side)))

    steps = 2 * preset(demo).steps
    forward = gflops(lambda: demo.unet(torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 24, 64)))
    assert steps * forward + decoding(16) == pytest.approx(work(demo, 64, "direct")[1])
    decoded = sum(decoding(16 * phase) for phase in (1, 2))
    assert steps * forward * (1 + 9 + 4) + decoded == pytest.approx(work(demo, 128, "demofusion")[1])
    npa, full, alone = (work(demo, 128, row) for row in ("npa", "full", "direct"))
    assert full[1] - npa[1] == pytest.approx(full[0] - npa[0])
    assert npa[1] - npa[0] < alone[1] - alone[0]
    above = 2 * preset(demo).stage_steps * gflops(lambda: demo.unet(torch.zeros(1, 4, 32, 32), 500, torch.zeros(1, 24, 64)))
    assert steps * forward + above + decoded + encoding(32) == pytest.approx(full[1])


def test_a_row_reaches_the_csv_and_the_table(tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: demo)
    table, results = tmp_path / "quality.md", tmp_path / "quality.csv"
    quality.main(["--n", "2", "--size", "128", "--rows", "true", "--csv", str(results)])
    (row,) = read_rows(results).values()
    assert row["row"] == "true"
    assert row["command"] == "python -m bench.quality --n 2 --size 128 --seed 0"
    assert row["torch"] == torch.__version__
    assert float(row["one_disc"]) == 1.0
    text = table.read_text()
    assert "| true renders | 2 | 128 | 100.0% |" in text
    assert "`python -m bench.quality --n 2 --size 128 --seed 0`" in text
    assert not list(tmp_path.glob("*.part"))


def test_the_work_of_further_methods_is_that_of_the_run(demo: Any) -> None:
    """Of one picture of a batch: the base picture alone, twice for guidance, and one decoding."""
    drawn = Drawn()
    draw(Task(demo, 2, 128, 0), "super-resolution", 0, drawn)
    assert len(drawn.images) == 2
    assert drawn.gflops == pytest.approx(work(demo, 64, "direct"))


def test_rows_are_written_without_pandas(
    tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: demo)
    monkeypatch.setitem(sys.modules, "pandas", None)
    quality.main(["--n", "1", "--size", "128", "--rows", "true", "--csv", str(tmp_path / "quality.csv")])
    assert capsys.readouterr().out.startswith("pandas is not installed: rows are written, the page is not\ntrue, ")
    assert [path.name for path in tmp_path.iterdir()] == ["quality.csv"]
    with pytest.raises(SystemExit, match="this needs pandas"):
        quality.main(["--doc"])


def _drawing(monkeypatch: pytest.MonkeyPatch, demo: Any, *, interrupted: int = 10**9) -> list[tuple[str, int]]:
    """Pictures of noise in place of the model's; returns what is drawn as it is drawn, until the user stops it."""
    requested: list[tuple[str, int]] = []

    def draw(task: pictures.Task, row: str, first: int, drawn: pictures.Drawn) -> None:
        if len(requested) == interrupted:
            raise KeyboardInterrupt
        requested.append((row, first))
        rng = torch.Generator().manual_seed(first)
        drawn.images += [torch.rand(3, task.size, task.size, generator=rng) for _ in range(min(4, task.n - first))]
        drawn.seconds.append(float(len(drawn.seconds) + 1))

    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: demo)
    monkeypatch.setattr(pictures, "draw", draw)
    return requested


def test_rows_take_turns_and_tell_the_spread_of_their_batches(
    tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch, kept_memory: list[bool]
) -> None:
    requested = _drawing(monkeypatch, demo)
    results, sheet = tmp_path / "mine.csv", tmp_path / "sheet.png"
    quality.main(["--n", "9", "--size", "128", "--rows", "full,direct,full", "--csv", str(results), "--sheet", str(sheet)])
    assert requested == [(row, first) for first in (0, 4, 8) for row in ("full", "direct")]
    assert kept_memory == [True]
    row = read_rows(results)["direct"]
    assert [row[name] for name in ("seconds", "seconds_p20", "seconds_p80")] == ["2", "1.4", "2.6"]
    assert float(row["all_gflops"]) > float(row["gflops"]) > 0
    text = (tmp_path / "mine.md").read_text()
    assert "| 2.00 (1.40 - 2.60) |" in text, "the page of a file elsewhere is beside it"
    assert sheet.exists()


def test_an_interrupted_run_keeps_the_rows_that_were_complete(tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _drawing(monkeypatch, demo, interrupted=4)
    results = tmp_path / "mine.csv"
    with pytest.raises(KeyboardInterrupt):
        quality.main(["--n", "8", "--size", "128", "--rows", "direct,true,npa,full", "--csv", str(results)])
    assert set(read_rows(results)) == {"direct", "true"}
    assert "\n".join(sections(read_rows(results))) in (tmp_path / "mine.md").read_text()


def test_rows_of_an_earlier_run_stay(tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without columns that came later, and those that no table has any more."""
    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: demo)
    results = tmp_path / "mine.csv"
    older = {"n": "8", "swd": "5", "seconds": "2", "gflops": "3", **dict.fromkeys(FACTS, "x")}
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row", *older])
        writer.writeheader()
        writer.writerows({"row": name, **older} for name in ("given up", "words", "npa", "direct"))
    quality.main(["--n", "2", "--size", "128", "--rows", "true", "--csv", str(results)])
    records = read_rows(results)
    assert list(records) == ["direct", "npa", "true", "words", "given up"]
    assert all(records["npa"][name] == value for name, value in older.items())
    assert records["npa"]["all_gflops"] == records["npa"]["seconds_p20"] == ""
    assert [line for line in sections(records) if line.startswith("| NPA + LFM + SG | 8 | - |")]
    assert "| NPA + LFM + SG | 5.0 | 2.00 | 3.00 |" in summary(records)


@pytest.mark.slow
def test_words_are_counted(demo: Any) -> None:
    (row,) = pictures.word_rows(demo, n=1, seed=0).values()
    assert row["n"] == 12
    assert row["hour"] >= 11 / 12
    assert 0 <= row["place"] <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "magic"], "got magic"),
        (["--n", "0"], "argument --n: must be positive and finite, got 0"),
        (["--native", "-1"], "argument --native: must be positive and finite, got -1"),
        (["--words", "0"], "argument --words: must be positive and finite, got 0"),
        (["--sheet", "sheet.svg"], "--sheet must be a .png or .jpg, got sheet.svg"),
        (["--size", "63"], "--size 63: "),
        (["--size", "32"], "--size 32: "),
        (["--size", "64"], "--size 64: the period must be"),
        (["--sweep", "--switches"], "not allowed with argument"),
        (["--doc", "--native", "4"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], sentence: str, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: demo)
    with pytest.raises(SystemExit) as stop:
        quality.main([*arguments, "--csv", str(tmp_path / "mine.csv")])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_benchmark_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "mine.csv"
    for text, sentence in (("row,magic\nnpa,1\n", "it differs in the columns magic"), ("case\nnpa\n", "must have a column 'row'")):
        results.write_text(text)
        with pytest.raises(SystemExit):
            quality.main(["--csv", str(results)])
        assert sentence in capsys.readouterr().err
        assert results.read_text() == text


def test_the_page_is_written_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_memory: list[bool]) -> None:
    monkeypatch.setattr(quality.scalediff, "load_demo", lambda: pytest.fail("a model was loaded"))
    before, page = quality.PAGE.read_text(), tmp_path / "quality.md"
    page.write_text("<!-- begin tables -->\nold\n<!-- end tables -->\n")
    monkeypatch.setattr(quality, "PAGE", page)
    quality.main(["--doc"])
    assert page.read_text().strip() == before[before.index("<!-- begin tables") :].strip()
    assert not kept_memory


def test_no_committed_row_is_lost() -> None:
    """All but the rows of methods that docs/evidence/quality.md says are not measured yet."""
    names = {name for records in quality.committed() for name in records}
    assert names | set(RECORDED) == {name for table in TABLES.values() for name in table}
    assert all(f"`{name}`" in quality.PAGE.read_text() for name in set(RECORDED) - names)


def test_the_tables_in_docs_and_readme_are_those_of_the_results() -> None:
    results = quality.committed()
    readme = (ROOT / "README.md").read_text()
    assert any("\n".join(summary(records)) in readme for records in results)
    assert "\n".join(["<!-- begin tables -->", "", *sections(*results), "", "<!-- end tables -->"]) in quality.PAGE.read_text()


def test_machines_have_tables_of_their_own() -> None:
    facts = dict.fromkeys(FACTS, "x")
    one, other = ({"true": {"row": "true", "n": n, **facts}} for n in ("1", "2"))
    text = "\n".join(sections(one, other))
    assert text.count("## The parts of the method") == 1
    assert text.index("| true renders | 1 |") < text.index("| true renders | 2 |")
