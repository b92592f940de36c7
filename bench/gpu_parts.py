"""What `bench.gpu` runs, the most valuable first, and one part of it: a process of its own, stopped at its limit."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from bench import harness

GRACE = 10.0  # seconds to end in, once asked
_TIMED = ("p50_ms", "composed_s")


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: On the command line.
        title: For people.
        arguments: Of `python -m`.
        limit: Seconds, at most.
        needs: Modules without which it is skipped.
        tool: A program without which it is skipped; none when empty.
        csv: Results are `CSV-MACHINE.csv`; none when empty. Such a command takes --csv, --commit and --again, and goes on where it
            stopped.
        spread: Over several processes where pytest-xdist is installed.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    tool: str = ""
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

    def command(self, machine: str, *, commit: str = "", again: bool = False) -> list[str]:
        """What follows `python`."""
        words = ["-m", *self.arguments]
        if self.csv:
            words += ["--csv", f"{self.csv}-{harness.slug(machine)}.csv"]
            words += ["--commit", commit] if commit else []
            words += ["--again"] if again else []
        if self.spread and find_spec("xdist") is not None:
            words += ["-n", str(min(8, os.cpu_count() or 1))]
        return words

    def folder(self, out: Path) -> Path:
        """Where it runs; benchmarks among their results, so that no row names a folder of this machine."""
        return out if self.csv else harness.ROOT


_PYTEST = ("pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/kernels")
_PIPELINES = ("diffusers", "transformers", "bench.cascade")
_RUN = ("bench.cascade", "--device", "cuda", "--limit", "75", "--view-batch", "7")  # 49 views are seven times seven
_SIZE = ("--size", "4096", "--compile", "eager")
_ATTENTION = ("bench.attention", "--device", "cuda", "--seconds", "0.3")

PARTS: tuple[Part, ...] = (  # the first four in eight minutes
    Part(
        "tests", "the kernels' tests on the device, bf16 and fp16 among them", (*_PYTEST, "-k", "not sanitizer"), 120,
        needs=("pytest", "triton"), spread=True,
    ),
    Part("kernel", "the attention kernel, few shapes", (*_ATTENTION, "--quick", "--provider", "triton"), 60, csv="attention"),
    Part("attention-quick", "these shapes by every implementation worth it", (*_ATTENTION, "--quick"), 120, csv="attention"),
    Part(
        "cascade-sdxl", "whole pictures, SDXL, 4096 px",
        (*_RUN, *_SIZE, "--steps", "3", "--model", "sdxl", "--method", "npa", "multidiffusion", "authors", "demofusion"), 180,
        needs=_PIPELINES, csv="cascade",
    ),
    Part(
        "cascade-flux", "whole pictures, FLUX.1-dev, 4096 px",
        (*_RUN, *_SIZE, "--steps", "1", "--model", "flux", "--method", "npa", "multidiffusion", "authors-jitter"), 300,
        needs=_PIPELINES, csv="cascade",
    ),
    Part("filters", "low-pass filters and guided steps", ("bench.lowpass", "--device", "cuda", "--seconds", "0.2"), 120, csv="lowpass"),
    Part(
        "sanitizer", "compute-sanitizer over small calls of every kernel", (*_PYTEST, "-k", "sanitizer"), 180, needs=("pytest", "triton"),
        tool="compute-sanitizer",
    ),
    Part("attention", "every shape, dtype and implementation", _ATTENTION, 240, csv="attention"),
    Part(
        "cascade-more", "SDXL at two sizes, with compiled blocks too, beside direct inference",
        (*_RUN, "--size", "2048", "4096", "--steps", "3", "--model", "sdxl", "--method", "npa", "cascade-full", "multidiffusion", "direct"),
        300, needs=_PIPELINES, csv="cascade",
    ),
)  # fmt: skip


class Outcome(NamedTuple):
    """Of one part: done, failed, stopped, skipped, did not fit, or done before; what is told of it, and the seconds it took."""

    status: str
    note: str
    seconds: float = 0.0


def shown(command: Sequence[str]) -> str:
    """A command as it can be typed."""
    return f"python {shlex.join(command)}"


def run(part: Part, command: Sequence[str], out: Path, *, limit: float) -> tuple[int | None, str]:
    """Its exit status, None where it was stopped at the limit, and the last line it printed; all of them are added to gpu.log."""
    paths = os.pathsep.join(filter(None, [str(harness.ROOT), str(harness.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    with (out / "gpu.log").open("ab+") as log:
        log.write(f"== {part.name}: {shown(command)}\n".encode())
        log.flush()
        begin = log.tell()
        status = _finished([sys.executable, *command], part.folder(out), {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}, log, limit)
        log.seek(begin)
        printed = log.read().decode(errors="replace").strip()
        log.write(b"\n")
    return status, (printed.splitlines() or ["nothing was printed"])[-1].strip("= ")[:160]


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


def rows_told(path: Path, commit: str) -> str:
    """How many rows of a commit a CSV has, and how many of them failed or have no time."""
    rows = [row for row in harness.read_records(path) if row.get("commit") == commit]
    failed = sum(row.get("status") in ("FAILED", "error") for row in rows)
    untimed = sum(not any(row.get(column) for column in _TIMED) for row in rows) - failed
    parts = [f"{len(rows)} rows", f"{failed} failed" if failed else "", f"{untimed} without a time" if untimed > 0 else ""]
    return ", ".join(part for part in parts if part)
