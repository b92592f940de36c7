"""What the one command for a GPU ends with: calls of the quick shapes, goals, how it ended; sixty lines at most."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.gpu import __main__ as gpu
from bench.harness.rows import write_rows
from tests.bench.gpu.small_parts import main, script


def test_it_ends_with_the_goals_and_the_quick_shapes(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"machine": "NVIDIA H200", "commit": "0123abc", "cuda": "13", "status": "ok", "command": "x"}
    flux = facts | {
        "row": "flux-4096/bf16/window/triton",
        "shape": "flux-4096",
        "provider": "triton",
        "p50_ms": "29",
        "tflops": "651",
        "kernels_ms": "image_kernel 20, text_kernel 9",
    }
    flux |= {"matrix_percent": "82"}
    other = flux | {"row": "flux-4096/fp16/window/triton", "p50_ms": "28"}
    failed = flux | {"row": "sdxl-64-4096/fp16/gather", "status": "FAILED", "provider": "gather", "p50_ms": ""}
    older = flux | {"row": "flux-4096/bf16/global/triton", "commit": "4567def", "p50_ms": "27"}
    write_rows(module / "attention-nvidia-h200.csv", list(flux), [flux, other, failed, older])
    main(module, monkeypatch, [script("one")])
    out = capsys.readouterr().out
    assert "kernel, FLUX 4096 px, 512 text, bf16: 651 TFLOP/s, met (" in out
    assert re.search(r"SDXL 4096 px, a whole run, beside MultiDiffusion: not measured yet; at least .*x on H100 or H200", out)
    assert "\nflux-4096/bf16/window/triton: 29 ms, 651 TFLOP/s (image_kernel 20, text_kernel 9)\n" in out
    assert [number for number in ("28", "27") if f"{number} ms" in out] == [], "another dtype than the model's, another commit"
    assert "windows by SDPA" not in out, "a CPU's goal"
    (module / "cascade-x.csv").write_text("name\na\n")
    main(module, monkeypatch, [script("one")])
    assert "no results: ValueError: cascade-x.csv must have a column 'row'" in capsys.readouterr().out


def test_goals_are_shown_on_another_device_than_they_are_set_for(tmp_path: Path) -> None:
    row = {
        "row": "flux-4096/bf16/window/triton",
        "status": "ok",
        "provider": "triton",
        "tflops": "500",
        "p50_ms": "1",
        "matrix_percent": "9",
    }
    row |= {"machine": "NVIDIA H100", "commit": "abc", "cuda": "13", "command": "x", "shape": "flux-4096"}
    write_rows(tmp_path / "attention-nvidia-h100.csv", list(row), [row])
    assert [line for line in gpu.results(tmp_path, "NVIDIA H100", "abc") if "500 TFLOP/s, missed" in line and "on H100 or H200" in line]


def test_what_results_lack_costs_neither_the_parts_nor_the_exit_status(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*_: object) -> list[str]:
        raise ModuleNotFoundError("No module named 'scalediff_kernels'")

    monkeypatch.setattr(gpu, "results", lacking)
    assert main(module, monkeypatch, [script("red", "--exit", "1")])[0] == 1
    out = capsys.readouterr().out
    assert "no results: ModuleNotFoundError: No module named 'scalediff_kernels'" in out
    assert re.search(r"^red +failed", out, re.MULTILINE)


def test_the_summary_has_sixty_lines_at_most_and_ends_with_how_it_ended(tmp_path: Path) -> None:
    outcomes = {f"part {n}": gpu.Outcome("done", "") for n in range(100)}
    lines = gpu.summary(outcomes, tmp_path, "NVIDIA H200", "abc", ["failed: x"])
    assert len(lines) == 60
    assert lines[-1] == "failed: x"
    assert re.fullmatch(r"and \d+ lines more: see the CSVs in .*", lines[-2])
    few = gpu.summary({}, tmp_path, "NVIDIA H200", "abc", [])
    assert not [line for line in few if "lines more" in line]
