"""The command that tries neighbours of the table of launch configurations: what it tries, and what becomes of one that fails or hangs."""

from __future__ import annotations

import csv
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.tune import __main__ as tune
from bench.tune.candidates import Candidate, check
from scalediff_kernels.neighborhood.config import shared_memory


@pytest.mark.parametrize("name", tune.SHAPES)
def test_the_first_candidate_is_the_one_of_the_table_and_each_differs(name: str) -> None:
    first, *others = tune.candidates(name)
    assert first.config.path == "warp-specialised"
    assert len({one.name for one in (first, *others)}) == 1 + len(others) >= 7
    for one in others:
        changed = {field for field in one.config._fields if getattr(one.config, field) != getattr(first.config, field)}
        assert changed == {field for field in changed if field not in ("path", "part_windows", "part_blocks", "num_warps")} != set()


def test_most_candidates_fit_into_shared_memory() -> None:
    """Buffers of queries, keys and values; the others have rows that say so."""
    for name, width in (("flux-4096", 128), ("sdxl-64-4096", 64)):
        rotated = 2 if name == "flux-4096" else 1
        sizes = [
            2 * width * (rotated * c.query_box[0] * c.query_box[1] + 2 * c.num_stages * c.key_box[0] * c.key_box[1])
            for c in (one.config for one in tune.candidates(name))
        ]
        assert sum(size + 1024 <= shared_memory("sm_90") for size in sizes) >= 5


def numbered(candidate: Candidate) -> dict[str, str]:
    return {"error": str(candidate.config.num_stages)}


def wrong(candidate: Candidate) -> dict[str, str]:
    if candidate.config.num_stages == 4:
        raise RuntimeError("no")
    return numbered(candidate)


def fatal(candidate: Candidate) -> dict[str, str]:
    return numbered(candidate) if candidate.config.num_stages != 4 else os._exit(6)


FORK = multiprocessing.get_context("fork")  # does not import torch again
HANGS = FORK.Event()


def hanging(candidate: Candidate) -> dict[str, str]:
    if candidate.config.num_stages == 4:
        HANGS.set()
        time.sleep(60)
    return numbered(candidate)


class UntilItHangs(FORK.Process):  # type: ignore[name-defined, misc]
    """A process that has started when it hangs: on a busy machine it may take longer to come to that than the limit of the test."""

    def start(self) -> None:
        HANGS.clear()
        super().start()
        assert HANGS.wait(60)


SKIPPED = {"status": "skipped", "note": "one before it ended the process"}


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (numbered, [{"error": "2"}, {"error": "4"}, {"error": "3"}]),
        (wrong, [{"error": "2"}, {"status": "FAILED", "note": "RuntimeError: no"}, {"error": "3"}]),
        (fatal, [{"error": "2"}, {"status": "FAILED", "note": "the process ended with 6"}, SKIPPED]),
        (hanging, [{"error": "2"}, {"status": "FAILED", "note": "stopped after 1 s: it hangs, or is slow"}, SKIPPED]),
    ],
)
def test_what_a_process_found(measure: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process = UntilItHangs if measure is hanging else FORK.Process
    monkeypatch.setattr(tune, "PROCESSES", SimpleNamespace(Pipe=FORK.Pipe, Process=process))
    config = tune.candidates("flux-4096")[0].config
    ones = [Candidate("flux-4096", config._replace(num_stages=stages)) for stages in (2, 4, 3)]
    assert tune.in_a_process(measure, ones, limit=1 if measure is hanging else 60) == expected


def test_without_a_gpu_nothing_is_tried(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(["--device", "cpu", "--csv", str(tmp_path / "tune.csv")])
    assert ended.value.code == 2
    assert "error: configurations of the kernel run on an sm_90 GPU, got --device cpu" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_rows_of_candidates_that_hang_fail_and_are_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command, with processes and device pretended: a row for every candidate."""

    def in_a_process(measure: Any, ones: Sequence[Candidate], *, limit: float) -> list[dict[str, str]]:
        checks = measure is check
        rows = [{"error": "0.001"} if checks else {f"p{n}0_ms": "2" for n in (2, 5, 8)} | {"tflops": "600"} for _ in ones]
        if checks and ones[0].config.ping_pong is False:
            rows[0] = {"status": "FAILED", "note": "wrong"}
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
    assert {(row["status"], row["note"]) for row in rows if row["ping_pong"] == "False"} == {("FAILED", "wrong")}
