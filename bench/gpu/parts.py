"""What `bench.gpu` runs, the most valuable first, and one part of it: a process of its own, stopped at its limit."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from bench.harness import rows as harness

Row = Mapping[str, str]
GRACE = 10.0  # seconds to end in, once asked


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: On the command line.
        title: For people.
        arguments: Of `python -m`.
        limit: Seconds that are its own; what earlier parts of a run left over is added, up to as many again.
        least: Seconds without which it is not begun: it would end before its first row.
        needs: Modules without which it is skipped.
        tool: A program without which it is skipped; none when empty.
        refuses: Words in which the tool says that it cannot work here.
        csv: Results are `CSV-MACHINE.csv`; none when empty. Such a command takes --csv, --commit and --again, and goes on where it
            stopped.
        spread: Over several processes where pytest-xdist is installed, with a limit for each test where pytest-timeout is.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    limit: float
    least: float = 20.0
    needs: tuple[str, ...] = ()
    tool: str = ""
    refuses: str = ""
    csv: str = ""
    spread: bool = False

    def refusal(self) -> str:
        """Why it cannot run here, in words; empty where it can."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            return f"needs {' and '.join(missing)}, not installed here"
        if self.tool and shutil.which(self.tool) is None:
            return f"needs {self.tool}, not installed here"
        return ""

    def refused(self, printed: str) -> str:
        """The line of what it printed in which its tool says that it cannot work here; empty where there is none."""
        found = re.search(rf"[^=\n]*{re.escape(self.refuses)}.*", printed) if self.refuses else None
        return f"{self.tool}: {found[0].strip()}" if found else ""

    def file(self, machine: str) -> str:
        """Its CSV, in the folder of results."""
        return f"{self.csv}-{harness.slug(machine)}.csv"

    def rows(self, out: Path, machine: str, commit: str) -> list[Row]:
        """What it measured of a commit: rows of its own command, in a CSV that it may share; where they name no CSV, all of them."""
        if not self.csv:
            return []
        mine = f" {shlex.join(['-m', *self.arguments])} --csv "  # after the interpreter, by whatever name
        rows = [row for row in harness.read_records(out / self.file(machine)) if row.get("commit") == commit]
        return [row for row in rows if mine in (row.get("command") or "") or " --csv " not in (row.get("command") or "")]

    def command(self, machine: str, *, commit: str = "", again: bool = False) -> list[str]:
        """What follows `python3`."""
        words = ["-m", *self.arguments]
        if self.csv:
            words += ["--csv", self.file(machine)]
            words += ["--commit", commit] if commit else []
            words += ["--again"] if again else []
        if self.spread and find_spec("xdist") is not None:
            words += ["-n", str(min(12, os.cpu_count() or 1))]
        if self.spread and find_spec("pytest_timeout") is not None:
            words += ["--timeout", "60", "--timeout-method", "thread"]  # of one test: one that hangs fails by name, and the others go on
        return words

    def folder(self, out: Path) -> Path:
        """Where it runs; benchmarks among their results, so that no row names a folder of this machine."""
        return out if self.csv else harness.ROOT


