"""The command that times whole pictures: rows that stand, comparisons, growth, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pictures need diffusers")

from bench.cascade import __main__ as cascade
from bench.cascade.methods import METHODS
from bench.cascade.rows import Unit
from bench.harness import rows as harness
from bench.roofline.ceilings import Ceilings
from scalediff.patching import plan


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command, in a tree without git, with ceilings that take no time, into a CSV of its own: exit status and what was said."""
    monkeypatch.setattr(harness, "_commit", lambda: "unknown")
    monkeypatch.setattr(cascade, "ceilings", lambda device, dtype: Ceilings(1.0, 1.0))

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cascade.main(["--csv", str(tmp_path / "rows.csv"), *arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


DIRECT = ("--model", "flux-small", "--size", "32", "--method", "direct")


@pytest.mark.slow
def test_what_stands_is_not_measured_again(ran: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    code, out, _ = ran(*DIRECT, "npa-global", "--commit", "abc")
    assert code == 0
    first = harness.read_rows(path)
    assert {"flux-small/32/direct/eager/run", "flux-small/32/npa-global/eager/2-32/attention"} <= set(first)
    assert len(out.splitlines()) == len(first)
    assert all(row["commit"] == "abc" and row["torch"] == torch.__version__ and row["limit_s"] == "210" for row in first.values())
    assert not list(tmp_path.glob("*.part"))
    _, out, _ = ran(*DIRECT, "--commit", "abc")
    assert out == "flux-small/32/direct/eager: as measured before\n"
    assert harness.read_rows(path) == first
    del first["flux-small/32/direct/eager/run"]  # interrupted before its end, and beside it what no longer is measured
    first["flux-small/32/direct/eager/9-99/step"] = {**next(iter(first.values())), "row": "flux-small/32/direct/eager/9-99/step"}
    harness.write_rows(path, cascade.FIELDS, first.values())
    ran(*DIRECT, "--commit", "abc")
    third = harness.read_rows(path)
    assert "flux-small/32/direct/eager/run" in third
    assert "flux-small/32/direct/eager/9-99/step" not in third
    for changed in (("--commit", "def"), ("--commit", "abc", "--again"), ("--commit", "abc", "--limit", "211")):
        _, out, _ = ran(*DIRECT, *changed)
        assert "as measured before" not in out
    assert "flux-small/32/npa-global/eager/run" in harness.read_rows(path), "other units stay"


@pytest.mark.slow
def test_json_and_a_comparison(ran: Any, tmp_path: Path) -> None:
    _, out, _ = ran(*DIRECT, "--commit", "abc", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert told[-1]["row"] == "flux-small/32/direct/eager/run"
    assert all(set(row) == set(cascade.FIELDS) for row in told)
    other = tmp_path / "other.csv"
    for row in told:
        row |= {"commit": "def", "p50_ms": row["p50_ms"] and f"{2 * float(row['p50_ms']):.6g}"}
    harness.write_rows(other, cascade.FIELDS, told)
    code, out, _ = ran(*DIRECT, "--no-measure", "--compare", str(other))
    assert code == 0
    said = out.splitlines()[len(told) :]
    assert said[0] == "not the same commit: here abc, there def; the ratios below hold that too"
    assert next(line for line in said if "1-32/step" in line).endswith("2.000x")
    assert next(line for line in said if line.startswith("flux-small/32/direct/eager/run")).endswith(("2.000x", "1.999x", "2.001x"))


@pytest.mark.slow
def test_a_failure_of_ours_is_the_exit_status(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "joint_neighborhood_patch_attention", lambda q, k, v, tq, tk, tv, **how: (q, tq))
    code, out, _ = ran("--model", "flux-small", "--size", "32", "--method", "npa")
    assert code == "ours did not run as it should: flux-small/32/npa/eager/gate-stage, flux-small/32/npa/eager/run"
    assert "flux-small/32/npa/eager/gate-stage: FAILED, error" in out


def test_growth_is_of_the_embedded_model(monkeypatch: pytest.MonkeyPatch, ran: Any) -> None:
    asked: list[Unit] = []
    monkeypatch.setattr(cascade, "measured_rows", lambda units, options: asked.extend(units) or [])
    ran("--growth")
    assert {one.model for one in asked} == {"demo"}
    assert list(dict.fromkeys(one.size for one in asked)) == [128, 256, 512, 1024]
    assert {one.method for one in asked} == {"npa", "authors", "cascade-full", "multidiffusion", "demofusion", "direct"}
    asked.clear()
    ran()
    assert {(one.model, one.method) for one in asked} == {(m, n) for m in ("sdxl-small", "flux-small", "demo") for n in METHODS}


@pytest.mark.slow
def test_the_embedded_model_grows_in_time_and_memory(ran: Any, tmp_path: Path) -> None:
    code, _, _ = ran("--growth", "--size", "128", "--method", "npa", "--limit", "1e-3", "--commit", "abc")
    assert code == 0
    row = harness.read_rows(tmp_path / "rows.csv")["demo/128/npa/eager/run"]
    assert row["status"] == "skipped", "a limit of a millisecond is kept"
    ran("--growth", "--size", "128", "--method", "npa", "--limit", "60", "--commit", "abc")
    row = harness.read_rows(tmp_path / "rows.csv")["demo/128/npa/eager/run"]
    assert row["status"] == "ok"
    assert float(row["composed_s"]) > 0
    assert bool(row["measured_s"]) == (row["rate_of"] == "measured")
    assert row["peak_megabytes"] == "" or float(row["peak_megabytes"]) >= float(row["before_megabytes"]) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "dalle"], "--model takes sdxl, flux, sdxl-small, flux-small, demo, got dalle"),
        (["--method", "npa", "magic"], "--method takes direct, multidiffusion, "),
        (["--compile", "jit"], "--compile takes eager, compiled, got jit"),
        (["--model", "sdxl", "--device", "cpu"], "--model sdxl is of true size, for a GPU and without --small; small ones are sdxl-small"),
        (["--growth", "--model", "demo"], "takes no --model and no --small, got --growth and --model demo"),
        (["--limit", "0"], "--limit must be positive, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--view-batch", "0"], "--view-batch must be at least 1, got 0"),
        (["--size", "0"], "--size takes pixels per side, got 0"),
        (["--compare", "nowhere.csv"], "--compare takes a CSV of this benchmark, got nowhere.csv, which is no file"),
        (["--no-measure", "--csv", "nowhere.csv"], "--csv takes a file, with --no-measure one that is there, got nowhere.csv"),
        (["--limit", "inf"], "--limit must be positive, got inf"),
        (["--no-measure", "--again"], "rows are taken as they are or measured anew, got --no-measure and --again"),
    ],
)
def test_what_is_unknown_is_refused_in_a_sentence(ran: Any, arguments: list[str], sentence: str) -> None:
    code, _, err = ran(*arguments)
    assert code == 2
    assert sentence in err


