"""The one command for a GPU: order, time, what stands, crashes and hangs, what is missing; parts are small processes of Python."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import attention, gpu, gpu_parts, harness, lowpass
from bench.gpu_parts import PARTS, Part

FACTS = {"machine": "NVIDIA H200", "commit": "0123abc", "python": "3", "torch": "2", "triton": "3", "diffusers": "absent"}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose file `told.py` parts run as `python -m told`: it prints, writes a row, ends as it is told to."""
    (tmp_path / "told.py").write_text(
        "import argparse, os, pathlib, subprocess, sys, time\n"
        "p = argparse.ArgumentParser()\n"
        "for name in ('--say', '--csv', '--commit', '--sleep', '--exit'): p.add_argument(name, default='')\n"
        "p.add_argument('--again', action='store_true'); p.add_argument('--child', action='store_true')\n"
        "o = p.parse_args()\n"
        "with open('began', 'a') as f: f.write(o.say + '\\n')\n"
        "rows = 'row,status,p50_ms,commit\\na,ok,1,0123abc\\nb,FAILED,,0123abc\\nc,skipped,,0123abc\\nd,ok,1,f\\n'\n"
        "if o.csv: pathlib.Path(o.csv).write_text(rows)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']) if o.child else None\n"
        "if child: pathlib.Path('child').write_text(str(child.pid))\n"
        "print(o.say, flush=True)\n"
        "if o.sleep: time.sleep(float(o.sleep))\n"
        "if o.exit == 'segfault': os.abort()\n"
        "sys.exit(int(o.exit or 0))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_parts.harness, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parts, "GRACE", 1.0)
    return tmp_path


def told(name: str, *more: str, limit: float = 30.0, csv: str = "", needs: tuple[str, ...] = (), tool: str = "") -> Part:
    return Part(name, f"part {name}", ("told", "--say", name, *more), limit, csv=csv, needs=needs, tool=tool)


def main(
    folder: Path, monkeypatch: pytest.MonkeyPatch, parts: list[Part], *arguments: str, commit: str = "0123abc"
) -> tuple[object, dict[str, dict[str, str]], list[str]]:
    """Exit status or message, rows, and the names of the parts that were begun, as on a machine with a GPU."""
    monkeypatch.setattr(gpu, "PARTS", tuple(parts))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda given: FACTS | {"commit": given or commit})
    (folder / "began").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(folder), *arguments])
    began = (folder / "began").read_text().split() if (folder / "began").exists() else []
    return stop.value.code, harness.read_rows(folder / "gpu-nvidia-h200.csv"), began


def test_without_a_gpu_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "python -m bench.gpu needs a GPU that torch sees, got none.\n"
    assert not (tmp_path / "new").exists()


