"""The command that tries neighbours of the table of launch configurations: what it tries, and what becomes of one that fails or hangs."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.tune import __main__ as tune
from scalediff_kernels.neighborhood.config import shared_memory


@pytest.mark.parametrize("name", tune.SHAPES)
def test_the_first_candidate_is_the_one_of_the_table_and_each_differs(name: str) -> None:
    first, *others = tune.candidates(name)
    assert first.config.path == "warp-specialised"
    assert len({one.name for one in (first, *others)}) == 1 + len(others) >= 7
    for one in others:
        changed = {field for field in one.config._fields if getattr(one.config, field) != getattr(first.config, field)}
        assert changed == {field for field in changed if field not in ("path", "part_windows", "part_blocks", "num_warps")} != set()


def test_a_candidate_comes_back_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails has a row that says so, and the next one is tried."""
    ones = tune.candidates("flux-4096")

    def check(candidate: tune.Candidate) -> dict[str, str]:
        if candidate == ones[1]:
            raise RuntimeError("no")
        return {"error": str(ones.index(candidate))}

    monkeypatch.setattr(tune, "check", check)
    found = list(tune.run_here("check", "flux-4096", json.dumps([one.config for one in ones[:3]]), 0.3))
    assert found == [{"error": "0"}, {"status": "FAILED", "note": "check: RuntimeError: no"}, {"error": "2"}]


def test_most_candidates_fit_into_shared_memory() -> None:
    """Buffers of queries, keys and values; the others have rows that say so."""
    for name, width in (("flux-4096", 128), ("sdxl-64-4096", 64)):
        rotated = 2 if name == "flux-4096" else 1
        sizes = [
            2 * width * (rotated * c.query_box[0] * c.query_box[1] + 2 * c.num_stages * c.key_box[0] * c.key_box[1])
            for c in (one.config for one in tune.candidates(name))
        ]
        assert sum(size + 1024 <= shared_memory("sm_90") for size in sizes) >= 5


FAILED = {"status": "FAILED", "note": "time: stopped after 20 s: it hangs, or is slow"}
SKIPPED = {"status": "skipped", "note": "one before it ended the process"}


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (subprocess.CompletedProcess([], 0, 'noise\n{"a": "1"}\n{"a": "2"}\n{"a": "3"}\n', ""), [{"a": "1"}, {"a": "2"}, {"a": "3"}]),
        (subprocess.CompletedProcess([], -6, '{"a": "1"}\n', "an\nabort"), [{"a": "1"}, FAILED | {"note": "time: abort"}, SKIPPED]),
        (subprocess.CompletedProcess([], -9, "", ""), [FAILED | {"note": "time: nothing was printed"}, SKIPPED, SKIPPED]),
        (subprocess.TimeoutExpired("python", 20, b'{"a": "1"}\n'), [{"a": "1"}, FAILED, SKIPPED]),
        (subprocess.TimeoutExpired("python", 20), [FAILED, SKIPPED, SKIPPED]),
    ],
)
def test_what_a_process_found(ended: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], **_: Any) -> Any:
        assert words[1:6] == ["-m", "bench.tune", "--one", "time", "sdxl-32-4096"]
        if isinstance(ended, Exception):
            raise ended
        return ended

    monkeypatch.setattr(subprocess, "run", run)
    assert tune.in_a_process("time", tune.candidates("sdxl-32-4096")[:3], 0.3, limit=20) == expected


def test_without_a_gpu_nothing_is_tried(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(["--device", "cpu", "--csv", str(tmp_path / "tune.csv")])
    assert ended.value.code == 2
    assert "error: configurations of the kernel run on an sm_90 GPU, got --device cpu" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_rows_of_candidates_that_hang_fail_and_are_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command, with processes and device pretended: a row for every candidate."""

    def in_a_process(what: str, ones: Sequence[tune.Candidate], seconds: float, *, limit: float) -> list[dict[str, str]]:
        rows = [{"error": "0.001"} if what == "check" else {f"p{n}0_ms": "2" for n in (2, 5, 8)} | {"tflops": "600"} for _ in ones]
        if what == "check" and ones[0].config.ping_pong is False:
            rows[0] = {"status": "FAILED", "note": "check: wrong"}
        return rows

    monkeypatch.setattr(tune, "in_a_process", in_a_process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.harness.command.facts", lambda names, device, commit: dict.fromkeys(names, "x"))
    monkeypatch.setattr("bench.harness.command.device.device_lost", lambda device: False)
    with pytest.raises(SystemExit) as ended:
        tune.main(["--device", "cuda", "--shape", "sdxl-64-4096", "--csv", str(tmp_path / "tune.csv")])
    assert ended.value.code in (0, None)
    with (tmp_path / "tune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [one.name for one in tune.candidates("sdxl-64-4096")]
    assert {row["status"] for row in rows if row["ping_pong"] == "True"} == {"ok"}
    assert {(row["status"], row["note"]) for row in rows if row["ping_pong"] == "False"} == {("FAILED", "check: wrong")}
