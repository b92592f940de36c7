"""Goals from made-up CSVs: numbers within one group, and the reason where there is no number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.attention.compiled import PROVIDERS
from bench.attention.shapes import tasks
from bench.harness.facts import ROOT
from bench.harness.rows import slug
from bench.report import __main__ as report
from bench.report.goals import FAMILIES, GOALS, KERNEL, Goal, comparable
from bench.report.plots import plots
from bench.report.rows import HOW, NOT_YET, Results, read
from bench.report.tables import goals
from tests.bench.made_up import CPU, H200, call, run, written

SHOWN = [goal for goal in GOALS if goal.readme]


def page_of(results: Results) -> str:
    return report.pages(results, list(plots(results)))[report.PAGE]


def result_text(results: Results, what: str, *, number: int = 0) -> str:
    (goal,) = (goal for goal in GOALS if goal.what == what)
    return goal.result_text((goal.answers(results) or [None])[number])


SDXL, FLUX = "SDXL 4096 px, a whole run, {}", "FLUX 4096 px, a whole run, {}"


def test_without_rows_every_goal_is_not_measured_yet(place: Path) -> None:
    results = read(place / "results")
    assert [goal.result_text(None) for goal in GOALS] == [NOT_YET] * len(GOALS)
    assert len([line for line in goals(results) if NOT_YET in line]) == len(GOALS)
    page = page_of(results)
    assert "on a GPU: not run yet." in page
    assert "There is nothing to draw yet" in page


def test_the_goals_are_those_that_were_set() -> None:
    assert [goal.goal for goal in SHOWN] == ["at least 3x", "at least 12x", "at least 1.3x", "within 2x", "at least 3.5x", "within 1.5x",
                                             "at least 0.9x"]  # fmt: skip


def test_numbers_are_divided_out_of_the_rows(place: Path) -> None:
    tables = [run("sdxl", "npa", 20), run("sdxl", "multidiffusion", 90), run("sdxl", "demofusion", 200), run("sdxl", "authors", 26)]
    results = written(place, "cascade-nvidia-h200.csv", *tables, run("flux", "npa", 14), run("flux", "multidiffusion", 42))
    assert result_text(results, SDXL.format("beside MultiDiffusion")) == "4.5x, met (20 s for 90 s, composed; eager for eager)"
    assert result_text(results, SDXL.format("beside DemoFusion")).startswith("10x, missed (")
    assert result_text(results, SDXL.format("beside the authors' form")).startswith("1.3x, met (")
    assert result_text(results, SDXL.format("over the floor of its FLOPs")) == "2x, met (20 s composed, floor 10 s, eager)"
    assert result_text(results, FLUX.format("beside MultiDiffusion")).startswith("3x, missed (")
    assert result_text(results, FLUX.format("over the floor of its FLOPs")).startswith("1.4x, met (")
    versions = "NVIDIA H200, torch 2.11.0, triton 3.6.0, cuda 13.0, python 3.12.3, commit abc1234"
    assert goals(results)[-2:] == [
        "", f"cascade-nvidia-h200.csv, `python -m bench.cascade --model sdxl`, `python -m bench.cascade --model flux`: {versions}."
    ]  # fmt: skip
    page = page_of(results)
    assert "| sdxl | 4096 | DemoFusion | eager | 200 | 10.00 composed | 8000 | 50 |  |" in page


def test_a_goal_just_missed_is_missed(place: Path) -> None:
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 20), run("sdxl", "multidiffusion", 59.99))
    assert result_text(results, SDXL.format("beside MultiDiffusion")).startswith("2.9995x, missed (")


def test_a_measured_run_is_never_set_beside_a_composed_one(place: Path) -> None:
    one, other = SDXL.format("beside MultiDiffusion"), SDXL.format("beside the authors' form")
    tables = [run("sdxl", "npa", 20, 25), run("sdxl", "multidiffusion", 80), run("sdxl", "authors", 30, 50)]
    results = written(place, "cascade-x.csv", *tables)
    assert result_text(results, one).startswith("4x, met (20 s for 80 s, composed")
    assert result_text(results, other).startswith("2x, met (25 s for 50 s, measured")


def test_a_baseline_counts_at_its_best_of_what_both_were_tried_in(place: Path) -> None:
    tables = [run("sdxl", "npa", 20), run("sdxl", "npa", 10, how="compiled"), run("sdxl", "multidiffusion", 80)]
    what = SDXL.format("beside MultiDiffusion")
    assert result_text(written(place, "cascade-x.csv", *tables), what).startswith("4x, met (20 s for 80 s"), (
        "never compiled beside only eager"
    )
    results = written(place, "cascade-x.csv", *tables, run("sdxl", "multidiffusion", 30, how="compiled"))
    assert result_text(results, what) == "3x, met (10 s for 30 s, composed; compiled for compiled)"
    refused = run("sdxl", "multidiffusion", 0, how="compiled", status="error", note="no")
    assert result_text(written(place, "cascade-x.csv", *tables, refused), what) == "8x, met (10 s for 80 s, composed; compiled for eager)"


@pytest.mark.parametrize("fact", ["commit", "torch", "machine", "card", *HOW])
def test_no_ratio_between_commits_versions_devices_or_ways(place: Path, fact: str) -> None:
    other = run("sdxl", "multidiffusion", 90, **{fact: "NVIDIA H200 NVL" if fact == "machine" else "another"})
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 20), other)
    assert result_text(results, SDXL.format("beside MultiDiffusion")) == NOT_YET
    page = page_of(results)
    assert page.count("### NVIDIA H200") == 2, "a table each"
    assert "4.50" not in page


@pytest.mark.parametrize("commit", ["", "unknown", "abc1234 with changes"])
def test_without_a_commit_a_ratio_is_of_one_command(place: Path, commit: str) -> None:
    what = SDXL.format("beside MultiDiffusion")
    ours, other = run("sdxl", "npa", 20, commit=commit), run("sdxl", "multidiffusion", 90, commit=commit)
    assert result_text(written(place, "cascade-x.csv", ours, other), what).startswith("4.5x")
    other = run("sdxl", "multidiffusion", 90, commit=commit, command="python -m bench.cascade --method multidiffusion")
    assert result_text(written(place, "cascade-x.csv", ours, other), what) == NOT_YET


def test_no_ratio_between_files(place: Path) -> None:
    written(place, "cascade-one.csv", run("sdxl", "npa", 20))
    results = written(place, "cascade-two.csv", run("sdxl", "multidiffusion", 90))
    assert result_text(results, SDXL.format("beside MultiDiffusion")) == NOT_YET


def test_every_device_of_a_goal_has_its_line_and_others_have_none(place: Path) -> None:
    for machine, ms in (("NVIDIA H200", 4), ("NVIDIA H200 NVL", 5), ("NVIDIA A100", 8)):
        facts = H200 | {"machine": machine}
        results = written(place, f"attention-{slug(machine)}.csv", call("sdxl-64-4096/fp16", "triton", ms, facts=facts))
    lines = sorted(line for line in goals(results) if "kernel, SDXL 4096 px, 256 x 256, fp16 |" in line)
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["NVIDIA H200 NVL", "NVIDIA H200"]
    assert "| 500 TFLOP/s, met (4 ms, 70% of a matrix product) |" in lines[1]
    assert "| 400 TFLOP/s, missed " in lines[0]
    assert "### NVIDIA A100" in page_of(results)


def test_what_failed_or_was_skipped_is_told_and_is_no_number(place: Path) -> None:
    failed = run("sdxl", "npa", 1, status="FAILED", note="not timed: it did not pass its gate")
    results = written(place, "cascade-x.csv", failed, run("sdxl", "multidiffusion", 90))
    for what in ("beside MultiDiffusion", "over the floor of its FLOPs"):
        assert result_text(results, SDXL.format(what)) == "FAILED: not timed: it did not pass its gate (sdxl/4096/npa/eager/run)"
    assert f"| NVIDIA H200 | {SDXL.format('beside MultiDiffusion')} | at least 3x | FAILED: not timed: " in "\n".join(goals(results))
    assert "| sdxl | 4096 | ScaleDiff, ours | eager |  |  |  | FAILED: not timed" in page_of(results)
    skipped = run("sdxl", "demofusion", 1, status="skipped", note="too long")
    results = written(place, "cascade-x.csv", run("sdxl", "npa", 20), skipped)
    assert result_text(results, SDXL.format("beside DemoFusion")) == "skipped: too long (sdxl/4096/demofusion/eager/run)"
    assert "- sdxl by DemoFusion: too long (1 row)." in page_of(results)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", KERNEL)
def test_a_goal_compares_what_a_family_can_run(name: str, family: str) -> None:
    """None of it refuses the task for what it is; that a package or a device is missing here is another matter."""
    wanted = comparable(name, family).split("/")
    (task,) = (task for task in tasks([wanted[0]], None, "cuda") if [task.rule] == (wanted[2:] or [""]))
    refusals = [PROVIDERS[provider].refusal(task) or "" for provider in FAMILIES[family]]
    assert not [refusal for refusal in refusals if "window" in refusal or "text" in refusal]


def test_the_kernel_beside_the_best_of_every_family(place: Path) -> None:
    task, once = "flux-4096/bf16/window", "flux-4096/bf16/global"  # text is turned for each window; what cannot do that has it once
    tables = [
        call(task, "triton", 3),
        call(task, "gather", 9),
        call(task, "gather-cudnn", 7.5),
        call(once, "triton", 2),
        call(once, "flex", 1, status="FAILED"),
        call(once, "flex-pretiled", 5),
        call(once, "natten", 0, status="skipped", note="the natten package is not installed"),
    ]
    results = written(place, "attention-x.csv", *tables)
    title = f"kernel, {KERNEL[task][0]}"
    assert result_text(results, f"{title}, beside gather and SDPA") == "2.5x, met (3 ms for 7.5 ms, gather-cudnn)"
    assert result_text(results, f"{title}, beside FlexAttention on tiles") == "2.5x, met (2 ms for 5 ms, flex-pretiled)"
    missing = f"skipped: the natten package is not installed ({once}/natten)"
    assert result_text(results, f"{title}, beside NATTEN as called") == missing
    written(place, "attention-older.csv", call(once, "triton", 2), call(once, "natten", 0, status="error", note="out of memory"))
    found = written(place, "attention-x.csv", *tables[:-1], call(once, "natten", 8))
    assert result_text(found, f"{title}, beside NATTEN as called") == "4x, met (2 ms for 8 ms, natten)", "a number goes before a reason"


def test_windows_on_a_cpu_count_on_their_worst_shape(place: Path) -> None:
    tables = [call(f"cpu-{n}/fp32", name, ms, facts=CPU) for n, name, ms in ((32, "sdpa", 10), (32, "full", 9.5), (64, "sdpa", 10),
                                                                            (64, "full", 8))]  # fmt: skip
    results = written(place, "attention-amd-epyc.csv", *tables)
    goal = next(goal for goal in SHOWN if goal.device == "CPU")
    alone = [f"{150 / (2000 / ms):.2f}" for ms in (9.5, 8)]
    each = f"cpu-32 0.95 (one window alone {alone[0]}), 0.95x as fast; cpu-64 0.80 (one window alone {alone[1]}), 0.80x as fast"
    assert result_text(results, goal.what) == f"0.8x, missed ({each})"
    *lines, _, made = goals(results, readme=True)
    assert max(map(len, lines)) < 250
    versions = "AMD EPYC, torch 2.11.0, python 3.12.3, 2 threads, commit abc1234"
    assert made == f"attention-amd-epyc.csv, `python -m bench.attention --quick`: {versions}."
    failed = written(place, "attention-amd-epyc.csv", *tables[:3], call("cpu-64/fp32", "full", 8, status="FAILED", facts=CPU))
    assert result_text(failed, goal.what).startswith("FAILED: "), "not the worst of those that did not fail"
    older = [call("cpu-32/fp32", name, ms, facts=CPU | {"window_tflops": ""}) for name, ms in (("sdpa", 10), ("full", 9.5))]
    assert result_text(written(place, "attention-amd-epyc.csv", *older), goal.what) == "0.95x, met (cpu-32 0.95, 0.95x as fast)"


def test_goals_need_no_pandas() -> None:
    """As `bench.gpu` does, on a machine that has only what the kernels need."""
    code = "import sys; sys.modules.update(dict.fromkeys(('pandas', 'matplotlib', 'diffusers'))); from bench.report.goals import GOALS"
    code += "; from bench.report.rows import read; from pathlib import Path; results = read(Path('bench/results'))"
    code += "; print([goal.result_text(answer) for goal in GOALS for answer in goal.answers(results)])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cpu-32" in ran.stdout


def test_goals_have_different_names() -> None:
    assert len({goal.what for goal in GOALS}) == len(GOALS)
    assert all(isinstance(goal, Goal) and goal.bound > 0 for goal in GOALS)
