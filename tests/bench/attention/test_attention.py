"""The attention benchmark as a command: a wrong provider is not timed, what cannot run says so, runs resume and are compared."""

from __future__ import annotations

import csv
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.attention import __main__ as attention
from bench.attention import compiled as providers_compiled
from bench.attention.compiled import PROVIDERS
from bench.attention.gate import Outputs
from bench.attention.providers import Ready
from bench.attention.shapes import CPU_SHAPES, SHAPES, Task
from bench.harness import command, gated
from bench.harness import timing as roofline
from tests.bench.made_up import EVEN, ODD


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A benchmark of two small shapes on a checkout without changes; the path of its CSV."""
    monkeypatch.setattr(attention, "SHAPES", {"even": EVEN, "odd": ODD})
    monkeypatch.setattr("bench.attention.shapes.SHAPES", {"even": EVEN, "odd": ODD})
    monkeypatch.setattr(attention, "ceilings", lambda *_, **__: roofline.Ceilings(10.0, 0.1))
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "0123abc")
    monkeypatch.setattr("scalediff.command.allocator.keep_freed_memory", lambda: True)  # for the whole process, and this one goes on
    monkeypatch.setattr("bench.harness.timing.CPU_CACHE", 2**16)
    return tmp_path / "rows.csv"


def run(path: Path, *arguments: str) -> tuple[list[dict[str, str]], Any]:
    """Rows of the CSV, and the exit status or message."""
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cpu", "--seconds", "0.001", "--csv", str(path), *arguments])
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), stop.value.code


def test_a_run_names_every_row_and_times_what_passed(small: Path) -> None:
    names = ["sdpa", "gather", "full", "full-cudnn", "triton", "multidiffusion"]
    rows, status = run(small, "--shape", "even", "odd", "--provider", *names)
    assert status == 0
    assert [r["row"] for r in rows] == [f"{task}/{name}" for task in ("even/fp32", "odd/fp32/window", "odd/fp32/global") for name in names]
    by_name = {r["row"]: r for r in rows}
    for row in rows:
        assert (row["p50_ms"] != "") == (row["status"] == "ok")
        assert (row["note"] != "") == (row["status"] == "skipped")
        assert (row["commit"], row["torch"], row["python"]) == ("0123abc", torch.__version__, platform.python_version())
    timed = by_name["odd/fp32/global/gather"]
    assert float(timed["p20_ms"]) <= float(timed["p50_ms"]) <= float(timed["p80_ms"])
    assert float(timed["executed_gflop"]) > float(timed["useful_gflop"])
    assert float(timed["matrix_percent"]) == pytest.approx(100 * float(timed["tflops"]) / 0.1, rel=1e-2)
    assert timed["backend"] == "flash"
    assert int(timed["sets"]) > 1
    alone = {name: row["window_tflops"] for name, row in by_name.items() if row["status"] == "ok"}
    assert {name for name, rate in alone.items() if rate} == {name for name in alone if by_name[name]["function"] == "window"}
    assert len({rate for name, rate in alone.items() if rate and name.startswith("even")}) == 1, "once for a task"
    assert by_name["even/fp32/full-cudnn"]["note"] == "torch has no cudnn attention on CPUs"
    assert "CUDA" in by_name["even/fp32/triton"]["note"]
    assert "see the rule 'global'" in by_name["odd/fp32/window/full"]["note"]


def _shifted(monkeypatch: pytest.MonkeyPatch, name: str, by: float) -> None:
    own = PROVIDERS[name].prepare

    def prepare(task: Task) -> Ready:
        ready = own(task)
        return ready._replace(unlay=lambda out: Outputs(ready.unlay(out).image + by, ready.unlay(out).text))

    monkeypatch.setattr(PROVIDERS[name], "prepare", prepare)


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    for name in ("sdpa", "gather"):
        _shifted(monkeypatch, name, 1e-3)
    rows, status = run(small, "--shape", "even", "--provider", "sdpa", "gather", "loop")
    assert status == "rows of scalediff failed: even/fp32/sdpa"
    assert [r["status"] for r in rows] == ["FAILED", "FAILED", "ok"]
    assert all("exceeds the budget" in r["note"] and r["p50_ms"] == "" for r in rows[:2])


def test_what_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    def broken(task: Task) -> Ready:
        raise RuntimeError("no kernel\nfor this")

    def asserting(task: Task) -> Ready:
        raise AssertionError("of a compiler")

    monkeypatch.setattr(PROVIDERS["loop"], "prepare", broken)
    monkeypatch.setattr(PROVIDERS["flex"], "prepare", asserting)
    monkeypatch.setattr("bench.attention.providers.CPU_SCORES", 500_000)
    monkeypatch.setattr(providers_compiled, "find_spec", lambda name: None)
    rows, status = run(small, "--shape", "even", "--provider", "loop", "flex", "full-math", "natten")
    assert status == 0
    assert [(r["status"], r["note"]) for r in rows] == [
        ("error", "RuntimeError: no kernel"),
        ("error", "AssertionError: of a compiler"),
        ("skipped", "on a CPU scores of all pairs of tokens may take 0.0 GB, got 0.0 GB"),
        ("skipped", "the natten package is not installed"),
    ]


def test_what_loses_the_device_ends_the_run_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    lost = []

    def illegal(task: Task) -> Ready:
        lost.append(task.name)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(PROVIDERS["gather"], "prepare", illegal)
    monkeypatch.setattr("bench.harness.device.device_lost", lambda device: bool(lost))
    arguments = ("--shape", "even", "--provider", "gather", "full")
    (row,), status = run(small, *arguments)
    assert status == "the device was lost in even/fp32/gather: run the same command again to continue after it"
    assert (row["status"], row["note"]) == ("FAILED", "RuntimeError: an illegal memory access was encountered")
    lost.clear()
    rows, status = run(small, *arguments)
    assert [r["status"] for r in rows] == ["FAILED", "ok"]
    assert (status, lost) == (0, [])


def test_what_is_counted_after_the_clock_leaves_the_time(
    monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(call: Any, device: str) -> Any:
        raise RuntimeError("CUPTI is busy\nwith another")

    found: dict[str, Any] = {
        "peak_memory": lambda call, device: 2_500_000,
        "kernels": lambda call, device: [("small", 1.0), ("large", 2.0)],
    }
    notes = []
    for replaced in ({}, {"kernels": lambda call, device: []}, {"peak_memory": broken}, {"peak_memory": broken, "kernels": broken}):
        for name, function in (found | replaced).items():
            monkeypatch.setattr(gated, name, function)
        (row,), status = run(small, "--shape", "even", "--provider", "gather", "--again")
        assert (status, row["status"], row["p50_ms"] != "") == (0, "ok", True)
        assert row["peak_megabytes"] == ("" if "peak_memory" in replaced else "2.5")
        assert (row["launches"], row["kernel"]) == (("", "") if "kernels" in replaced else ("2", "large"))
        assert row["kernels_ms"] == ("" if "kernels" in replaced else "large 0.002, small 0.001")
        assert row["note"] in capsys.readouterr().out
        notes.append(row["note"])
    memory, kernels = (f"{what} unknown: RuntimeError: CUPTI is busy" for what in ("peak memory", "kernels"))
    assert notes == ["", "kernels unknown: RuntimeError: the profiler saw none", memory, f"{memory}; {kernels}"]


def test_what_loses_the_device_after_the_clock_ends_the_run_too(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr("bench.harness.device.device_lost", lambda device: True)
    (row,), status = run(small, "--shape", "even", "--provider", "gather", "full")
    assert (row["status"], status) == ("ok", "the device was lost in even/fp32/gather: run the same command again to continue after it")


def test_freed_memory_is_kept_where_the_host_measures(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    kept: list[int] = []
    monkeypatch.setattr("scalediff.command.allocator.keep_freed_memory", lambda: kept.append(1))
    run(small, "--shape", "even", "--provider", "gather")
    assert kept == [1]


def test_what_is_named_twice_is_measured_once(small: Path) -> None:
    rows, _ = run(small, "--shape", "even", "even", "--provider", "gather", "gather", "--dtype", "fp32", "fp32", "--again")
    assert [r["row"] for r in rows] == ["even/fp32/gather"]


def test_a_second_run_goes_on(monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = run(small, "--shape", "even", "--provider", "sdpa", "full-cudnn")
    rows, _ = run(small, "--shape", "even", "--provider", "sdpa", "loop", "full-cudnn")
    assert [r["row"] for r in rows] == ["even/fp32/sdpa", "even/fp32/full-cudnn", "even/fp32/loop"]
    assert rows[0] == first[0], "it stands"
    assert rows[1]["command"] != first[1]["command"], "what was skipped is tried again"
    assert "even/fp32/sdpa: as measured before" in capsys.readouterr().out
    rows, _ = run(small, "--shape", "even", "--provider", "sdpa", "--again")
    assert rows[0]["command"] != first[0]["command"]
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "4567def")
    rows, _ = run(small, "--shape", "even", "--provider", "sdpa")
    assert [(r["provider"], r["commit"]) for r in rows] == [("sdpa", "4567def"), ("full-cudnn", "0123abc"), ("loop", "0123abc")]


def test_a_comparison(monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(small, "--shape", "even", "--provider", "sdpa", "loop")
    other = small.with_name("other.csv")
    other.write_text(small.read_text())
    time = run(small, "--shape", "even", "--provider", "sdpa", "--compare", str(other))[0][0]["p50_ms"]
    assert f"even/fp32/sdpa: {time} ms here, {time} ms there, 1.000x" in capsys.readouterr().out
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "4567def")
    run(small, "--shape", "even", "--provider", "sdpa", "--compare", str(other))
    assert "not the same commit: here 4567def, there 0123abc; the ratios below include that difference" in capsys.readouterr().out


def choices(names: Iterable[str]) -> str:
    """As argparse lists them, with quotes or without."""
    return ", ".join(map(repr if sys.version_info < (3, 12) else str, names))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "flux-9000"], f"argument --shape: invalid choice: 'flux-9000' (choose from {choices([*SHAPES, *CPU_SHAPES])}"),
        (["--provider", "triton", "fa4"], f"argument --provider: invalid choice: 'fa4' (choose from {choices(PROVIDERS)}"),
        (["--dtype", "fp8"], f"argument --dtype: invalid choice: 'fp8' (choose from {choices(['bf16', 'fp16', 'fp32'])}"),
        (["--seconds", "0"], "argument --seconds: must be positive and finite, got 0"),
        (["--seconds", "inf"], "argument --seconds: must be positive and finite, got inf"),
        (["--seconds", "nan"], "argument --seconds: must be positive and finite, got nan"),
        (["--compare", "nowhere.csv"], "argument --compare: takes a CSV of this benchmark, got nowhere.csv, which is no file"),
        (["--compare", "/"], "argument --compare: takes a CSV of this benchmark, got /, which is no file"),
        (["--compare", __file__], "must have a column 'row'"),
        (["--csv", "/"], "Is a directory: '/'"),
        (["--commit", "4567def"], "--commit is for a copy of the tree without git's data: git has '0123abc' here, got '4567def'"),
        (["--device", "cuda"], "--device cuda needs a GPU that torch sees, got none"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "0123abc")
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
