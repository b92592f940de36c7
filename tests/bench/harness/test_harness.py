"""Rows that appear whole, stand or are measured again, and are compared with a word about what differs; clocks and ceilings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench.harness import device, timing
from bench.harness import facts as harness_facts
from bench.harness.command import names_of, shard
from bench.harness.facts import ROOT, VERSIONS, facts
from bench.harness.rows import RowFile, compared, finished_rows, read_records, read_rows, write_rows
from bench.harness.timing import Timing, kernels, measure_in_turn, peak_memory

FACTS = {"machine": "X", "commit": "abc", "torch": "2"}


def row(name: str, time: str, **facts: str) -> dict[str, str]:
    return {"row": name, "p50_ms": time} | FACTS | facts


def test_rows_are_finished_only_with_the_same_facts_of_one_commit() -> None:
    rows = {"a": row("a", "1"), "b": row("b", "1", commit="def"), "c": row("c", "1", machine="Y"), "d": {"row": "d"}}
    assert finished_rows(rows, FACTS) == {"a"}
    for commit in ("unknown", "abc with changes"):
        changed = {"a": row("a", "1", commit=commit)}
        assert finished_rows(changed, FACTS | {"commit": commit}) == set()


def test_a_comparison_says_what_differs_before_any_ratio() -> None:
    here = {"a": row("a", "2"), "b": row("b", ""), "c": row("c", "1"), "d": row("d", "1")}
    untimed = row("c", "", commit="def", status="skipped", note="no kernel")
    there = {"a": row("a", "3", commit="def"), "b": row("b", "1", commit="def"), "c": untimed, "e": row("e", "1")}
    assert compared(here, there, facts=tuple(FACTS)) == [
        "not the same commit: here abc, there def; the ratios below include that difference",
        "a: 2 ms here, 3 ms there, 1.500x",
    ]
    same = {"a": row("a", "2")}
    assert compared(same, same, facts=tuple(FACTS)) == ["a: 2 ms here, 2 ms there, 1.000x"]
    for other in ({"z": row("z", "1")}, {"a": row("a", "", status="FAILED")}):
        assert compared(same, other, facts=tuple(FACTS)) == ["no row has a time in both files: 1 rows here, 1 there"]


def test_only_times_of_one_kind_are_compared() -> None:
    """Milliseconds that were measured, or seconds that a whole run was composed of."""
    measured, composed, only = row("a", "4000", composed_s="5"), row("a", "", composed_s="2"), row("a", "4000")
    pairs = ((measured, measured), (measured, composed), (composed, composed), (composed, only))
    found = [compared({"a": a}, {"a": b}, facts=()) for a, b in pairs]
    assert found == [
        ["a: 4000 ms here, 4000 ms there, 1.000x"],
        ["a: 5 s composed here, 2 s composed there, 0.400x"],
        ["a: 2 s composed here, 2 s composed there, 1.000x"],
        ["no row has a time in both files: 1 rows here, 1 there"],
    ]


def test_an_unknown_fact_differs_from_a_known_one() -> None:
    (printed, _) = compared({"a": row("a", "1")}, {"a": {"row": "a", "p50_ms": "1", "machine": "X", "torch": "2"}}, facts=tuple(FACTS))
    assert printed == "not the same commit: here abc, there unknown; the ratios below include that difference"


def test_rows_are_read_back_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    assert read_rows(path) == {}
    write_rows(path, ("row", "p50_ms"), [{"row": "a", "p50_ms": "1"}])
    assert read_rows(path) == {"a": {"row": "a", "p50_ms": "1"}}
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"], "nothing half written is left"
    path.write_text("row,p50_ms\na,1\na,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv must name every row once, got 1 names again"):
        read_rows(path)
    path.write_text("name\na\n")
    with pytest.raises(ValueError, match=r"rows\.csv must have a column 'row', got \['name'\]"):
        read_rows(path)
    for text, columns in (("a note\n", r"\['a note'\]"), ("\n", r"\[\]")):  # a file that is no CSV is not overwritten
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"rows\.csv must have a column 'row', got {columns}"):
            read_rows(path, ("row", "p50_ms"))
    path.write_text("row,p50_ms\na,1\nb,1,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv must have one cell for each column in every row, got more in b"):
        read_rows(path, ("row", "p50_ms"))
    path.write_text("row,p50_ms\n")
    assert read_rows(path, ("row", "p50_ms")) == {}
    path.write_text("")
    assert read_rows(path, ("row", "p50_ms")) == {}


def test_a_file_of_rows_is_written_with_every_row_and_read_by_the_next_run(tmp_path: Path) -> None:
    fields = ("row", "p50_ms", *FACTS)
    file = RowFile(tmp_path / "rows.csv", fields, FACTS, order=("b", "a"))
    for name, time in (("c", "1"), ("a", "2"), ("b", "3"), ("a", "4")):
        assert file.add({"row": name, "p50_ms": time, "unknown": "x"}) == {"row": name, "p50_ms": time, **FACTS}
    assert [(name, one["p50_ms"]) for name, one in read_rows(file.path).items()] == [("b", "3"), ("a", "4"), ("c", "1")]
    assert RowFile(file.path, fields, FACTS).finished == {"a", "b", "c"}
    assert RowFile(file.path, fields, FACTS | {"torch": "3"}).finished == set()


def test_the_commit_is_given_found_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_facts.shutil, "which", lambda name: None)
    assert facts()["commit"] == "unknown"
    assert facts(commit="0123abc")["commit"] == "0123abc"


def test_a_commit_that_git_knows_better_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree with changes is no commit, and another commit is not this one."""
    monkeypatch.setattr(harness_facts, "_commit", lambda: "0123abc")
    assert [facts(commit=given)["commit"] for given in (None, "0123abc", "0123abcdef")] == ["0123abc"] * 3
    for known, given in (("0123abc", "4567def"), ("0123abc with changes", "0123abc"), ("0123abc", "0123abc with changes")):
        monkeypatch.setattr(harness_facts, "_commit", lambda known=known: known)
        with pytest.raises(
            ValueError, match=f"--commit is for a copy of the tree without git's data: git has '{known}' here, got '{given}'"
        ):
            facts(commit=given)


