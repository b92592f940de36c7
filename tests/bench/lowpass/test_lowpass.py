"""The filters' benchmark: a wrong row is not timed, what cannot run says why, runs resume."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import command, gated
from bench.harness.facts import ROOT
from bench.lowpass import __main__ as lowpass
from bench.lowpass import cases as lowpass_cases
from bench.lowpass.cases import FEATURES, IMPLEMENTATIONS, LATENTS, LOW_PASS, Case

SMALL = Case("small", (1, 2, 32, 32))
OURS = [f"small/float32/planes/{name}/scalediff" for name in ("guided step", "mix frequencies", "low pass")]


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "keep_freed_memory", lambda: True)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A benchmark of small pictures on a checkout without changes; the path of its CSV."""
    monkeypatch.setattr(lowpass, "LATENTS", [SMALL])
    monkeypatch.setattr(lowpass, "FEATURES", [])
    monkeypatch.setattr("bench.harness.timing.CPU_CACHE", 2**13)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "0123abc")
    monkeypatch.setattr("bench.harness.gated.forget", lambda device: None)  # small pictures leave nothing, and it takes most of the time
    return tmp_path / "rows.csv"


def run(path: Path, *arguments: str) -> tuple[list[dict[str, str]], Any]:
    """Rows of the CSV, and the exit status or message."""
    with pytest.raises(SystemExit) as stop:
        lowpass.main(["--device", "cpu", "--seconds", "0.001", "--csv", str(path), *arguments])
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), stop.value.code


def replaced(monkeypatch: pytest.MonkeyPatch, operation: str, name: str, **more: Any) -> None:
    """One implementation by another with the same name."""
    changed = [replace(i, **more) if (i.operation.name, i.name) == (operation, name) else i for i in lowpass.IMPLEMENTATIONS]
    monkeypatch.setattr(lowpass, "IMPLEMENTATIONS", changed)


def test_a_run_gates_and_times_every_row(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowpass, "find_spec", lambda package: None)
    rows, status = run(small)
    assert status == 0
    assert [r["row"] for r in rows] == [lowpass.row_name(SMALL, i) for i in IMPLEMENTATIONS]
    assert [r["row"] for r in rows if r["implementation"] == "scalediff"] == OURS
    for row in rows:
        assert row["status"] == ("skipped" if "gaussian_blur" in row["implementation"] else "ok")
        assert (row["p50_ms"] != "") == (row["status"] == "ok")
        assert (row["note"] != "") == (row["status"] == "skipped")
        assert (row["memory"], row["seconds"]) == ("kept", "0.001")
        assert (row["commit"], row["torch"], row["python"]) == ("0123abc", torch.__version__, platform.python_version())
        assert row["cuda"] == row["cudnn"] == row["card"] == ""
    for row in (r for r in rows if r["status"] == "ok"):
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["copy_ms"]) > 0
        assert (row["error"] != "") == (row["implementation"] != "FFT, Butterworth")
        assert float(row["error"] or 0) < 1e-5
        assert row["sets"] == "4", "four times 8 KB in pictures of 8 KB"
    assert rows[-1]["note"] == "the kornia package is not installed"
    assert {r["megabytes"] for r in rows if r["operation"] == "guided step"} == {f"{4 * SMALL.bytes / 1e6:.1f}"}


def test_sets_of_inputs_are_more_than_caches_hold() -> None:
    """By hand: latents of 4 MB with a cache of 64 MB, of 64 MB, and feature maps that no cache holds anyway."""
    assert [lowpass.Bench(case, "cpu", seconds=1.0).sets for case in (LATENTS[0], LATENTS[3], FEATURES[0])] == [16, 4, 1]
    sets = Case("last", (1, 3, 8, 8), torch.bfloat16, channels_last=True).pictures("cpu", 3)
    flat = [x for pictures in sets for x in pictures]
    assert len({x.data_ptr() for x in flat}) == 9, "memory of their own"
    assert all(x.is_contiguous(memory_format=torch.channels_last) and x.dtype is torch.bfloat16 for x in flat)
    assert all(torch.equal(a, b) for a, b in zip(sets[0], sets[2], strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:-3], ids=lambda i: f"{i.operation.name}-{i.name}")