# Every test by name: what is stopped shows how far it came.
_PYTEST = ("pytest", "-v", "-rf", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=45", "-k")
_RIGHT = "every_dtype or windows_of_the_paper or latents or feature_maps or low_precision"
_MARKED = ("-m", "gpu", "tests/kernels", "tests/bench/test_providers.py")
_PIPELINES = ("diffusers", "transformers", "bench.cascade")
# PFLOPs and seconds at 4096 px: SDXL at 400 TFLOP/s npa, authors 6.6, 17 s (whole at --limit 50), multidiffusion 33, 84 s (whole at 150),
# demofusion 76, 190 s (composed); FLUX at 500 npa 29, 58 s (whole), multidiffusion 110, 220 s (composed of four steps, 30 s).
# Ratios are taken within one --limit, so what is compared has the same; one too low would skip what takes longer to watch.
_RUN = ("bench.cascade", "--device", "cuda", "--steps", "2", "--view-batch", "7")  # 49 views are seven times seven
_SDXL, _FLUX = (*_RUN, "--model", "sdxl", "--limit", "50"), (*_RUN, "--model", "flux", "--limit", "110")
_SDXL_WHOLE = (*_RUN, "--model", "sdxl", "--limit", "150")
_EAGER, _COMPILED = (("--size", "4096", "--compile", how, "--method") for how in ("eager", "compiled"))
_SMALLER = ("--size", "2048", "--compile", "eager", "--method")
_ATTENTION = ("bench.attention", "--device", "cuda", "--seconds", "0.3")
_OF_GOALS = (
    "--shape", "flux-4096", "sdxl-64-4096", "sdxl-32-4096",
    "--provider", "windows-cudnn", "windows-flash", "gather", "gather-cudnn", "natten",
)  # fmt: skip

PARTS: tuple[Part, ...] = (  # five in the first eight minutes
    Part(
        "tests", "every kernel is right on the device, in bf16 and fp16 among others", (*_PYTEST, _RIGHT, "tests/kernels"), 75,
        needs=("pytest", "triton"), spread=True,
    ),
    Part("kernel", "the attention kernel, few shapes", (*_ATTENTION, "--quick", "--provider", "triton"), 45, csv="attention"),
    Part("attention-goals", "what its goals compare with, without a compiler", (*_ATTENTION, "--quick", *_OF_GOALS), 50, csv="attention"),
    Part(
        "cascade-sdxl", "whole pictures, SDXL, 4096 px", (*_SDXL, *_EAGER, "npa", "multidiffusion", "demofusion", "authors"), 150,
        least=60, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-flux", "whole pictures, FLUX.1-dev, 4096 px", (*_FLUX, *_EAGER, "npa", "multidiffusion"), 150,
        least=75, needs=_PIPELINES, csv="cascade",
    ),
    Part("attention-quick", "few shapes by every implementation worth it", (*_ATTENTION, "--quick"), 240, csv="attention"),
    Part("filters", "low-pass filters and guided steps", ("bench.lowpass", "--device", "cuda", "--seconds", "0.2"), 240, csv="lowpass"),
    Part(
        "sanitizer", "compute-sanitizer over small calls of every kernel", (*_PYTEST, "sanitizer", "-m", "gpu", "tests/kernels"), 240,
        least=60, needs=("pytest", "triton"), tool="compute-sanitizer", refuses="Device not supported",
    ),
    Part(
        "cascade-sdxl-compiled", "SDXL with compiled blocks, 4096 px", (*_SDXL_WHOLE, *_COMPILED, "npa", "multidiffusion"), 320,
        least=90, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-flux-compiled", "FLUX.1-dev with compiled blocks, 4096 px", (*_FLUX, *_COMPILED, "npa", "multidiffusion"), 320,
        least=90, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-sdxl-compiled-more", "other methods of SDXL with compiled blocks", (*_SDXL_WHOLE, *_COMPILED, "authors", "demofusion"),
        340, least=90, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-flux-more", "other methods of FLUX.1-dev, 4096 px",
        (*_FLUX, *_EAGER, "authors-jitter", "npa-global", "direct", "cascade-full"), 340, least=90, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-sdxl-more", "other methods of SDXL, 4096 px", (*_SDXL, *_EAGER, "direct", "cascade-full"), 120,
        least=60, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-sdxl-2048", "SDXL, 2048 px",
        (*_SDXL, *_SMALLER, "npa", "multidiffusion", "demofusion", "authors", "direct", "cascade-full"), 280,
        least=60, needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-flux-2048", "FLUX.1-dev, 2048 px",
        (*_FLUX, *_SMALLER, "npa", "multidiffusion", "authors-jitter", "npa-global", "direct", "cascade-full"), 320,
        least=75, needs=_PIPELINES, csv="cascade",
    ),
    Part("kernel-shapes", "the attention kernel, every shape and dtype", (*_ATTENTION, "--provider", "triton"), 240, csv="attention"),
    Part(
        "tests-all", "all tests that need a device, but for compute-sanitizer", (*_PYTEST, "not sanitizer", *_MARKED), 180,
        needs=("pytest", "triton"), spread=True,
    ),
    Part("attention", "every shape, dtype and implementation", _ATTENTION, 460, least=60, csv="attention"),
)  # fmt: skip


class Outcome(NamedTuple):
    """Of one part: done, failed, stopped, skipped, did not fit, or done before; what is told of it, and the seconds it took."""

    status: str
    note: str
    seconds: float = 0.0


def shown(command: Sequence[str]) -> str:
    """A command as it can be typed."""
    return f"python3 {shlex.join(command)}"


class Ended(NamedTuple):
    """Of a command: its exit status, None where it was stopped at the limit, and all that it printed."""

    status: int | None
    printed: str

    @property
    def last(self) -> str:
        """The last line printed, cut to 160 characters."""
        return (self.printed.splitlines() or ["nothing was printed"])[-1].strip("= ")[:160]


def run(part: Part, command: Sequence[str], out: Path, *, limit: float) -> Ended:
    """To its end or to the limit; what it prints is added to gpu.log. Folders of PYTHONPATH stay, wherever it runs."""
    given = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "kernels"), *given])
    with (out / "gpu.log").open("ab+") as log:
        log.write(f"== {part.name}: {shown(command)}\n".encode())
        log.flush()
        begin = log.tell()
        status = _finished([sys.executable, *command], part.folder(out), {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}, log, limit)
        log.seek(begin)
        printed = log.read().decode(errors="replace").strip()
        log.write(b"\n")
    return Ended(status, printed)