def test_the_list_needs_no_gpu_and_has_the_parts_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert " ".join(listed) == "tests kernel attention-quick cascade-sdxl cascade-flux filters sanitizer attention cascade-more"
    gpu.main(["--list", "--only", "sanitizer", "tests"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tests", "sanitizer"], "the order is not the caller's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "tests", "speed"], "--only takes tests, kernel, .*, got speed"),
        (["--minutes", "0"], r"--minutes must be positive, got 0\.0"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("part", PARTS, ids=lambda p: p.name)
def test_every_command_is_one_that_its_benchmark_takes(part: Part) -> None:
    """By that benchmark's own parser; tests are collected by the slow way alone, on a device."""
    words = part.command("NVIDIA H200", commit="abc", again=True)[2:]
    if part.arguments[0] == "pytest":
        assert all((harness.ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    assert words[-4:] == [f"{part.csv}-nvidia-h200.csv", "--commit", "abc", "--again"]
    if part.csv == "attention":
        options = attention._parser().parse_args(words)
        assert options.device == "cuda"
        assert set(options.provider or ()) <= set(attention.PROVIDERS)
    elif part.csv == "lowpass":
        assert lowpass._parser().parse_args(words).seconds == 0.2
    else:
        cascade = pytest.importorskip("bench.cascade", reason="bench/cascade.py is not in this checkout")
        options = cascade._parser().parse_args(words)
        assert set(options.method) <= set(cascade.METHODS)
        assert set(options.model) <= set(cascade.SUBJECTS)


def test_rows_of_one_shape_are_the_same_whoever_measures_them() -> None:
    """Few shapes first and all of them later: what was measured stands only with the same seconds a row."""
    seconds = {attention._parser().parse_args(part.arguments[1:]).seconds for part in PARTS if part.csv == "attention"}
    assert len(seconds) == 1


def test_parts_run_in_order_and_what_is_done_stands(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [told("one"), told("two", csv="attention"), told("three")]
    status, rows, began = main(module, monkeypatch, parts)
    assert (status, began) == (0, ["one", "two", "three"])
    assert [row["status"] for row in rows.values()] == ["done"] * 3
    assert rows["one"]["note"] == "one", "the last line printed"
    assert rows["two"]["note"] == "3 rows, 1 failed, 1 without a time", "of this commit alone"
    assert rows["two"]["command"] == "python -m told --say two --csv attention-nvidia-h200.csv", "no folder of this machine in it"
    assert "== two: python -m told" in (module / "gpu.log").read_text()
    capsys.readouterr()
    assert main(module, monkeypatch, parts)[2] == []
    assert capsys.readouterr().out.count("done before") == 6, "told as it comes, and in the table"
    assert main(module, monkeypatch, parts, "--again", "--only", "two")[2] == ["two"]
    assert main(module, monkeypatch, parts, "--commit", "4567def")[2] == ["one", "two", "three"], "another commit"
    changed = main(module, monkeypatch, parts, commit="0123abc with changes")
    assert changed[2] == main(module, monkeypatch, parts, commit="0123abc with changes")[2] == ["one", "two", "three"]


def test_a_part_that_crashes_is_reported_and_the_next_one_runs(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    parts = [told("red", "--exit", "1"), told("crash", "--exit", "segfault", csv="attention"), told("last")]
    status, rows, began = main(module, monkeypatch, parts)
    assert began == ["red", "crash", "last"]
    assert str(status).startswith("failed: red, crash; all that they printed is in ")
    assert rows["red"]["note"] == "exit status 1: red"
    assert rows["crash"]["note"].startswith("signal 6: ")
    assert rows["crash"]["note"].endswith("; 3 rows, 1 failed, 1 without a time")
    assert rows["last"]["status"] == "done"
    assert main(module, monkeypatch, parts)[2] == ["red", "crash"], "failed parts do not stand"
    assert "last            done before" in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_with_what_it_started(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows, began = main(module, monkeypatch, [told("hang", "--sleep", "60", "--child", limit=3), told("last")])
    assert (status, began) == (0, ["hang", "last"])
    assert rows["hang"]["status"] == "stopped"
    assert rows["hang"]["note"] == "after 3 s, its own limit; hang"
    assert float(rows["hang"]["seconds"]) < 10
    stat = Path(f"/proc/{(module / 'child').read_text()}/stat")
    time.sleep(0.2)
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "its child runs on"


def test_the_time_for_all_is_kept_and_what_did_not_fit_is_named(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    parts = [told("first"), told("long", "--sleep", "60"), told("later")]
    status, rows, began = main(module, monkeypatch, parts, "--minutes", "0.07")
    assert (status, began) == (0, ["first", "long"])
    assert list(rows) == ["first", "long"], "what was not begun has no row"
    assert "the end of the time for all parts" in rows["long"]["note"]
    assert "not finished: long, later; the same command goes on with them" in capsys.readouterr().out


def test_what_is_missing_is_told_and_skipped(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    parts = [told("models", needs=("torch", "no_such_package")), told("checked", tool="no-such-tool"), told("last", needs=("torch",))]
    status, rows, began = main(module, monkeypatch, parts)
    assert (status, began) == (0, ["last"])
    assert rows["models"]["note"] == "needs no_such_package, not installed here"
    assert rows["checked"]["note"] == "needs no-such-tool, not installed here"
    assert capsys.readouterr().out.count("needs no_such_package, not installed here") == 2
    assert main(module, monkeypatch, parts)[1]["models"]["status"] == "skipped", "and asked again"


def test_a_damaged_csv_is_refused(module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (module / "gpu-nvidia-h200.csv").write_text("name\na\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda given: FACTS)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(module)])
    assert "must have a column 'row', got ['name']" in capsys.readouterr().err


def test_tests_are_spread_where_pytest_can(monkeypatch: pytest.MonkeyPatch) -> None:
    (part,) = (part for part in PARTS if part.name == "tests")
    for found, expected in ((None, False), (find_spec("pytest"), True)):
        monkeypatch.setattr(gpu_parts, "find_spec", lambda name, found=found: found)
        assert ("-n" in part.command("X")) is expected


def test_it_ends_its_part_when_it_is_ended(module: Path) -> None:
    """A process of its own, asked to end while its part sleeps."""
    code = (
        "import runpy, sys, torch; from bench import gpu, gpu_parts, harness; from tests.bench.test_gpu import FACTS, told\n"
        "import pathlib; gpu_parts.harness.ROOT = pathlib.Path(sys.argv[1]); torch.cuda.is_available = lambda: True\n"
        "gpu_parts.PARTS = (told('hang', '--sleep', '60', '--child'),); harness.facts = lambda *a, **k: FACTS\n"
        "sys.argv = ['x', '--out', sys.argv[1]]; runpy.run_module('bench.gpu', run_name='__main__')\n"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}:{module}", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([sys.executable, "-c", code, str(module)], env=environment, cwd=root, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (module / "child").exists() or not (module / "child").read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(20) == 143
    finally:
        process.kill()
    stat = Path(f"/proc/{(module / 'child').read_text()}/stat")
    time.sleep(0.2)
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "the part's child runs on"
