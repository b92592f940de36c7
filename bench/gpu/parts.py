"""The parts of `bench.gpu`, the most valuable first, and how one of them runs: as a process of its own with a time limit."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.harness import facts
from bench.harness.rows import read_records, slug

Row = Mapping[str, str]
GRACE = 10.0  # seconds between asking a process to end and killing it


@dataclass(frozen=True)
class Part:
    """One command."""

    name: str  # on the command line
    title: str  # for people
    limit: float  # seconds; what earlier parts left of theirs is added, up to as many again
    arguments: tuple[str, ...]  # of `python -m`
    least: float = 20.0  # seconds without which it is not started: it would end before its first row
    needs: tuple[str, ...] = ()  # modules and programs without which it is skipped
    refuses: str = ""  # what it prints where its program cannot work on this device
    csv: str = ""  # results are `CSV-MACHINE.csv`; such a command takes --csv and --commit, and resumes
    spread: bool = False  # tests in several processes with pytest-xdist, with a limit for each with pytest-timeout
    hangs: int = 60  # seconds after which a test counts as hanging

    def refusal(self) -> str:
        """Why it cannot run here; empty where it can."""
        missing = [name for name in self.needs if find_spec(name) is None and shutil.which(name) is None]
        return f"needs {' and '.join(missing)}, not installed here" if missing else ""

    def file(self, machine: str) -> str:
        """Its CSV, in the folder of results."""
        return f"{self.csv}-{slug(machine)}.csv"

    def rows(self, out: Path, machine: str, commit: str) -> list[Row]:
        """What it measured of a commit, in a CSV that it may share: the rows of its own command, and those whose command names no CSV."""
        if not self.csv:
            return []
        own = f" {shlex.join(['-m', *self.arguments])} --csv "
        rows = [row for row in read_records(out / self.file(machine)) if row.get("commit") == commit]
        return [row for row in rows if own in (row.get("command") or "") or " --csv " not in (row.get("command") or "")]

    def command(self, machine: str, *, commit: str = "") -> list[str]:
        """What follows `python3`."""
        words = ["-m", *self.arguments]
        if self.csv:
            words += ["--csv", self.file(machine), *(["--commit", commit] if commit else [])]
        if self.spread and find_spec("xdist") is not None:
            words += ["-n", str(min(12, os.cpu_count() or 1))]
        if self.spread and find_spec("pytest_timeout") is not None:
            words += ["--timeout", str(self.hangs), "--timeout-method", "thread"]  # a test that hangs fails by name, and the others go on
        return words

    def run(self, command: Sequence[str], out: Path, *, limit: float) -> tuple[int | None, str]:
        """Run a command to its end or to the limit, its output added to gpu.log: the exit status, None if it was stopped, and the output.

        A benchmark runs in the folder of results, so that no row names a folder of this machine. Folders of PYTHONPATH stay.
        """
        given = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        paths = os.pathsep.join([str(facts.ROOT), str(facts.ROOT / "kernels"), *given])
        status = None
        with (out / "gpu.log").open("ab+") as log:
            log.write(f"== {self.name}: {typed(command)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                [sys.executable, *command], cwd=out if self.csv else facts.ROOT, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(limit)
            finally:
                if process.poll() is None:
                    _end(process)
            log.seek(begin)
            printed = log.read().decode(errors="replace").strip()
            log.write(b"\n")
        return status, printed


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def typed(command: Sequence[str]) -> str:
    """A command as it can be typed."""
    return f"python3 {shlex.join(command)}"


def describe(rows: Sequence[Row]) -> str:
    """How many rows there are by status, and the first that is wrong."""
    rows = [row for row in rows if row.get("part") != "gate"]  # the run of a gate that failed has failed as well
    counts = [f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items()]
    wrong = [f"; first {row['row']}: {row.get('note') or 'no note'}"[:160] for row in rows if row["status"] in ("FAILED", "error")]
    return f"{len(rows)} rows: {', '.join(counts)}{''.join(wrong[:1])}" if rows else "no rows"


def _tests(name: str, title: str, limit: float, *words: str, **more: Any) -> Part:
    """Every test by name: what is stopped shows how far it came."""
    options = ("pytest", "-v", "-rf", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=45", "-k")
    more["needs"] = ("pytest", "triton", *more.get("needs", ()))
    return Part(name, title, limit, (*options, *words), **more)


def _calls(name: str, title: str, limit: float, *words: str, **more: Any) -> Part:
    return Part(name, title, limit, ("bench.attention", "--device", "cuda", "--seconds", "0.3", *words), csv="attention", **more)


def _pictures(name: str, title: str, limit: float, least: float, words: Sequence[str], *methods: str) -> Part:
    options = ("bench.cascade", "--device", "cuda", "--steps", "2", "--view-batch", "7")  # 49 views are seven times seven
    needs = ("diffusers", "transformers", "bench.cascade")
    return Part(name, title, limit, (*options, *words, "--method", *methods), least, needs, csv="cascade")


# PFLOPs and seconds at 4096 px: SDXL at 400 TFLOP/s npa, authors 6.6, 17 s (whole at --limit 50), multidiffusion 33, 84 s (whole at 150),
# demofusion 76, 190 s (composed); FLUX at 500 npa 29, 58 s (whole), multidiffusion 110, 220 s (composed of four steps, 30 s).
# Ratios are taken within one --limit, so what is compared has the same; one too low would skip what takes longer to watch.
_SDXL, _FLUX, _SDXL_COMPILED, _FLUX_COMPILED = (
    ("--model", model, "--limit", limit, "--size", "4096", "--compile", how)
    for model, limit, how in (("sdxl", "50", "eager"), ("flux", "110", "eager"), ("sdxl", "150", "compiled"), ("flux", "110", "compiled"))
)
_SDXL_2048, _FLUX_2048 = ([*words[:5], "2048", *words[6:]] for words in (_SDXL, _FLUX))
_FULL = ("direct", "cascade-full")
_RIGHT = "every_dtype or windows_of_the_paper or latents or feature_maps or low_precision"
_OF_GOALS = (
    "--shape", "flux-4096", "sdxl-64-4096", "sdxl-32-4096",
    "--provider", "windows-cudnn", "windows-flash", "gather", "gather-cudnn", "natten",
)  # fmt: skip
PARTS: tuple[Part, ...] = (  # six in the first eight minutes
    _tests(
        "pipeline", "the warp-specialised kernel of sm_90 is right; a wrong barrier hangs", 60, "pipeline",
        "tests/kernels/neighborhood/test_on_the_gpu.py", spread=True, hangs=20,
    ),
    _tests("tests", "every kernel is right on the device, in bf16 and fp16 among others", 75, _RIGHT, "tests/kernels", spread=True),
    _calls("kernel", "the attention kernels, few shapes", 60, "--quick", "--provider", "triton", "triton-plain"),
    _calls("attention-goals", "what its goals compare with, without a compiler", 50, "--quick", *_OF_GOALS),
    Part("tune", "neighbours of the warp-specialised kernel's table", 100, ("bench.tune", "--device", "cuda"), csv="tune"),
    _pictures("cascade-sdxl", "whole pictures, SDXL, 4096 px", 150, 60, _SDXL, "npa", "multidiffusion", "demofusion", "authors"),
    _pictures("cascade-flux", "whole pictures, FLUX.1-dev, 4096 px", 150, 75, _FLUX, "npa", "multidiffusion"),
    _calls("attention-quick", "few shapes by every implementation worth it", 240, "--quick"),
    Part("filters", "low-pass filters and guided steps", 240, ("bench.lowpass", "--device", "cuda", "--seconds", "0.2"), csv="lowpass"),
    _tests(
        "sanitizer", "compute-sanitizer over small calls of every kernel", 240, "sanitizer", "-m", "gpu", "tests/kernels", least=60,
        needs=("compute-sanitizer",), refuses="Device not supported",
    ),
    _pictures("cascade-sdxl-compiled", "SDXL with compiled blocks, 4096 px", 320, 90, _SDXL_COMPILED, "npa", "multidiffusion"),
    _pictures("cascade-flux-compiled", "FLUX.1-dev with compiled blocks, 4096 px", 320, 90, _FLUX_COMPILED, "npa", "multidiffusion"),
    _pictures("cascade-sdxl-compiled-more", "other methods of SDXL, compiled", 340, 90, _SDXL_COMPILED, "authors", "demofusion"),
    _pictures("cascade-flux-more", "other methods of FLUX.1-dev, 4096 px", 340, 90, _FLUX, "authors-jitter", "npa-global", *_FULL),
    _pictures("cascade-sdxl-more", "other methods of SDXL, 4096 px", 120, 60, _SDXL, *_FULL),
    _pictures("cascade-sdxl-2048", "SDXL, 2048 px", 280, 60, _SDXL_2048, "npa", "multidiffusion", "demofusion", "authors", *_FULL),
    _pictures(
        "cascade-flux-2048", "FLUX.1-dev, 2048 px", 320, 75, _FLUX_2048, "npa", "multidiffusion", "authors-jitter", "npa-global", *_FULL
    ),
    _calls("kernel-shapes", "the attention kernels, every shape and dtype", 300, "--provider", "triton", "triton-plain"),
    _tests(
        "tests-all", "all tests that need a device, but for compute-sanitizer", 180, "not sanitizer", "-m", "gpu", "tests/kernels",
        "tests/bench/attention/test_providers.py", spread=True,
    ),
    _calls("attention", "every shape, dtype and implementation", 460, least=60),
)  # fmt: skip
