"""The pages that the report makes of made-up CSVs, plots by digest, and the committed pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pandas import DataFrame

from bench.attention import __main__ as attention
from bench.harness.facts import ROOT
from bench.harness.pages import fill, table
from bench.report import __main__ as report
from bench.report.goals import METHODS
from bench.report.plots import plots
from bench.report.rows import FACTS, HOW, NOT_YET, Results, read
from tests.bench.made_up import H200, Table, call, part, run, written


def problems() -> list[str]:
    """What --check says, line by line; nothing where it passes."""
    with pytest.raises(SystemExit) as stop:
        report.main(["--check"])
    return [] if stop.value.code == 0 else str(stop.value.code).splitlines()


def test_the_committed_pages_are_those_of_the_committed_rows() -> None:
    assert problems() == []


def test_tests_on_a_device_are_told(place: Path) -> None:
    row = {
        "row": "tests",
        "status": "done",
        "seconds": "60",
        "note": "185 passed, 5 deselected",
        "command": "python -m pytest -m gpu",
    } | H200
    page = report.pages(written(place, "gpu-nvidia-h200.csv", {"tests": row}), [])[report.PAGE]
    assert "| tests | done | 185 passed, 5 deselected | `python -m pytest -m gpu`: NVIDIA H200, torch 2.11.0" in page


def measured(place: Path) -> Results:
    """Rows that make a plot of time and one of memory."""
    memory = [{"peak_megabytes": peak, "before_megabytes": "5"} for peak in ("6", "9")]
    tables = [run("sdxl", "npa", 5, size=2048, **memory[0]), run("sdxl", "npa", 20, **memory[1]), part("sdxl", "npa", "step", 20)]
    return written(place, "cascade-x.csv", *tables, run("flux", "npa", 20))


def test_plots_of_other_numbers_and_of_nothing_are_found_without_drawing(place: Path) -> None:
    results = measured(place)
    names = [plot.file for plot in plots(results)]
    assert [name.split("-")[1] for name in names] == ["seconds", "memory"]
    for path, text in report.pages(results, list(plots(results))).items():
        path.write_text(text)
    assert set(problems()) == {*(f"docs/evidence/{name} is not drawn" for name in names), "run python -m bench.report --write"}
    for name in names:
        (place / "docs" / name).write_text("<svg/>")
    assert problems() == []
    assert report.PAGE.read_text().count(".svg)") == 2
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 6, size=2048), run("sdxl", "npa", 20))
    (other,) = (plot.file for plot in plots(results))
    assert other not in names
    assert problems()[-4:-1] == [f"docs/evidence/{other} is not drawn",
                                 *(f"docs/evidence/{name} is a plot of nothing in bench/results" for name in sorted(names))]  # fmt: skip


def test_plots_are_drawn_by_matplotlib(place: Path) -> None:
    pytest.importorskip("matplotlib", reason='pip install -e ".[bench]"')
    results = measured(place)
    (place / "docs" / "benchmarks-share-gone.svg").write_text("<svg/>")
    report.main(["--write"])
    drawn = {path.name: path.read_bytes() for path in (place / "docs").glob("*.svg")}
    assert set(drawn) == {plot.file for plot in plots(results)}
    assert report.PAGE.read_text().count(".svg)") == 2
    assert problems() == []
    report.main(["--write"])
    assert {path.name: path.read_bytes() for path in (place / "docs").glob("*.svg")} == drawn, "the same bytes again"


def test_a_page_that_departs_is_named_with_its_line(place: Path) -> None:
    report.main(["--write"])
    assert problems() == []
    text = (place / "README.md").read_text()
    assert text.startswith("before\ngoals:\n")
    assert text.endswith("<!-- end quality -->\nend\n")
    assert "old" not in text
    (place / "README.md").write_text(text.replace(f"at least 12x | {NOT_YET}", "at least 12x | 13x"))
    with pytest.raises(
        SystemExit, match=r"README.md, line 8, is not what is counted now, got '.*13x.*\nrun python -m bench.report --write"
    ):
        report.main(["--check"])


@pytest.mark.parametrize(("mark", "seen"), [("begin", "False and False"), ("end", "True and False")])
@pytest.mark.parametrize("name", ["goals", "quality"])
def test_a_readme_without_a_place_for_a_table_is_refused(place: Path, name: str, mark: str, seen: str) -> None:
    readme = place / "README.md"
    readme.write_text(readme.read_text().replace(f"<!-- {mark} {name} -->", ""))
    with pytest.raises(SystemExit, match=rf"must have the lines '.*begin {name} -->' and '.*end {name} -->', got {seen}"):
        report.main(["--write"])


def test_tables_and_pages() -> None:
    frame = DataFrame({"a": ["x|y"], "empty": [""], "b": ["1"], "note": [""]})
    assert table(frame, text=("a", "note")) == ["| a | b | note |", "|---|--:|---|", "| x/y | 1 |  |"]
    assert fill("1\n<!-- begin t -->\nold\n<!-- end t -->\n2\n", {"t": ["new"]}) == "1\n<!-- begin t -->\n\nnew\n\n<!-- end t -->\n2\n"


def drawn_by(method: str, discs: float) -> Table:
    columns = {"n": "16", "one_disc": "0.5", "faint": f"{discs}", "faint_se": "0.25", "swd": "100", "seconds": "2", "all_gflops": "20"}
    return {f"methods/{method}": {"row": f"methods/{method}", **columns}}


def test_the_readme_has_the_table_of_quality(place: Path) -> None:
    def readme(results: Results) -> str:
        return report.pages(results, [])[report.README]

    assert f"<!-- begin quality -->\n\n{NOT_YET}.\n" in readme(read(place / "results"))
    written(place, "quality-x.csv", drawn_by("direct", 5.31), drawn_by("npa", 1.0625))
    report.main(["--write"])
    assert "| NPA + LFM + SG | 16 | 50.0% | 1.06 ± 0.25 | 100.0 | 2.0 | 20 |\n\n<!-- end quality -->" in report.README.read_text()
    assert problems() == []
    written(place, "quality-x.csv", drawn_by("direct", 5.31), drawn_by("npa", 2))
    assert problems()
    other = {"switches/npa": {**drawn_by("npa", 3)["methods/npa"], "row": "switches/npa"}}
    assert "csv:" not in readme(written(place, "quality-z.csv", other)), "a file without rows of all methods"
    text = readme(written(place, "quality-y.csv", drawn_by("npa", 3)))
    assert "quality-x.csv:\n\n| row |" in text
    assert "quality-y.csv:\n\n| row |" in text


def test_the_report_needs_none_of_what_measuring_needs() -> None:
    missing = ("diffusers", "transformers", "triton", "matplotlib", "PIL")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from bench.report import __main__ as report"
    code += "; results = report.read(report.RESULTS.parent); print(report.pages(results, [])[report.PAGE], report.quality(results))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("['not measured yet.']\n")


def test_a_damaged_csv_is_refused(place: Path) -> None:
    (place / "results" / "cascade-x.csv").write_text("name\na\n")
    with pytest.raises(SystemExit, match=r"python -m bench.report: cascade-x.csv must have a column 'row'"):
        report.main([])


def test_the_benchmarks_write_the_columns_that_are_read() -> None:
    """What the made-up rows have, and so what is read of true ones."""

    def columns(table: Table) -> set[str]:
        return {column for row in table.values() for column in row}

    assert columns(call("a/b", "c", 1)) | set(FACTS) - {"diffusers", *HOW} | {"executed_gflop", "setup_ms"} <= set(attention.FIELDS)
    from bench.cascade import __main__ as cascade

    rows = (
        columns(run("a", "b", 1)) | columns(part("a", "b", "c", 1)) | {"p20_ms", "p50_ms", "p80_ms", "peak_megabytes", "before_megabytes"}
    )
    assert rows | set(FACTS) - {"natten"} <= set(cascade.FIELDS)
    assert set(METHODS) >= set(cascade.METHODS)
