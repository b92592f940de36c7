"""The command that tries neighbours of the table of launch configurations: what it tries, and what becomes of one that fails or hangs."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

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


def test_a_candidate_comes_back_from_the_command_line() -> None:
    for one in tune.candidates("flux-4096"):
        assert tune.one(one.shape, json.dumps(one.config)) == one


def test_most_candidates_fit_into_shared_memory() -> None:
    """Buffers of queries, keys and values; the others have rows that say so."""
    for name, width in (("flux-4096", 128), ("sdxl-64-4096", 64)):
        rotated = 2 if name == "flux-4096" else 1
        sizes = [
            2 * width * (rotated * c.query_box[0] * c.query_box[1] + 2 * c.num_stages * c.key_box[0] * c.key_box[1])
            for c in (one.config for one in tune.candidates(name))
        ]
        assert sum(size + 1024 <= shared_memory("sm_90") for size in sizes) >= 5


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (subprocess.CompletedProcess([], 0, 'noise\n{"tflops": "600"}\n', ""), {"tflops": "600"}),
        (
            subprocess.CompletedProcess([], 1, "", "Traceback\nAssertionError: the result has NaN"),
            "check: AssertionError: the result has NaN",
        ),
        (subprocess.CompletedProcess([], -9, "", ""), "check: nothing was printed"),
        (subprocess.TimeoutExpired("python", 20), "check was stopped after 20 s: it hangs"),
    ],
)
def test_what_a_process_found(ended: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], **_: Any) -> Any:
        assert words[1:5] == ["-m", "bench.tune", "--one", "check"]
        if isinstance(ended, Exception):
            raise ended
        return ended

    monkeypatch.setattr(subprocess, "run", run)
    found = tune.in_a_process(tune.candidates("sdxl-32-4096")[0], "check", 0.3)
    assert found == (expected if isinstance(expected, dict) else {"status": "FAILED", "note": expected})
