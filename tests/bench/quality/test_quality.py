"""The quality benchmark's own arithmetic: which pictures it draws, what it says of them, the tables it writes, what it refuses."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

import scalediff
from bench.harness.facts import ROOT
from bench.harness.rows import read_rows
from bench.quality import __main__ as quality
from bench.quality import measuring
from bench.quality.measuring import Measured, differences, measure
from bench.quality.metrics import base_distance, power_above
from bench.quality.pictures import Gallery, Pictures
from bench.quality.tables import DRAWINGS, FACTS, ROW_NAMES, TABLES, Drawing, sections, summary
from scalediff.command import loading
from scalediff.demo.scenes import HELD_OUT_SEED, caption, describe, render
from scalediff.methods import METHODS


@pytest.fixture(autouse=True)
def kept_memory(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Calls of what would change this process for good."""
    calls: list[bool] = []
    monkeypatch.setattr(quality, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(measuring, "DRAWS", 30)
    return calls


@dataclass
class Noise:
    """`scalediff.generate` with pictures of noise: which are drawn, and after how many the user stops it."""

    drawn: list[tuple[str, int]] = field(default_factory=list)
    stop_after: int = 10**9

    def __call__(self, pipe: Any, prompt: str, *, height: int, method: str, generator: torch.Generator, **_: Any) -> Any:
        if len(self.drawn) == self.stop_after:
            raise KeyboardInterrupt
        seed = generator.initial_seed()
        assert prompt == caption(describe(HELD_OUT_SEED + seed))
        self.drawn.append((method, seed))
        rng = np.random.default_rng(seed)
        base, image = ([Image.fromarray(rng.integers(0, 255, (y, y, 3), dtype=np.uint8))] for y in (64, height))
        stages = [SimpleNamespace(images=base), SimpleNamespace(images=image)]
        return SimpleNamespace(images=image, stages=stages[1:] if method == "direct" else stages)


@pytest.fixture
def noise(demo: Any, monkeypatch: pytest.MonkeyPatch) -> Noise:
    noise = Noise()
    monkeypatch.setattr(loading, "load_demo", lambda: demo)
    monkeypatch.setattr(scalediff, "generate", noise)
    return noise


def places(folder: Path) -> list[str]:
    return ["--pictures", str(folder / "pictures"), "--csv", str(folder / "mine.csv")]


def test_every_method_of_the_library_is_a_row_but_that_for_flow_models() -> None:
    more = "super-resolution-trained", "sdedit", "full", "npa", "true", "autoencoded"
    assert set(TABLES["methods"].rows) == {*METHODS, *more} - {"hiflow"}
    assert all(row in DRAWINGS for table in TABLES.values() for row in table.rows)


def test_scenes_that_settings_were_chosen_on_are_in_no_other_table() -> None:
    tuned = set(TABLES["sweep"].scenes)
    assert not any(tuned & set(table.scenes) for name, table in TABLES.items() if name != "sweep")


def test_all_rows_take_turns_and_a_run_that_was_interrupted_goes_on(tmp_path: Path, noise: Noise, kept_memory: list[bool]) -> None:
    arguments = ["--n", "2", "--size", "128", "--rows", "direct,npa,true", *places(tmp_path)]
    noise.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments)
    assert noise.drawn == [("direct", 1000), ("scalediff", 1000), ("direct", 1001)]
    assert not (tmp_path / "mine.csv").exists()
    noise.stop_after = 10**9
    quality.main(arguments)
    assert noise.drawn[3:] == [("scalediff", 1001)]
    assert kept_memory == [True, True]
    rows = read_rows(tmp_path / "mine.csv")
    assert list(rows) == ["methods/direct", "methods/npa", "methods/true"]
    assert rows["methods/npa"]["command"] == "python -m bench.quality --tables methods --n 2 --size 128"
    assert "\n".join(sections(rows)) in (tmp_path / "mine.md").read_text()


def test_processes_share_the_pictures_of_a_table(tmp_path: Path, noise: Noise) -> None:
    arguments = ["--tables", "preset", "--n", "5", "--size", "128", "--rows", "npa,alone", *places(tmp_path), "--draw"]
    for share in range(2):
        quality.main([*arguments, "--shard", f"{share}/2"])
        assert {seed % 2 for _, seed in noise.drawn[-4:]} == {share}
    assert sorted(noise.drawn) == sorted([("scalediff", 1000 + i) for i in range(5)] * 2)
    assert not (tmp_path / "mine.csv").exists()


