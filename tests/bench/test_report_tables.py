"""What the report's tables and plots say of made-up rows, and that what is missing is what the benchmarks can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.attention.compiled import CPU as ON_CPU
from bench.attention.compiled import PROVIDERS
from bench.attention.shapes import CPU_SHAPES, SHAPES, tasks
from bench.cascade.methods import METHODS as DRAWN
from bench.cascade.models import SUBJECTS
from bench.report.goals import METHODS
from bench.report.missing import JOINT, attention, excluded, exists, missing
from bench.report.pictures import PARTS, Run, pictures, shares
from bench.report.plots import OTHER, Plot, Point, plots
from bench.report.rows import Results, table
from bench.report.tables import attention as calls
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
    bars = kinds(results)["share"].bars
    assert set(bars["ScaleDiff, ours"]) == {*PARTS, OTHER} - {"encode", "rest"}
    assert sum(bars["ScaleDiff, ours"].values()) == pytest.approx(12.5)


def test_attention_that_takes_longer_than_its_denoiser_is_refused(place: Path) -> None:
    good = stage("npa", step=10, denoiser=9, attention=1)
    bad = stage("npa", stage=2, step=4, denoiser=3, attention=2, cross=1.01)  # all stages together would do
    results = written(place, "cascade-x.csv", *good, *bad)
    names = r"sdxl/4096/npa/eager/2-4096/attention and sdxl/4096/npa/eager/2-4096/cross"
    with pytest.raises(ValueError, match=rf"^cascade-x.csv: {names} must take no longer than the denoiser of .*, got 3.01 s for 3 s$"):
        pictures(results)
    with pytest.raises(ValueError, match="must take no longer than the denoiser"):
        plots(results)
    results = written(place, "cascade-x.csv", *stage("npa", step=4, denoiser=3, attention=2, cross=1.0001))
    (parts,) = shares(results.cascade[0]).values()
    assert parts["rest of the denoiser"] == 0, "five digits are rounded"


def test_small_models_have_a_table_of_their_own(place: Path) -> None:
    small = [run("sdxl-small", "npa", 0.9, 1.0, size=16), run("flux-small", "direct", 0.2, 0.1, size=64)]
    refused = run("flux-small", "demofusion", 0, size=64, status="skipped", note="for U-Nets")
    parts = stage("npa", model="sdxl-small", step=1, denoiser=0.5)
    results = written(place, "cascade-x.csv", *small, refused, *parts, run("sdxl", "npa", 20))
    lines = pictures(results)
    (about,) = (i for i, line in enumerate(lines) if line.startswith("Pictures of 16 to 64 px"))
    assert "every method runs and passes its gate, and their time is mostly Python's." in lines[about]
    assert not [line for line in lines[:about] if "| sdxl-small" in line or "| flux-small" in line], "neither runs nor shares"
    assert lines[about + 2] == "| model | px | method | blocks | s, measured | s, composed | note |"
    assert "| sdxl-small | 16 | ScaleDiff, ours | eager | 1.0 | 0.9 |  |" in lines
    assert "| flux-small | 64 | direct inference | eager | 0.1 | 0.2 | composed 100 % above measured |" in lines
    assert "- flux-small by DemoFusion: for U-Nets (1 row)." in lines
    assert plots(results) == []


def test_times_are_measured_where_both_are(place: Path) -> None:
    spread = {"p20_ms": "9500", "p50_ms": "10000", "p80_ms": "11000"}
    tables = [run("sdxl", "npa", 8, 10, **spread), run("sdxl", "authors", 13, 15), run("sdxl", "direct", 80, note="above --limit")]
    lines = pictures(written(place, "cascade-x.csv", *tables))
    assert "| 10 (9.5 - 11) | 8 | 1.00 | 8000 | 50 | composed 20 % below measured |" in row_of(lines, "| sdxl | 4096 | ScaleDiff, ours |")
    assert "| 15 | 13 | 1.50 | 8000 | 50 | composed 13 % below measured |" in row_of(lines, "| sdxl | 4096 | ScaleDiff, the authors")
    assert "|  | 80 | 10.00 composed | 8000 | 50 | above --limit |" in row_of(lines, "| sdxl | 4096 | direct inference |")
    lines = pictures(written(place, "cascade-x.csv", run("sdxl", "npa", 10.9, 10)))
    assert row_of(lines, "| sdxl |").endswith("| 50 |  |"), "nine per cent is not told"


def test_rows_measured_in_two_ways_say_so(place: Path) -> None:
    ways = [{"timed_steps": steps, "view_batch": "8"} for steps in ("2", "1")]
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 20, **ways[0]), run("sdxl", "direct", 90, **ways[1]))
    lines = pictures(results)
    assert "### NVIDIA H200, abc1234, timed steps 2, view batch 8" in lines
    assert "### NVIDIA H200, abc1234, timed steps 1, view batch 8" in lines
    assert not [line for line in lines if "4.5" in line]
    assert "timed steps 2, view batch 8, commit abc1234." in results.cascade[0].made_by(["x"])


def test_memory_of_a_run(place: Path) -> None:
    memory = [{"peak_megabytes": peak, "before_megabytes": "500"} for peak in ("600", "900.5")]
    tables = [run("demo", "npa", s, size=size, **(CPU | m)) for s, size, m in zip((1, 4), (128, 256), memory, strict=True)]
    results = written(place, "cascade-x.csv", *tables)
    lines = pictures(results)
    assert "| % of a matrix product | peak MB | of it before the run | note |" in row_of(lines, "| model |")
    assert "| 50 | 900.5 | 500 |  |" in row_of(lines, "| demo | 256 |")
    plot = kinds(results)["memory"]
    assert plot.lines == {"ScaleDiff, ours": [Point(128, 100.0), Point(256, 400.5)]}
    assert plot.title.startswith("Memory of a picture by the embedded model, resident set of the process\nAMD EPYC, ")
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


def test_words_are_aligned_as_words() -> None:
    assert table(["a", "b", "c", "d"], [["1", "2", "3", "x|y"]], words=1, last=1)[1:] == ["|---|--:|--:|---|", "| 1 | 2 | 3 | x/y |"]


def test_what_is_missing_is_what_has_no_row(place: Path) -> None:
    names = attention("sdxl-64-4096", PROVIDERS, "cuda")["sdxl-64-4096/fp16"]
    rows = [call("sdxl-64-4096/fp16", name, 4) for name in names if name != "natten"]
    written(place, "attention-x.csv", *rows, call("flux-2048/bf16/window", "triton", 4), call("cpu-32/fp32", "sdpa", 4, facts=CPU))
    runs = [run("sdxl", name, 4, how=how) for name in ("direct", "npa") for how in ("eager", "compiled")]
    runs += [run("demo", name, 4, size=256) | run("demo", name, 4, size=128, **CPU) for name in DRAWN if exists(DRAWN[name], joint=False)]
    lines = missing(written(place, "cascade-x.csv", *runs))
    assert row_of(lines, "| H100 or H200 | sdxl-64-4096 |") == "| H100 or H200 | sdxl-64-4096 | natten |"
    rest = row_of(lines, "| H100 or H200 | flux-2048 |")
    assert "window: sdpa, gather, " in rest
    assert "; global: triton, " in rest
    assert "| H100 or H200 | flux-4096 | all implementations |" in lines
    assert "| CPU | cpu-32 | gather, loop, flex, full, natten, multidiffusion |" in lines
    others = "multidiffusion, demofusion, cascade-full, authors"
    assert f"| H100 or H200 | sdxl, 4096 px | eager: {others}; compiled: {others} |" in lines
    assert "| CPU | demo, 256 px | all methods |" in lines, "what a GPU did is not done on a CPU"
    assert not [line for line in lines if "demo, 128 px" in line]
    assert len(lines) <= 35


@pytest.mark.parametrize(("shapes", "names", "device"), [(SHAPES, list(PROVIDERS), "cuda"), (CPU_SHAPES, list(ON_CPU), "cpu")])
def test_implementations_are_excluded_by_what_they_refuse(shapes: dict[str, object], names: list[str], device: str) -> None:
    about = ("text", "up to 20 GFLOPs", "averaged")  # and not of a package or a device that is missing here
    for task in tasks(list(shapes), None, device):
        for name in names:
            refusal = "" if name == "triton" else PROVIDERS[name].refusal(task) or ""
            if "not installed" not in refusal:
                assert excluded(PROVIDERS[name], task) is any(word in refusal for word in about), (task.name, task.rule, name, refusal)


@pytest.mark.parametrize("model", ["sdxl-small", "flux-small", "demo"])
def test_methods_are_excluded_by_what_the_models_refuse(model: str) -> None:
    pytest.importorskip("diffusers", reason="models are diffusers'")
    from bench.cascade.methods import Drawn

    drawn = Drawn(SUBJECTS[model], "cpu")
    for method in DRAWN.values():
        refusal = drawn.refusal(method)
        try:
            if method.kind == "phases":
                drawn.draw(method, SUBJECTS[model].sizes[0], steps=1)
        except NotImplementedError as refused:
            refusal = refusal or str(refused)
        assert exists(method, joint=model.removesuffix("-small") in JOINT) is not bool(refusal), (method.name, refusal)


def test_curves_have_a_word_for_what_is_composed(place: Path) -> None:
    tables = [run("sdxl", "direct", 80), run("sdxl", "direct", 8, 9, size=2048), run("sdxl", "npa", 20), run("sdxl", "npa", 5, size=2048)]
    plot = kinds(written(place, "cascade-x.csv", *tables, run("flux", "npa", 20)))["latency"]
    assert plot.lines == {
        "ScaleDiff, ours": [Point(2048, 5.0, "composed"), Point(4096, 20.0, "composed")],
        "direct inference": [Point(2048, 9.0, "measured"), Point(4096, 80.0, "composed")],
    }, "in the order of methods; one size of FLUX is no curve"
    assert list(plot.lines) == ["ScaleDiff, ours", "direct inference"]
    compiled = [run("sdxl", "npa", 4, how="compiled", size=size) for size in (2048, 4096)]
    plot = kinds(written(place, "cascade-x.csv", *tables, *compiled))["latency"]
    assert list(plot.lines) == ["ScaleDiff, ours, eager", "ScaleDiff, ours, compiled", "direct inference, eager"]


def test_parts_that_are_small_in_every_bar_are_one(place: Path) -> None:
    ours = stage("npa", step=10, denoiser=9.95, attention=1, cross=0.05, decode=0.05, encode=0.04)
    others = stage("demofusion", step=10, denoiser=9, attention=4, cross=0.05, decode=5)
    plot = kinds(written(place, "cascade-x.csv", *others, *ours))["share"]
    assert list(plot.bars) == ["ScaleDiff, ours", "DemoFusion"]
    assert plot.bars["ScaleDiff, ours"] == pytest.approx(
        {"attention": 1, "rest of the denoiser": 8.9, "rest of the steps": 0.05, "decode": 0.05, OTHER: 0.09}
    )
    assert plot.x == "% of a composed run"
    assert plot.title.startswith("Where the time goes, 4096 px by SDXL base 1.0, random weights\nNVIDIA H200, ")


def test_a_roofline_tells_shapes_apart(place: Path) -> None:
    task = "sdxl-64-4096/fp16"
    other = call("flux-4096/bf16/window", "triton", 2)
    plot = kinds(
        written(place, "attention-x.csv", call(task, "triton", 4), call(task, "full", 8), call(task, "flex", 0, status="skipped"), other)
    )["roofline"]
    assert plot.lines == {
        "triton": [Point(200.0, 500.0, "sdxl-64-4096"), Point(200.0, 1000.0, "flux-4096")],
        "full": [Point(200.0, 250.0, "sdxl-64-4096")],
    }
    assert plot.ceilings == {"fp16": (4000.0, 800.0), "bf16": (4000.0, 800.0)}
    assert plot.x == "FLOPs of its own definition per byte it must move"


def test_every_method_has_a_colour_of_its_own() -> None:
    from bench.report.drawing import _METHOD_COLORS, _PART_COLORS

    assert len(set(_METHOD_COLORS.values())) == len(METHODS)
    assert len(set(_PART_COLORS.values())) == len(PARTS) + 1


def test_runs_of_methods_that_are_not_known_come_last(place: Path) -> None:
    results = written(place, "cascade-x.csv", run("sdxl", "new", 1), run("sdxl", "npa", 1), run("sdxl", "npa", 1, how="compiled"))
    lines = [line for line in pictures(results) if line.startswith("| sdxl |")]
    assert [line.split(" | ")[2:4] for line in lines] == [["ScaleDiff, ours", "eager"], ["ScaleDiff, ours", "compiled"], ["new", "eager"]]
    assert plots(results) == []
    assert Run("sdxl", "4096", "npa", "eager") not in shares(results.cascade[0])
