"""The rehearsal of the GPU run: an environment in which nothing of the project is installed, and a run that can fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.gpu.parts import PARTS
from bench.rehearsal import __main__ as rehearsal


def test_one_part_of_every_kind_is_rehearsed() -> None:
    picked = [part for part in PARTS if part.name in rehearsal.PARTS]
    assert [part.name for part in picked] == list(rehearsal.PARTS)
    assert {part.csv for part in picked} == {part.csv for part in PARTS} - {"tune"}


def test_an_environment_without_the_project_and_without_diffusers() -> None:
    """The packages of this one are there, an editable install's path is not."""
    with rehearsal.stage(None) as (work, python, paths):
        names = ["torch", "pytest", "diffusers", "scalediff", "scalediff_kernels"]
        code = f"from importlib.util import find_spec; print([find_spec(name) is not None for name in {names}])"
        out = subprocess.run([python, "-c", code], cwd=work, env={"PYTHONPATH": str(paths[0])}, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[True, True, False, False, False]"


def test_what_travels_has_no_git_and_no_ignored_file(tmp_path: Path) -> None:
    rehearsal.copy_tree(tmp_path)
    assert (tmp_path / "bench" / "gpu" / "__main__.py").exists()
    assert not (tmp_path / ".git").exists()
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.slow
def test_a_run_that_does_not_end_well_is_no_rehearsal() -> None:
    with pytest.raises(SystemExit, match="the rehearsal failed: exit status 2; not done by the summary: no-such-part"):
        rehearsal.main(["--parts", "no-such-part"])


@pytest.mark.slow
def test_the_run_for_a_gpu_ends_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests, a benchmark's rows, and whole pictures that are skipped for want of diffusers."""
    rehearsal.main(["--parts", "tests", "kernel", "cascade-sdxl"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "rehearsed: the run ended with its summary and exit status 0"
    summary = lines[max(i for i, line in enumerate(lines) if line.startswith("tests  ")) : -1]
    assert len(summary) <= 60
    assert [line.split()[:2] for line in summary[:3]] == [["tests", "done"], ["kernel", "done"], ["cascade-sdxl", "skipped"]]
    assert any("kernel, FLUX 4096 px" in line for line in summary), "the goals, which need the kernels' package in the parent"