def test_every_set_gives_what_is_defined(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance and mixing written out, for every set and not only for the one that is gated."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    sets = [tuple(torch.randn(1, 2, 32, 24, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(s, s + 3))
            for s in (0, 3)]  # fmt: skip
    calls = implementation.prepare([implementation.operation.tensors(pictures) for pictures in sets])
    for call, (x, output, reference) in zip(calls, sets, strict=True):
        low = lowpass_cases.exact_low_pass
        if implementation.operation is LOW_PASS:
            expected = low(x)
        elif implementation.operation.name == "mix frequencies":
            expected = x - low(x) + low(reference)
        else:
            alpha = 0.4
            x0 = (x - (1 - alpha) ** 0.5 * output) / alpha**0.5
            guided = x0 + lowpass_cases.GAMMA * (low(reference) - low(x0))
            expected = (x - alpha**0.5 * guided) / (1 - alpha) ** 0.5
        torch.testing.assert_close(call(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("amount", "sentence"), [(1e-3, "exceeds the budget"), (float("nan"), "the result has NaN or infinite values")])
def test_a_wrong_result_is_not_timed(small: Path, monkeypatch: pytest.MonkeyPatch, amount: float, sentence: str) -> None:
    own = lowpass_cases.low_pass
    monkeypatch.setattr(lowpass_cases, "low_pass", lambda x, **how: own(x, **how) + amount)
    rows, status = run(small)
    assert status == f"rows of scalediff failed: {OURS[2]}"
    row = {r["row"]: r for r in rows}[OURS[2]]
    assert (row["status"], row["p50_ms"]) == ("FAILED", "")
    assert sentence in row["note"]
    assert {r["status"] for r in rows if r["row"] != OURS[2]} <= {"ok", "skipped"}
    assert run(small)[1] == status, "it is finished, and printed again"


def test_what_nobody_wrote_is_seen(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = lowpass_cases.low_pass

    def partly(x: Any, **how: Any) -> Any:
        out = torch.empty_like(x)
        out[..., 1:, :] = own(x, **how)[..., 1:, :]
        return out

    monkeypatch.setattr(lowpass_cases, "low_pass", partly)
    row = {r["row"]: r for r in run(small)[0]}[OURS[2]]
    assert (row["status"], row["note"]) == ("FAILED", "the result has NaN or infinite values")


def test_a_baseline_that_is_wrong_or_cannot_run_is_a_result(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sets: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    replaced(monkeypatch, "mix frequencies", "torch.compile", prepare=lowpass_cases.each(lambda high, low: high))
    replaced(monkeypatch, "low pass", "torch.compile", prepare=broken)
    replaced(monkeypatch, "low pass", "FFT, Butterworth", prepare=lowpass_cases.each(lambda x: x.double()))
    rows, status = run(small)
    assert status == 0
    by_name = {(r["operation"], r["implementation"]): r for r in rows}
    assert by_name["mix frequencies", "torch.compile"]["status"] == "FAILED"
    refused = by_name["low pass", "torch.compile"]
    assert (refused["status"], refused["note"], refused["p50_ms"]) == ("error", "RuntimeError: no kernel", "")
    other = by_name["low pass", "FFT, Butterworth"]
    assert (other["status"], other["p50_ms"]) == ("FAILED", "")
    assert other["note"] == "the result must be (1, 2, 32, 32) in torch.float32, got (1, 2, 32, 32) in torch.float64"


def test_ours_in_an_error_is_told_by_the_exit_status(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: Any, **how: Any) -> Any:
        raise NotImplementedError("no such filter")

    monkeypatch.setattr(lowpass_cases, "mix_frequencies", broken)
    rows, status = run(small)
    assert status == f"rows of scalediff failed: {OURS[1]}"
    assert {r["row"]: r["note"] for r in rows}[OURS[1]] == "NotImplementedError: no such filter"


@pytest.mark.slow
def test_the_gate_is_kept_without_assertions() -> None:
    """python -O takes every `assert` out."""
    code = """
from bench.lowpass import __main__ as lowpass
from dataclasses import replace
from bench.lowpass.cases import IMPLEMENTATIONS, Case, each
wrong = replace(IMPLEMENTATIONS[9], prepare=each(lambda x: x))
print(__debug__, wrong.operation.name, wrong.name, *lowpass.Bench(Case("small", (1, 2, 32, 32)), "cpu", seconds=0.001).measured([wrong]))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    printed = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    ).stdout
    assert printed.startswith("False low pass torch.compile ")
    assert "'status': 'FAILED'" in printed
    assert "exceeds the budget" in printed
    assert "p50_ms" not in printed


def test_what_loses_the_device_ends_the_run_and_is_not_tried_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[int] = []

    def illegal(sets: Any) -> Any:
        lost.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    replaced(monkeypatch, "guided step", "torch.compile", prepare=illegal)
    own = lowpass.measured  # one by one, as on a GPU
    monkeypatch.setattr(lowpass, "measured", lambda all_, device, **how: (row for one in all_ for row in own([one], device, **how)))
    monkeypatch.setattr("bench.harness.device.device_lost", lambda device: bool(lost))
    rows, status = run(small)
    assert (
        status == "the device was lost in small/float32/planes/guided step/torch.compile: run the same command again to continue after it"
    )
    assert (len(rows), rows[-1]["status"]) == (4, "FAILED")
    lost.clear()
    rows, status = run(small)
    assert (len(rows), status, lost) == (len(IMPLEMENTATIONS), 0, [])


def test_what_cannot_be_counted_is_a_note_beside_the_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untold(call: Any, device: str) -> int:
        raise RuntimeError("no profiler\nhere")

    monkeypatch.setattr(gated, "kernels", untold)
    monkeypatch.setattr(gated, "peak_memory", lambda call, device: 3_000_000)
    row = run(small)[0][0]
    assert (row["status"], row["peak_megabytes"], row["launches"]) == ("ok", "3", "")
    assert row["note"] == "kernels unknown: RuntimeError: no profiler"


def test_a_second_run_goes_on(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lowpass, "LATENTS", [SMALL, Case("other", (1, 2, 32, 32))])
    monkeypatch.setattr(lowpass, "find_spec", lambda package: None)
    timed: list[str] = []
    own = lowpass.Bench.measured

    def watched(bench: Any, implementations: Any) -> Any:
        assert len({implementation.operation.name for implementation in implementations}) == 1, "one operation's truth is kept"
        timed.extend(lowpass.row_name(bench.case, implementation) for implementation in implementations)
        return own(bench, implementations)

    monkeypatch.setattr(lowpass.Bench, "measured", watched)

    def again(*arguments: str) -> list[str]:
        timed.clear()
        run(small, *arguments)
        return list(timed)

    every = again()
    whole = small.read_text().splitlines()
    assert len(whole) == len(every) + 1
    small.write_text("\n".join(whole[:4]) + "\n")
    capsys.readouterr()
    assert again() == every[3:], "the first three rows are finished"
    assert f"{every[0]}: as measured before" in capsys.readouterr().out
    assert len(small.read_text().splitlines()) == len(whole)
    assert again() == [name for name in every if "gaussian_blur" in name], "what was skipped is tried again"
    assert again("--cases", "other", "--again") == [name for name in every if name.startswith("other")]
    assert len(small.read_text().splitlines()) == len(whole), "rows that were not requested stay"
    assert again("--again") == every
    assert again("--seconds", "0.002") == every, "measured for another time"
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "4567def")
    assert again() == every, "another commit"
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "4567def with changes")
    assert again() == again() == every


def test_a_comparison(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(small)
    other = small.with_name("other.csv")
    other.write_text(small.read_text())
    capsys.readouterr()
    rows, _ = run(small, "--compare", str(other), "--again")
    assert f"{OURS[0]}: {rows[1]['p50_ms']} ms here, " in capsys.readouterr().out
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "4567def")
    run(small, "--compare", str(other))
    assert "not the same commit: here 4567def, there 0123abc; the ratios below include that difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--commit", "magic"], "--commit is for a copy of the tree without git's data: git has '0123abc' here, got 'magic'"),
        (["--cases", "magic"], "--cases takes a part of small, got 'magic'"),
        (["--seconds", "0"], "argument --seconds: must be positive and finite, got 0"),
        (["--seconds", "inf"], "argument --seconds: must be positive and finite, got inf"),
        (["--seconds", "nan"], "argument --seconds: must be positive and finite, got nan"),
        (["--compare", "nowhere.csv"], "argument --compare: takes a CSV of this benchmark, got nowhere.csv, which is no file"),
        (["--compare", __file__], "must have a column 'row'"),
        (["--csv", str(ROOT)], f"Is a directory: '{ROOT}'"),
        (["--device", "cuda"], "--device cuda needs a GPU that torch sees, got none"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], sentence: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        lowpass.main(["--device", "cpu", "--csv", str(small), *arguments])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not small.exists()


def test_rows_of_an_earlier_version_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_text("row,case\na,b\n")
    with pytest.raises(SystemExit) as stop:
        lowpass.main(["--device", "cpu", "--csv", str(small)])
    assert stop.value.code == 2
    assert "rows.csv is not of this benchmark" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(lowpass, "RESULTS", small.parent)
    small.rename(small.with_name("lowpass-x.csv"))
    with pytest.raises(SystemExit) as stop:
        lowpass.main(["--doc", str(small.with_name("page.md"))])
    assert stop.value.code == 2
    assert "lowpass-x.csv is not of this benchmark" in " ".join(capsys.readouterr().err.split())