def test_a_card_tells_its_driver_and_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts(VERSIONS)["card"] == ""
    assert set(facts(VERSIONS)) == set(VERSIONS)
    cards = {
        "570.133.20, 700.00 W, 1980 MHz\n": "driver 570.133.20, 700.00 W, 1980 MHz",
        "570.1, 700.00 W, 1980 MHz\n570.1, 700.00 W, 1980 MHz\n": "driver 570.1, 700.00 W, 1980 MHz",
        "570.1, 700 W, 1980 MHz\n570.1, 350 W, 1980 MHz\n": "driver 570.1, 700 W, 1980 MHz or driver 570.1, 350 W, 1980 MHz",
        "": "",
    }
    for printed, words in cards.items():
        monkeypatch.setattr(harness_facts.subprocess, "run", lambda *_, printed=printed, **__: subprocess.CompletedProcess([], 0, printed))
        assert harness_facts._card() == words

    def failing(problem: Exception) -> Any:
        raise problem

    for problem in (FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 5), subprocess.CalledProcessError(9, "x")):
        monkeypatch.setattr(harness_facts.subprocess, "run", lambda *_, problem=problem, **__: failing(problem))
        assert harness_facts._card() == ""


def test_what_is_forgotten_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the C library can; elsewhere nothing is said."""
    trimmed: list[int] = []
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trimmed.append))
    device.forget("cpu")
    assert trimmed == [0]
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())
    device.forget("cpu")


class FakeEvent:
    """Of the fake clock below, in milliseconds."""

    now = staticmethod(lambda: 0.0)

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


def test_sets_are_taken_in_turn_after_each_was_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but in calls: all sets once, then for a tenth of the time and 0.3 s, then what is timed."""
    called, synchronized = list[int](), list[int]()
    calls = [lambda i=i: called.append(i) for i in range(3)]
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(len(called)))
    for once, seconds, warm, runs in (
        (0.5, 10.0, 2, 20),
        (0.5, 0.1, 1, 5),
        (2.0, 0.1, 1, 3),
        (1 / 16, 1.0, 5, 16),
        (1 / 16, 90.0, 144, 500),
    ):
        called.clear()
        synchronized.clear()
        monkeypatch.setattr(timing.time, "perf_counter", lambda once=once: once * len(called))
        monkeypatch.setattr(FakeEvent, "now", staticmethod(lambda once=once: once * len(called)))
        found = measure_in_turn(calls, "cuda", seconds=seconds)
        assert called == [i % 3 for i in range(3 + warm + runs)]
        assert synchronized == [*range(3, 4 + warm), 3 + warm + runs], "after all sets, after each warm run, and at the end"
        assert found == Timing(1000 * once, 1000 * once, 1000 * once)