def test_pictures_of_other_settings_are_refused(tmp_path: Path, demo: Any, noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    Gallery(tmp_path, demo, 128).draw("npa", 1000)
    monkeypatch.setitem(DRAWINGS, "npa", Drawing("npa", {"restart": 0.9}))
    with pytest.raises(ValueError, match="belongs to another run"):
        Gallery(tmp_path, demo, 128).draw("npa", 1001)


def test_a_row_has_its_upsampler_and_pictures_without_it_are_refused(tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    def generate(pipe: Any, prompt: str, *, upsampler: Any, **arguments: Any) -> Any:
        used.append(upsampler)
        return Noise()(pipe, prompt, **arguments)

    monkeypatch.setattr(scalediff, "generate", generate)
    for row in ("super-resolution", "super-resolution-trained", "upsampler"):
        Gallery(tmp_path, demo, 128).draw(row, 1000)
    assert [upsampler and upsampler.factor for upsampler in used] == [None, 2, 2]
    monkeypatch.setitem(DRAWINGS, "upsampler", Drawing("bicubic", {}))
    with pytest.raises(ValueError, match="belongs to another run"):
        Gallery(tmp_path, demo, 128).draw("upsampler", 1001)


def test_a_drawn_picture_has_its_base_and_the_work_of_its_run(tmp_path: Path, trained_demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by hand: three modules at 16 x 16 tokens with 2 heads, four at 8 x 8 with 4 heads (D = 32), twice for guidance."""

    def one_pass(scale: int, *, npa: bool) -> int:
        upper, lower = (16 * scale) ** 2, (8 * scale) ** 2
        return 4 * 32 * (3 * 2 * upper * (256 if npa else upper) + 4 * 4 * lower * (64 if npa else lower))

    for attention in ("npa", "full"):
        few = {"steps": 2, "restart": 0.5, "attention": attention}
        monkeypatch.setitem(DRAWINGS, attention, Drawing(attention, few))
    for row, bf16 in (("npa", False), ("full", False), ("npa", True)):
        gallery = Gallery(tmp_path, trained_demo, 128, bf16=bf16)
        gallery.draw(row, 1000)
        found = gallery.read(row, [1000])
        assert found.bases is not None
        assert found.images.shape == (1, 3, 128, 128)
        assert found.bases.shape == (1, 3, 64, 64)
        assert found.gflops is not None
        assert 1e9 * found.gflops[0] == pytest.approx(4 * one_pass(1, npa=False) + 2 * one_pass(2, npa=row == "npa"))
        assert found.gflops[1] > found.gflops[0]
        assert found.seconds[0] > 0
    exact, mixed = (Gallery(tmp_path, trained_demo, 128, bf16=bf16).read("npa", [1000]).images for bf16 in (False, True))
    assert 0 < (exact - mixed).abs().mean() < 2**-8  # a rounding of the denoiser's products; the error of its output is one of them


def test_what_is_said_of_pictures_is_relative_to_their_true_renders(demo: Any) -> None:
    """Pictures of half the contrast: a quarter of the power; the bootstrap's errors are those of a mean over pictures."""
    true = render(HELD_OUT_SEED, 6, 128)
    bases = torch.nn.functional.interpolate(true, size=64, mode="area")
    exact = measure(demo, Pictures(true, bases), true, first_scene=HELD_OUT_SEED)
    columns = exact.columns
    assert columns["one_disc"] == columns["discs"] == columns["faint"] == 1
    assert columns["swd"] == columns["swd_128"] == columns["above"] == columns["spectrum"] == 0
    assert columns["to_base"] == pytest.approx(100)
    half = measure(demo, Pictures(true / 2, bases), true, first_scene=HELD_OUT_SEED)
    assert half.columns["above"] == pytest.approx(-20 * np.log10(2), abs=1e-4)
    assert half.columns["above_se"] < 1e-4, "the same factor in every picture"
    distances = base_distance(true / 2, bases)
    assert half.columns["to_base"] == pytest.approx(float(distances.mean()), rel=1e-5)
    assert half.columns["to_base_se"] == pytest.approx(float(distances.std(correction=0) / 6**0.5), rel=0.4)  # of 30 draws
    assert half.columns["to_base_se"] > 0
    nyquist = float(power_above(true, frequency=0.25).sum())
    assert 10 * np.log10(float(power_above(true / 2, frequency=0.25).sum()) / nyquist) == pytest.approx(half.columns["above"], abs=1e-4)
    gap = differences(half, exact)
    assert gap["to_base_gap"] == pytest.approx(half.columns["to_base"] - 100)
    assert gap["above_gap_se"] < 1e-4


def test_differences_are_of_the_same_pictures() -> None:
    draws = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = Measured({"swd": 5.0, "swd_16": 1.0, "n": 2}, {"swd": draws, "swd_16": draws})
    b = Measured({"swd": 3.0, "swd_16": 2.5, "faint": 1.0}, {"swd": draws + 2, "swd_16": 3 * draws, "faint": draws})
    found = differences(a, b)
    of_level = {"swd_16_gap": -1.5, "swd_16_gap_se": pytest.approx(float(2 * draws.std()))}
    assert found == {"swd_gap": 2.0, "swd_gap_se": pytest.approx(0, abs=1e-12), **of_level}
    rows = {f"parts/{name}": {"row": f"parts/{name}", "n": "2", **dict.fromkeys(FACTS, "x")} for name in ("npa", "no-lfm")}
    rows["parts/no-lfm"] |= {name: str(value) for name, value in (found | {"swd_16_gap_se": 0.26}).items()}
    assert "| NPA without LFM | - | - | - | +2.0 ± 0.0 | -2 ± 0 | - | - |" in sections(rows)


def test_rows_of_an_earlier_run_stay(tmp_path: Path, noise: Noise) -> None:
    """Those without columns that came later, and those that no table has any more."""
    results = tmp_path / "mine.csv"
    older = {"n": "8", "swd": "5", "seconds": "2", "all_gflops": "3", **dict.fromkeys(FACTS, "x")}
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row", *older])
        writer.writeheader()
        writer.writerows({"row": name, **older} for name in ("given up", "words", "methods/npa", "methods/direct"))
    quality.main(["--n", "2", "--size", "128", "--rows", "true", "--sheet", str(tmp_path / "sheet.png"), *places(tmp_path)])
    records = read_rows(results)
    assert list(records) == ["methods/direct", "methods/npa", "methods/true", "words", "given up"]
    assert all(records["methods/npa"][name] == value for name, value in older.items())
    assert records["methods/npa"]["gflops"] == records["methods/npa"]["swd_se"] == ""
    assert [line for line in sections(records) if line.startswith("| NPA + LFM + SG | 8 | - |")]
    assert "| NPA + LFM + SG | 8 | - | - | 5.0 | - | 2.0 | 3 |" in summary(records)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 130 - 2, 2 * (128 + 14))


def test_rows_are_written_without_pandas(
    tmp_path: Path, noise: Noise, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    quality.main(["--n", "1", "--size", "128", "--rows", "true", *places(tmp_path)])
    assert capsys.readouterr().out.startswith("pandas is not installed: rows are written, the page is not\nmethods/true, ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.csv"]
    with pytest.raises(SystemExit, match="this needs pandas"):
        quality.main(["--doc"])


@pytest.mark.slow
def test_words_are_counted(trained_demo: Any) -> None:
    (row,) = measuring.word_rows(trained_demo, n=1).values()
    assert row["n"] == 12
    assert row["hour"] >= 11 / 12
    assert 0 <= row["place"] <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tables", "magic"], "got magic"),
        (["--rows", "magic"], "got magic"),
        (["--tables", "sweep", "--rows", "npa"], "--rows of --tables sweep must be of restart-0.2-cutoff-0.125, "),
        (["--rows", "npa,sg-0.5,alone"], "autoencoded, true, got sg-0.5, alone"),
        (["--n", "0"], "argument --n: must be positive and finite, got 0"),
        (["--native", "-1"], "argument --native: must be positive and finite, got -1"),
        (["--words", "0"], "argument --words: must be positive and finite, got 0"),
        (["--sheet", "sheet.svg"], "--sheet must be a .png or .jpg, got sheet.svg"),
        (["--size", "64"], "the period must be at least 16 and the sides twice 40"),
        (["--shard", "2/2"], "must be i/n with i from 0 to n - 1, got 2/2"),
        (["--shard", "0/2"], "--shard is for --draw"),
        (["--doc", "--native", "4"], "not allowed with argument"),
        (["--model", "nowhere"], "--model must be demo, a pipeline folder or the id of an accessible model, got 'nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], sentence: str, noise: Noise, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        quality.main([*arguments, *places(tmp_path)])
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


def test_another_model_has_no_row_among_the_committed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--model", "runs/other"])
    assert "the committed results are of the embedded model" in capsys.readouterr().err


def test_the_page_is_written_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_memory: list[bool]) -> None:
    monkeypatch.setattr(loading, "load_demo", lambda: pytest.fail("a model was loaded"))
    before, page = quality.PAGE.read_text(), tmp_path / "quality.md"
    page.write_text("<!-- begin tables -->\nold\n<!-- end tables -->\n")
    monkeypatch.setattr(quality, "PAGE", page)
    quality.main(["--doc"])
    assert page.read_text().strip() == before[before.index("<!-- begin tables") :].strip()
    assert not kept_memory


def test_no_committed_table_lacks_a_row() -> None:
    results = quality.committed()
    for records in results:
        tables = {name.partition("/")[0] for name in records}
        assert set(records) == {name for name in ROW_NAMES if name.partition("/")[0] in tables}
    assert {*ROW_NAMES} == set().union(*results)


def test_the_tables_in_docs_and_readme_are_those_of_the_results() -> None:
    results = quality.committed()
    readme = (ROOT / "README.md").read_text()
    assert all("\n".join(summary(records)) in readme for records in results)
    assert "\n".join(["<!-- begin tables -->", "", *sections(*results), "", "<!-- end tables -->"]) in quality.PAGE.read_text()


def test_machines_have_tables_of_their_own() -> None:
    facts = dict.fromkeys(FACTS, "x")
    one, other = ({"methods/true": {"row": "methods/true", "n": n, **facts}} for n in ("1", "2"))
    text = "\n".join(sections(one, other))
    assert text.count("## All methods") == 1
    assert text.index("| true renders of other scenes | 1 |") < text.index("| true renders of other scenes | 2 |")
