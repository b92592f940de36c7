"""The command that times whole pictures: finished rows, comparisons, growth, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pictures need diffusers")

from bench.cascade import __main__ as cascade
from bench.cascade import rows as cascade_rows
from bench.cascade.methods import METHODS
from bench.cascade.rows import FIELDS, Unit
from bench.harness.facts import ROOT, package_version
from bench.harness.rows import read_rows, write_rows
from scalediff.patching import call


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command, in a tree without git, with ceilings that take no time, into a CSV of its own: exit status, stdout and stderr."""
    monkeypatch.setattr("bench.harness.facts._commit", lambda: "unknown")
    monkeypatch.setattr(cascade, "ceilings", lambda device, dtype: SimpleNamespace(matrix_tflops=1.0))
    monkeypatch.setattr(cascade_rows, "_RUNS", 1)

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cascade.main(["--csv", str(tmp_path / "rows.csv"), *arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


DIRECT = ("--model", "flux-small", "--size", "32", "--method", "direct")


@pytest.mark.slow
def test_finished_rows_are_not_measured_again(ran: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    code, out, _ = ran(*DIRECT, "npa-global", "--commit", "abc")
    assert code == 0
    first = read_rows(path)
    assert {"flux-small/32/direct/eager/run", "flux-small/32/npa-global/eager/2-32/attention"} <= set(first)
    assert len(out.splitlines()) == len(first)
    assert all(row["commit"] == "abc" and row["torch"] == torch.__version__ and row["limit_s"] == "210" for row in first.values())
    assert not list(tmp_path.glob("*.part"))
    _, out, _ = ran(*DIRECT, "--commit", "abc")
    assert out == "flux-small/32/direct/eager: as measured before\n"
    assert read_rows(path) == first
    del first["flux-small/32/direct/eager/run"]  # interrupted before its end, and beside it what no longer is measured
    first["flux-small/32/direct/eager/9-99/step"] = {**next(iter(first.values())), "row": "flux-small/32/direct/eager/9-99/step"}
    write_rows(path, FIELDS, first.values())
    ran(*DIRECT, "--commit", "abc")
    third = read_rows(path)
    assert "flux-small/32/direct/eager/run" in third
    assert "flux-small/32/direct/eager/9-99/step" not in third
    for changed in (("--commit", "def"), ("--commit", "abc", "--again"), ("--commit", "abc", "--limit", "211")):
        _, out, _ = ran(*DIRECT, *changed)
        assert "as measured before" not in out
    assert "flux-small/32/npa-global/eager/run" in read_rows(path), "other units stay"


@pytest.mark.slow
def test_a_comparison(ran: Any, tmp_path: Path) -> None:
    _, out, _ = ran(*DIRECT, "--commit", "abc")
    records = list(read_rows(tmp_path / "rows.csv").values())
    assert len(records) == len(out.splitlines())
    assert records[-1]["row"] == "flux-small/32/direct/eager/run"
    assert all(set(row) == set(FIELDS) for row in records)
    other = tmp_path / "other.csv"
    for row in records:
        row |= {"commit": "def", "p50_ms": row["p50_ms"] and f"{2 * float(row['p50_ms']):.6g}"}
    write_rows(other, FIELDS, records)
    code, out, _ = ran(*DIRECT, "--commit", "abc", "--compare", str(other))
    assert code == 0
    printed = out.splitlines()[1:]
    assert printed[0] == "not the same commit: here abc, there def; the ratios below include that difference"
    assert next(line for line in printed if "1-32/step" in line).endswith("2.000x")
    assert next(line for line in printed if line.startswith("flux-small/32/direct/eager/run")).endswith(("2.000x", "1.999x", "2.001x"))


@pytest.mark.slow
def test_a_failure_of_ours_is_the_exit_status(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "joint_neighborhood_patch_attention", lambda q, k, v, tq, tk, tv, **how: (q, tq))
    code, out, _ = ran("--model", "flux-small", "--size", "32", "--method", "npa")
    assert code == "rows of scalediff failed: flux-small/32/npa/eager/gate-stage, flux-small/32/npa/eager/run"
    assert "flux-small/32/npa/eager/gate-stage: FAILED, error" in out


def test_growth_is_of_the_embedded_model(monkeypatch: pytest.MonkeyPatch, ran: Any) -> None:
    units: list[Unit] = []
    monkeypatch.setattr(cascade, "measured_rows", lambda wanted, options: units.extend(wanted) or iter(()))
    ran("--growth")
    assert {one.model for one in units} == {"demo"}
    assert list(dict.fromkeys(one.size for one in units)) == [128, 256, 512, 1024]
    assert {one.method for one in units} == {"npa", "authors", "cascade-full", "multidiffusion", "demofusion", "direct"}
    units.clear()
    ran()
    assert {(one.model, one.method) for one in units} == {(m, n) for m in ("sdxl-small", "flux-small", "demo") for n in METHODS}


@pytest.mark.slow
def test_the_embedded_model_grows_in_time_and_memory(ran: Any, tmp_path: Path) -> None:
    code, _, _ = ran("--growth", "--size", "128", "--method", "npa", "--limit", "1e-3", "--commit", "abc")
    assert code == 0
    row = read_rows(tmp_path / "rows.csv")["demo/128/npa/eager/run"]
    assert row["status"] == "skipped", "a limit of a millisecond"
    ran("--growth", "--size", "128", "--method", "npa", "--limit", "60", "--commit", "abc")
    row = read_rows(tmp_path / "rows.csv")["demo/128/npa/eager/run"]
    assert row["status"] == "ok"
    assert float(row["composed_s"]) > 0
    assert bool(row["measured_s"]) == (row["rate_of"] == "measured")
    assert row["peak_megabytes"] == "" or float(row["peak_megabytes"]) >= float(row["before_megabytes"]) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "dalle"], "argument --model: invalid choice: 'dalle' (choose from"),
        (["--method", "npa", "magic"], "argument --method: invalid choice: 'magic' (choose from"),
        (["--compile", "jit"], "argument --compile: invalid choice: 'jit' (choose from"),
        (["--model", "sdxl", "--device", "cpu"], "--model sdxl is of true size, for a GPU; small ones are sdxl-small"),
        (["--growth", "--model", "demo"], "argument --model: not allowed with argument --growth"),
        (["--limit", "0"], "argument --limit: must be positive and finite, got 0"),
        (["--steps", "0"], "argument --steps: must be positive and finite, got 0"),
        (["--view-batch", "0"], "argument --view-batch: must be positive and finite, got 0"),
        (["--size", "0"], "argument --size: must be positive and finite, got 0"),
        (["--compare", "nowhere.csv"], "argument --compare: takes a CSV of this benchmark, got nowhere.csv, which is no file"),
        (["--limit", "inf"], "argument --limit: must be positive and finite, got inf"),
    ],
)
def test_what_is_unknown_is_refused_in_a_sentence(ran: Any, arguments: list[str], sentence: str) -> None:
    code, _, err = ran(*arguments)
    assert code == 2
    assert sentence in err


def test_a_gpu_that_is_not_there_is_refused(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda needs a GPU that torch sees, got none" in ran("--device", "cuda")[2]


def test_without_diffusers_there_is_one_sentence(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version = package_version
    monkeypatch.setattr("bench.harness.facts.package_version", lambda name: "absent" if name == "diffusers" else version(name))
    code, _, err = ran()
    assert code == 2
    assert 'pipelines need diffusers, not installed here: pip install "scalediff[diffusers]"' in err


def test_a_broken_csv_is_refused(ran: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("name\nx\n")
    assert "rows.csv must have a column 'row'" in ran(*DIRECT)[2]


def test_import_brings_no_diffusers() -> None:
    code = "import sys, bench.cascade.__main__; print({'diffusers', 'transformers'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=_paths())
    assert printed.stdout.strip() == "set()"


def _paths() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}
