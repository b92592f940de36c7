"""What the report's tables and plots say of made-up rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.report.plots import Plot, plots
from bench.report.rows import Results
from bench.report.tables import attention as calls
from bench.report.tables import pictures, shares
from tests.bench.made_up import CPU, Table, call, part, run, written


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path


def stage(method: str, *, model: str = "sdxl", stage: int = 1, **seconds: float) -> list[Table]:
    return [part(model, method, name, s, stage=stage) for name, s in seconds.items()]


def row_of(lines: list[str], begin: str) -> str:
    (found,) = (line for line in lines if line.startswith(begin))
    return found


def kinds(results: Results) -> dict[str, Plot]:
    return {plot.kind: plot for plot in plots(results)}


def test_shares_of_a_run_stage_by_stage(place: Path) -> None:
    first = stage("npa", step=6, denoiser=5, attention=1, cross=0.5)
    second = stage("npa", stage=2, step=4, denoiser=3, attention=2, cross=0.5, guidance=1, decode=2, mixing=0.5)
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 12.5), *first, *second)
    cells = ["24.0%", "8.0%", "32.0%", "8.0%", "8.0%", "4.0%", "0.0%", "16.0%", "0.0%"]
    assert f"| sdxl | 4096 | ScaleDiff, ours | eager | {' | '.join(cells)} |" in pictures(results)
    assert shares(results.cascade[0]).iloc[0, 4:].sum() == pytest.approx(12.5)


def test_small_models_are_left_out(place: Path) -> None:
    small = [run("sdxl-small", "npa", 0.9, 1.0, size=16), run("flux-small", "direct", 0.2, 0.1, size=64)]
    refused = run("flux-small", "demofusion", 0, size=64, status="skipped", note="for U-Nets")
    parts = stage("npa", model="sdxl-small", step=1, denoiser=0.5)
    assert pictures(written(place, "cascade-x.csv", *small, refused, *parts)) == []
    results = written(place, "cascade-x.csv", *small, refused, *parts, run("sdxl", "npa", 20))
    assert [line for line in pictures(results) if "small" in line] == []
    assert row_of(pictures(results), "| sdxl | 4096 |")
    assert list(plots(results)) == []


def test_what_was_skipped_is_listed_with_its_reason(place: Path) -> None:
    refused = run("flux", "demofusion", 0, size=4096, status="skipped", note="for U-Nets")
    lines = pictures(written(place, "cascade-x.csv", run("flux", "npa", 9), refused))
    assert "- flux by DemoFusion: for U-Nets (1 row)." in lines
    assert [line for line in lines if "DemoFusion" in line] == ["- flux by DemoFusion: for U-Nets (1 row)."]


def test_times_are_measured_where_both_are(place: Path) -> None:
    spread = {"p20_ms": "9500", "p50_ms": "10000", "p80_ms": "11000"}
    tables = [run("sdxl", "npa", 8, 10, **spread), run("sdxl", "authors", 13, 15), run("sdxl", "direct", 80, note="above --limit")]
    lines = pictures(written(place, "cascade-x.csv", *tables))
    assert "| 10 (9.5 - 11) | 8 | 1.00 | 8000 | 50 | composed 20 % below measured |" in row_of(lines, "| sdxl | 4096 | ScaleDiff, ours |")
    assert "| 15 | 13 | 1.50 | 8000 | 50 | composed 13 % below measured |" in row_of(lines, "| sdxl | 4096 | ScaleDiff, the authors")
    assert "|  | 80 | 10.00 composed | 8000 | 50 | above --limit |" in row_of(lines, "| sdxl | 4096 | direct inference |")
    lines = pictures(written(place, "cascade-x.csv", run("sdxl", "npa", 10.9, 10)))
    assert row_of(lines, "| sdxl |").endswith("| 50 |  |"), "nine per cent is not reported"


def test_rows_measured_in_two_ways_say_so(place: Path) -> None:
    ways = [{"timed_steps": steps, "view_batch": "8"} for steps in ("2", "1")]
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 20, **ways[0]), run("sdxl", "direct", 90, **ways[1]))
    lines = pictures(results)
    assert "### NVIDIA H200, abc1234, timed steps 2, view batch 8" in lines
    assert "### NVIDIA H200, abc1234, timed steps 1, view batch 8" in lines
    assert not [line for line in lines if "4.5" in line]
    assert "timed steps 2, view batch 8, commit abc1234." in results.cascade[0].source()


def test_memory_of_a_run(place: Path) -> None:
    memory = [{"peak_megabytes": peak, "before_megabytes": "500"} for peak in ("600", "900.5")]
    tables = [run("demo", "npa", s, size=size, **(CPU | m)) for s, size, m in zip((1, 4), (128, 256), memory, strict=True)]
    results = written(place, "cascade-x.csv", *tables)
    lines = pictures(results)
    assert "| % of a matrix product | peak MB | of it before the run | note |" in row_of(lines, "| model |")
    assert "| 50 | 900.5 | 500 |  |" in row_of(lines, "| demo | 256 |")
    plot = kinds(results)["memory"]
    assert plot.numbers["memory"].to_dict() == {"ScaleDiff, ours": {128: 100.0, 256: 400.5}}
    assert plot.title == "Memory of a picture by the embedded model, resident set of the process"
    assert plot.source.startswith("AMD EPYC, ")
    assert "peak MB" not in row_of(pictures(written(place, "cascade-x.csv", run("demo", "npa", 1))), "| model |")


def test_calls_have_the_columns_that_hold_something(place: Path) -> None:
    flex = call("cpu-32/fp32", "flex", 8, facts=CPU | {"setup_ms": "7.1", "executed_gflop": "2500", "backend": "tiles 8x16"})
    tables = [call("cpu-32/fp32", "sdpa", 4, facts=CPU), flex]
    tables += [call(f"cpu-{n}/fp32", "natten", 0, status="skipped", note="no natten", facts=CPU) for n in (32, 64)]
    tables += [call("cpu-64/fp32", "sdpa", 0, status="FAILED", note="NaN", facts=CPU)]
    lines = calls(written(place, "attention-x.csv", *tables))
    head = "| shape | implementation | computes | ms | x ours | useful TFLOP/s | % of a matrix product | executed / useful"
    assert f"{head} | made ready, ms | error | by |" in lines
    assert "|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|" in lines
    assert "| cpu-32/fp32 | flex | window | 8 (8 - 8) | 2.00 | 250.0 | 70 | 1.25 | 7.1 | 1e-3 | tiles 8x16 |" in lines
    assert "| cpu-64/fp32 | sdpa | window |  |  |  |  |  |  |  | FAILED: NaN |" in lines
    assert "- natten: no natten (2 rows)." in lines
    memory = call("flux-4096/bf16/window", "triton", 4) | call("flux-4096/bf16/global", "triton", 4)
    memory = {name: {**row, "peak_megabytes": "12"} for name, row in memory.items()}
    assert "| % of a matrix product | peak MB | error | by |" in row_of(calls(written(place, "attention-x.csv", memory)), "| shape |")


def test_curves_have_a_word_for_what_is_composed(place: Path) -> None:
    tables = [run("sdxl", "direct", 80), run("sdxl", "direct", 8, 9, size=2048), run("sdxl", "npa", 20), run("sdxl", "npa", 5, size=2048)]
    plot = kinds(written(place, "cascade-x.csv", *tables, run("flux", "npa", 20)))["seconds"]
    assert plot.numbers["seconds"].to_dict() == {
        "ScaleDiff, ours": {2048: 5.0, 4096: 20.0}, "direct inference": {2048: 9.0, 4096: 80.0},
    }, "one size of FLUX is no curve"  # fmt: skip
    assert plot.numbers["composed"].to_dict() == {
        "ScaleDiff, ours": {2048: True, 4096: True}, "direct inference": {2048: False, 4096: True},
    }  # fmt: skip
    assert list(plot.numbers["seconds"]) == ["ScaleDiff, ours", "direct inference"], "in the order of methods"
    compiled = [run("sdxl", "npa", 4, how="compiled", size=size) for size in (2048, 4096)]
    plot = kinds(written(place, "cascade-x.csv", *tables, *compiled))["seconds"]
    assert list(plot.numbers["seconds"]) == ["ScaleDiff, ours", "ScaleDiff, ours, compiled blocks", "direct inference"]


def test_runs_of_methods_that_are_not_known_come_last(place: Path) -> None:
    results = written(place, "cascade-x.csv", run("sdxl", "new", 1), run("sdxl", "npa", 1), run("sdxl", "npa", 1, how="compiled"))
    lines = [line for line in pictures(results) if line.startswith("| sdxl |")]
    assert [line.split(" | ")[2:4] for line in lines] == [["ScaleDiff, ours", "eager"], ["ScaleDiff, ours", "compiled"], ["new", "eager"]]
    assert list(plots(results)) == []
    assert shares(results.cascade[0]).empty
