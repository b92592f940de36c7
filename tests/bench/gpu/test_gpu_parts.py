"""The parts of the one command for a GPU: the most valuable first, each a command that its benchmark takes, its rows described."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.attention import __main__ as attention
from bench.cascade import __main__ as cascade
from bench.gpu import __main__ as gpu
from bench.gpu import parts as gpu_parts
from bench.gpu.parts import PARTS, Part
from bench.harness.facts import ROOT
from bench.lowpass import __main__ as lowpass

FIRST = ["pipeline", "tests", "kernel", "attention-goals", "tune"]


def test_the_list_needs_no_gpu_and_says_how_long_all_of_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--list"])
    *listed, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [part.name for part in PARTS]
    assert [part.name for part in PARTS[:5]] == FIRST
    assert total == f"{len(PARTS)} parts, 72 minutes at their limits, 10 runs of 8 minutes; the first has room for {', '.join(FIRST)}"
    assert "about seventy minutes, ten runs" in " ".join(str(gpu.__doc__).split())
    gpu.main(["--list", "--only", "sanitizer", "tests"])
    listed = capsys.readouterr().out.splitlines()[:-1]
    assert [line.split()[0] for line in listed] == ["tests", "sanitizer"], "the order is not the caller's"


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_every_command_is_one_that_its_benchmark_takes(part: Part) -> None:
    """By that benchmark's own parser; tests are collected by the slow way alone, on a device."""
    words = part.command("NVIDIA H200", commit="abc")[2:]
    if part.arguments[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    assert words[-3:] == [f"{part.csv}-nvidia-h200.csv", "--commit", "abc"]
    if part.csv == "attention":
        options = attention._parser().parse_args(words)
        assert options.device == "cuda"
        assert set(options.provider or ()) <= set(attention.PROVIDERS)
    elif part.csv == "tune":
        assert words[:2] == ["--device", "cuda"]
    elif part.csv == "lowpass":
        assert lowpass._parser().parse_args(words).seconds == 0.2
    else:
        options = cascade._parser().parse_args(words)
        assert set(options.method) <= set(cascade.METHODS)
        assert set(options.model) <= set(cascade.SUBJECTS)


def test_a_picture_is_of_one_part_and_what_is_compared_is_measured_in_one_way() -> None:
    """Another limit is another measurement: it would replace the first, and no ratio is taken between the two."""
    drawn: list[tuple[str, ...]] = []
    ways: dict[tuple[str, ...], set[tuple[float, ...]]] = {}
    for options in (cascade._parser().parse_args(part.arguments[1:]) for part in PARTS if part.csv == "cascade"):
        (model,), (size,), (how,) = options.model, options.size, options.compile
        drawn += [(model, str(size), method, how) for method in options.method]
        ways.setdefault((model, how), set()).add((options.limit, options.steps, options.view_batch))
    assert len(set(drawn)) == len(drawn)
    assert all(len(way) == 1 for way in ways.values()), ways
    assert all(steps >= 2 for way in ways.values() for _, steps, _ in way)


def test_every_test_that_needs_a_gpu_is_run() -> None:
    (part,) = (part for part in PARTS if part.name == "tests-all")
    marked = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bmark\.gpu\b", path.read_text())]
    assert Path("tests/kernels/neighborhood/test_on_the_gpu.py") in marked
    assert not [path for path in marked if not any(path.is_relative_to(word) for word in part.arguments)]


def test_rows_of_one_shape_are_the_same_whoever_measures_them() -> None:
    """Few shapes first and all of them later: a row counts as measured only with the same seconds."""
    seconds = {attention._parser().parse_args(part.arguments[1:]).seconds for part in PARTS if part.csv == "attention"}
    assert len(seconds) == 1


def test_tests_kernels_and_goals_take_three_and_a_half_minutes_at_most() -> None:
    assert sum(part.limit for part in PARTS[:3]) <= 210
    assert sum(part.limit for part in PARTS[:5]) + gpu_parts.GRACE <= 480


def test_tests_are_spread_where_pytest_can(monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = (part for part in PARTS if part.name == "tests")
    for found, expected in ((None, False), (find_spec("pytest"), True)):
        monkeypatch.setattr(gpu_parts, "find_spec", lambda name, found=found: found)
        assert ("-n" in part.command("X")) is expected
        assert ("--timeout" in part.command("X")) is expected


def row(name: str, status: str, note: str = "", **more: str) -> dict[str, str]:
    return {"row": name, "status": status, "note": note} | more


def test_rows_are_described_by_their_status_and_why() -> None:
    rows = [
        row("a", "ok", p50_ms="1"),
        row("a/gate", "ok", part="gate"),
        row("a/run", "ok", "composed, not measured: above --limit 50 s", part="run"),
        row("b", "FAILED", "image: NaN"),
        row("c", "error", "RuntimeError: No available kernel"),
        *(row(f"n{i}", "skipped", "the natten package is not installed") for i in range(4)),
    ]
    assert gpu_parts.describe(rows) == "8 rows: 2 ok, 1 FAILED, 1 error, 4 skipped; first b: image: NaN"
    assert gpu_parts.describe([]) == "no rows"