def test_on_a_cpu_a_call_alone_is_timed_as_calls_side_by_side_are(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.5 * len(called))
    assert measure_in_turn([lambda i=i: called.append(i) for i in range(3)], "cpu", seconds=4.0) == Timing(500.0, 500.0, 500.0)
    assert called == [i % 3 for i in range(3 + 8)]
    with pytest.raises(ZeroDivisionError):
        measure_in_turn([lambda: 1 / 0], "cpu")
    assert peak_memory(lambda: None, "cpu") is None
    assert kernels(lambda: None, "cpu") is None


def test_sets_of_inputs_are_more_than_caches_hold() -> None:
    """By hand, with a cache of 64 MB: of 4 MB, of 64 MB, and of more than any cache."""
    assert [timing.sets_of_inputs(size, "cpu") for size in (2**22, 2**26, 2**28)] == [16, 4, 1]


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 256 MB in 100 ms moves twice that; a product of 2048^3 is 2 x 2048^3 operations."""

    def fixed(calls: Any, device: str, *, seconds: float) -> Timing:
        calls[0]()
        return Timing(90.0, 100.0, 110.0)

    monkeypatch.setattr(timing, "measure_in_turn", fixed)
    found = timing.ceilings("cpu", torch.float32)
    assert found.copy_gbs == pytest.approx(2 * 2**28 / 0.1 / 1e9)
    assert found.matrix_tflops == pytest.approx(2 * 2048**3 / 0.1 / 1e12)


def test_what_is_timed_side_by_side_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entrants of 10 and 30 ms by a clock of their own; each with its sets of inputs, warm before the first round."""
    ran: list[str] = []
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def entrant(name: str, seconds: float, sets: int) -> list[Any]:
        def call(i: int) -> None:
            ran.append(f"{name}{i}")
            now[0] += seconds

        return [partial(call, i) for i in range(sets)]

    for seconds, rounds in ((0.27, 7), (0.01, 5)):
        ran.clear()
        found = timing.measure_together([entrant("a", 0.01, 2), entrant("b", 0.03, 3)], "cpu", seconds=seconds)
        assert ran[:5] == ["a0", "a1", "b0", "b1", "b2"]
        assert ran[5:] == [f"{name}{i % sets}" for i in range(rounds) for name, sets in (("a", 2), ("b", 3))]
        assert found == [pytest.approx((10.0,) * 3), pytest.approx((30.0,) * 3)]
    assert timing.measure_together([], "cpu", seconds=1e-9) == []