def _finished(command: Sequence[str], folder: Path, more: Mapping[str, str], log: IO[bytes], limit: float) -> int | None:
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **more}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # with what it starts, so that all of it can be ended
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def missing(row: Row) -> str:
    """The package for want of which a row has no time; empty where that is not why."""
    if row.get("status") == "ok" or row.get("p50_ms"):
        return ""
    found = re.search(r"[Tt]he (\S+) package is not installed|No module named '(\w+)", row.get("note") or "")
    return found[1] or found[2] if found else ""


def came_of(row: Row) -> str:
    """A row's status; skipped, too, where a package is missing."""
    return "skipped" if missing(row) else row["status"]


def to_do(rows: Sequence[Row]) -> bool:
    """Whether it is worth another try: a row met an error, or lacked a package that is there now."""
    return any(came_of(row) == "error" or (missing(row) and find_spec(missing(row)) is not None) for row in rows)


def told(rows: Sequence[Row]) -> str:
    """How many rows there are; how many went wrong, and the first of these; what was skipped, by reason. A gate is told by its run."""
    rows = [row for row in rows if row.get("part") != "gate"]
    wrong = [_wrong(status, [row for row in rows if came_of(row) == status]) for status in ("FAILED", "error")]
    reasons = Counter(_reason(row) for row in rows if came_of(row) == "skipped")
    skipped = [f"{reason}: {count} row{'s' * (count > 1)}" for reason, count in reasons.items()]
    return "; ".join([f"{len(rows)} rows", *filter(None, wrong), *skipped])


def _wrong(status: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return f"{len(rows)} {status}, first {rows[0]['row']}: {(rows[0].get('note') or 'nothing said')[:100]}"


def _reason(row: Row) -> str:
    """In few words, the same for all numbers."""
    if package := missing(row):
        return f"{package} is not installed"
    return re.sub(r"\d[\d.]*", "N", re.split(r"[:;,] ", row.get("note") or "")[0]) or "skipped"