def test_rows_that_stand_are_told_and_absent_ones_named(ran: Any, tmp_path: Path) -> None:
    unit = "flux-small/32/direct/eager"
    row = dict.fromkeys(cascade.FIELDS, "") | {"row": f"{unit}/run", "part": "run", "status": "skipped", "note": "for a test"}
    harness.write_rows(tmp_path / "rows.csv", cascade.FIELDS, [row])
    code, out, err = ran(*DIRECT, "npa", "--no-measure")
    assert (code, out) == (0, f"{unit}/run: skipped, for a test\n")
    assert err == "not in rows.csv: flux-small/32/npa/eager\n"
    _, out, _ = ran(*DIRECT, "--no-measure", "--json")
    assert json.loads(out) == row


def test_a_gpu_that_is_not_there_is_refused(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda needs a GPU that torch sees, got none" in ran("--device", "cuda")[2]


def test_without_diffusers_there_is_one_sentence(ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version = harness.package_version
    monkeypatch.setattr(harness, "package_version", lambda name: "absent" if name == "diffusers" else version(name))
    code, _, err = ran()
    assert code == 2
    assert 'pipelines need diffusers, not installed here: pip install "scalediff[diffusers]"' in err


def test_a_broken_csv_is_refused(ran: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("name\nx\n")
    assert "rows.csv must have a column 'row'" in ran(*DIRECT)[2]


def test_import_brings_no_diffusers() -> None:
    code = "import sys, bench.cascade; print({'diffusers', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=harness.ROOT, env=_paths())
    assert said.stdout.strip() == "set()"


def _paths() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(str(harness.ROOT / part) for part in (".", "kernels"))}