def test_what_breaks_is_left_out_and_the_others_are_timed() -> None:
    """At once, and after some rounds."""
    left = iter(range(4))
    called: list[int] = []

    def fail() -> None:
        called.append(1)
        raise ZeroDivisionError

    first, second, third = timing.measure_together([[fail] * 3, [lambda: next(left)], [lambda: None]], "cpu", seconds=0.001)
    assert isinstance(first, ZeroDivisionError)
    assert called == [1], "not called again for its other sets"
    assert isinstance(second, StopIteration)
    assert isinstance(third, Timing)


def test_the_attention_benchmark_loads_neither_triton_nor_model_libraries() -> None:
    code = "import sys, torch; before = set(sys.modules); import bench.attention; print(*(set(sys.modules) - before))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout.split()
    assert {"triton", "diffusers", "transformers", "natten", "scalediff"}.isdisjoint(loaded)


@pytest.mark.slow
def test_measuring_needs_no_pandas() -> None:
    """Every command is imported without it, and one that only writes tables says what to install."""
    names = ("quality", "compile", "flops", "models", "predictions", "gpu", "attention", "lowpass", "cascade", "hook")
    code = "import sys; sys.modules['pandas'] = None; from importlib import import_module\n"
    code += f"for name in {names}: import_module(f'bench.{{name}}.__main__')\n"
    code += "sys.modules['bench.models.__main__'].main(['--check'])"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ran.stderr.splitlines()[-1:] == ['this needs pandas: pip install -e ".[bench]"'], ran.stderr


def test_attention_takes_the_fastest_backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own switches say inside; cuDNN has no kernel here."""

    def measured(calls: Any, device: str, *, seconds: float) -> Timing:
        calls[0]()
        if torch.backends.cuda.cudnn_sdp_enabled():
            raise RuntimeError("No available kernel")
        return Timing(1.0, 2.0 if torch.backends.cuda.flash_sdp_enabled() else 1.5, 3.0)

    seen: list[int] = []
    monkeypatch.setattr(timing.F, "scaled_dot_product_attention", lambda q, k, v: seen.append(q.shape[-1]))
    monkeypatch.setattr(timing, "measure_in_turn", measured)
    timing.by_speed.cache_clear()
    for head_dim in (64, 128):
        assert timing.by_speed("cpu", torch.bfloat16, head_dim) == (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION)
    assert set(seen) == {64, 128}
    timing.by_speed.cache_clear()


def test_rows_of_another_benchmark_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.csv", ["row", "part"], [{"row": "a", "part": "run"}])
    assert read_rows(tmp_path / "x.csv", ["part", "row"]) == {"a": {"row": "a", "part": "run"}}
    with pytest.raises(ValueError, match=r"x.csv is not of this benchmark: it differs in the columns part"):
        read_rows(tmp_path / "x.csv", ["row", "p50_ms"])
    assert read_rows(tmp_path / "x.csv", ["row", "part", "new"])["a"]["new"] == "", "of an earlier version"
    with pytest.raises(ValueError, match="it differs in the columns status"):
        read_rows(tmp_path / "x.csv", ["row", "part", "status"])


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.csv")), ids=lambda path: path.name)
def test_rows_are_of_commits_that_git_has(path: Path) -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    if shutil.which("git") is None or git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no checkout with its whole history")
    commits = {row["commit"].removesuffix(" with changes") for row in read_records(path) if row.get("commit")}
    assert not [commit for commit in commits if git("cat-file", "-e", f"{commit}^{{commit}}").returncode != 0]


def test_names_and_shares_are_parsed_or_refused() -> None:
    assert names_of(["a", "b"])("b,a,b") == ["b", "a"]
    with pytest.raises(ArgumentTypeError, match=r"must be of a, b, got c, $"):
        names_of(["a", "b"])("a,c,")
    assert shard("2/3") == (2, 3)
    for text in ("3/3", "0/0", "-1/2", "1", "a/b", "1/2/3"):
        with pytest.raises(ArgumentTypeError, match=f"must be i/n with i from 0 to n - 1, got {text}"):
            shard(text)
