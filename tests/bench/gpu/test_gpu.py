"""The one command for a GPU: order, time, resuming, crashes and hangs, what is missing; parts are small Python processes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import parts as gpu_parts
from bench.gpu.parts import PARTS, Part
from bench.harness.facts import ROOT
from tests.bench.gpu.small_parts import DESCRIBED, FACTS, main, script


def ends(process: str) -> bool:
    """Whether a process ends within seconds, long before the child of a part would by itself."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_without_a_gpu_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "python3 -m bench.gpu needs a GPU that torch sees, got none.\n"
    assert not (tmp_path / "new").exists()


def test_help_says_what_to_do_without_diffusers_and_without_git(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "unpack the wheels of diffusers, importlib-metadata and zipp" in printed
    assert "--commit $(git rev-parse --short HEAD)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "tests", "speed"], r"argument --only: invalid choice: 'speed' \(choose from '?pipeline"),
        (["--minutes", "0"], r"--minutes must be more than the 10 s in which a part is ended, got 0\.0"),
        (["--minutes", "0.1"], r"got 0\.1"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_what_a_part_is_run_with_names_the_packages_that_rows_are_skipped_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("bench.harness.facts.package_version", lambda name: f"{name} 1")
    found = gpu.facts(gpu.SAME, "cuda")
    assert (found["natten"], found["transformers"], found["diffusers"]) == ("natten 1", "transformers 1", "diffusers 1")


def test_parts_run_in_order_and_what_is_done_is_not_run_again(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [script("one"), script("two", csv="lowpass"), script("three")]
    status, rows, began = main(module, monkeypatch, parts)
    assert (status, began) == (0, ["one", "two", "three"])
    assert [row["status"] for row in rows.values()] == ["done"] * 3
    assert rows["one"]["note"] == "one", "the last line printed"
    assert rows["two"]["note"] == DESCRIBED, "of this commit alone"
    assert rows["two"]["command"] == "python3 -m script --say two --csv lowpass-nvidia-h200.csv", "no folder of this machine in it"
    assert "== two: python3 -m script" in (module / "gpu.log").read_text()
    capsys.readouterr()
    assert main(module, monkeypatch, parts)[2] == []
    assert capsys.readouterr().out.count("done before") == 6, "as it comes, and in the table"
    assert main(module, monkeypatch, parts, "--commit", "4567def")[2] == ["one", "two", "three"], "another commit"
    assert main(module, monkeypatch, parts, natten="0.21")[2] == ["one", "two", "three"], "a package that rows are skipped without"
    changed = main(module, monkeypatch, parts, commit="0123abc with changes")
    assert changed[2] == main(module, monkeypatch, parts, commit="0123abc with changes")[2] == ["one", "two", "three"]


def test_a_part_that_crashes_is_reported_and_the_next_one_runs(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    parts = [script("red", "--exit", "1"), script("crash", "--exit", "segfault", csv="lowpass"), script("last")]
    status, rows, began = main(module, monkeypatch, parts)
    assert began == ["red", "crash", "last"]
    assert status == 1
    assert "\nfailed: red, crash; all that they printed is in " in capsys.readouterr().out
    assert rows["red"]["note"] == "exit status 1: red"
    assert rows["crash"]["note"].startswith("signal 6: ")
    assert rows["crash"]["note"].endswith(f"; {DESCRIBED}")
    assert rows["last"]["status"] == "done"
    assert main(module, monkeypatch, parts)[2] == ["red", "crash"], "failed parts are not finished"
    assert re.search(r"^last +done before", capsys.readouterr().out, re.MULTILINE)


def test_a_part_that_hangs_is_ended_with_what_it_started(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows, began = main(module, monkeypatch, [script("hang", "--sleep", "60", "--child", limit=2), script("last")])
    assert (status, began) == (0, ["hang", "last"])
    assert rows["hang"]["status"] == "stopped"
    assert rows["hang"]["note"] == "after 2 s, its own limit; hang"
    assert float(rows["hang"]["seconds"]) < 10
    assert ends((module / "child").read_text()), "its child runs on"


def test_what_a_part_leaves_of_its_limit_is_for_the_next_ones(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much again as they have, at most."""
    parts = [script("first"), script("second", "--sleep", "2.2", limit=2)]
    rows = main(module, monkeypatch, parts)[1]
    assert [row["status"] for row in rows.values()] == ["done", "done"]
    assert main(module, monkeypatch, parts[1:], commit="4567def")[1]["second"]["status"] == "stopped"
    endless = [script("first"), script("second", "--sleep", "60", limit=1)]
    assert "after 2 s, its own limit" in main(module, monkeypatch, endless, commit="89abcde")[1]["second"]["note"]


def test_the_time_for_all_is_kept_and_what_did_not_fit_is_named(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seconds that a part is given to end in are of that time."""
    parts = [script("first", least=1), script("long", "--sleep", "60", least=1), script("later", least=1)]
    status, rows, began = main(module, monkeypatch, parts, "--minutes", "0.1")
    assert (status, began) == (0, ["first", "long"])
    assert list(rows) == ["first", "long"], "what was not begun has no row"
    assert re.match(r"after [1-5] s, the end of the time for all parts", rows["long"]["note"]), "of 6 s, one is to end in"
    assert "not finished: long, later; the same command goes on with them" in capsys.readouterr().out


def test_a_part_is_begun_with_the_time_that_it_needs_at_least(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [script("pictures", least=60), script("small", least=1)]
    assert main(module, monkeypatch, parts, "--minutes", "0.5")[2] == ["small"]
    assert re.search(r"pictures: did not fit, (28|29) s were left, it is begun with 60", capsys.readouterr().out)
    assert all(part.least >= 60 for part in PARTS if part.csv == "cascade")
    assert all(part.least < part.limit for part in PARTS)


def test_what_is_missing_is_named_and_skipped(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    parts = [
        script("models", needs=("torch", "no_such_package")),
        script("checked", needs=("no-such-tool",)),
        script("last", needs=("torch",)),
    ]
    status, rows, began = main(module, monkeypatch, parts)
    assert (status, began) == (0, ["last"])
    assert rows["models"]["note"] == "needs no_such_package, not installed here"
    assert rows["checked"]["note"] == "needs no-such-tool, not installed here"
    assert capsys.readouterr().out.count("needs no_such_package, not installed here") == 2
    assert main(module, monkeypatch, parts)[1]["models"]["status"] == "skipped", "and tried again"


def test_without_diffusers_it_says_once_what_to_do(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for place in (gpu, gpu_parts):
        monkeypatch.setattr(place, "find_spec", lambda name: None if name == "diffusers" else find_spec(name))
    parts = [script("pictures", needs=("diffusers",)), script("more", needs=("diffusers",))]
    main(module, monkeypatch, parts)
    out = capsys.readouterr().out
    assert out.count("diffusers is not installed, so there are no whole pictures. Where diffusers is not installed") == 1
    assert "pictures: skipped, needs diffusers, not installed here" in out


def test_a_folder_on_the_path_is_found_from_wherever_a_part_runs(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(module)
    monkeypatch.setenv("PYTHONPATH", ".")
    monkeypatch.setattr(gpu_parts.facts, "ROOT", module / "tree")
    (module / "out").mkdir()
    assert main(module / "out", monkeypatch, [script("one", csv="lowpass")])[1]["one"]["status"] == "done"


def test_a_tool_that_refuses_the_device_is_no_failure(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    words = "E  ========= Error: Device not supported. See the list"
    facts: dict[str, Any] = {"needs": ("env",), "refuses": "Device not supported"}
    parts = [Part("refused", "", 30, ("script", "--say", words, "--exit", "1"), **facts), script("wrong", "--exit", "1", **facts)]
    status, rows, _ = main(module, monkeypatch, parts)
    assert (rows["refused"]["status"], rows["refused"]["note"]) == ("skipped", "Error: Device not supported. See the list")
    assert rows["wrong"]["status"] == "failed"
    assert status == 1
    assert "\nfailed: wrong;" in capsys.readouterr().out
    (part,) = (part for part in PARTS if part.name == "sanitizer")
    assert part.refuses == "Device not supported"


def test_a_part_with_an_error_among_its_rows_does_not_stand(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [script("one", csv="lowpass"), script("two", csv="lowpass")]
    assert main(module, monkeypatch, parts)[2] == ["one", "two"]
    path = module / "lowpass-nvidia-h200.csv"
    begin, mine = "row,status,p50_ms,commit,command\n", "python -m script --say {} --csv x"
    path.write_text(f"{begin}a,ok,1,0123abc,{mine.format('one')}\nb,error,,0123abc,{mine.format('two')}\nc,error,,f,{mine.format('one')}\n")
    assert main(module, monkeypatch, parts)[2] == ["two"], "rows are of the part whose command they name, and of one commit"


def test_a_damaged_csv_is_refused(module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (module / "gpu-nvidia-h200.csv").write_text("name\na\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda *_, **__: FACTS)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(module)])
    assert "must have a column 'row', got ['name']" in capsys.readouterr().err


def test_it_ends_its_part_when_it_is_ended(module: Path) -> None:
    """A process that gets a signal to end while its part sleeps."""
    code = (
        "import pathlib, runpy, sys, torch; from bench.gpu import parts; from bench.harness import facts\n"
        f"from {__name__} import FACTS, script; facts.ROOT = pathlib.Path(sys.argv[1]); torch.cuda.is_available = lambda: True\n"
        "parts.PARTS = (script('hang', '--sleep', '60', '--child'),); facts.facts = lambda *a, **k: FACTS\n"
        "sys.argv = ['x', '--out', sys.argv[1]]; runpy.run_module('bench.gpu', run_name='__main__')\n"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{module}", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([sys.executable, "-c", code, str(module)], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
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
    assert ends((module / "child").read_text()), "the part's child runs on"
