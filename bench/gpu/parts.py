"""How a part of `bench.gpu` runs: as a process of its own with a time limit. The parts are listed in `parts.toml`."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.harness import facts
from bench.harness.rows import read_records, slug

Row = Mapping[str, str]
GRACE = 10.0  # seconds between asking a process to end and killing it


@dataclass(frozen=True)
class Part:
    name: str  # on the command line
    title: str  # for people
    limit: float  # seconds; what earlier parts left of theirs is added, up to as many again
    arguments: tuple[str, ...]  # of `python -m`
    least: float = 20.0  # seconds without which it is not started: it would end before its first row
    needs: Sequence[str] = ()  # modules and programs without which it is skipped
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
    return f"python3 {shlex.join(command)}"


def describe(rows: Sequence[Row]) -> str:
    """How many rows there are by status, and the first that is wrong."""
    rows = [row for row in rows if row.get("part") != "gate"]  # the run of a gate that failed has failed as well
    counts = [f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items()]
    wrong = [f"; first {row['row']}: {row.get('note') or 'no note'}"[:160] for row in rows if row["status"] in ("FAILED", "error")]
    return f"{len(rows)} rows: {', '.join(counts)}{''.join(wrong[:1])}" if rows else "no rows"


PARTS = tuple(
    Part(**{**part, "arguments": tuple(shlex.split(part["arguments"]))})
    for part in tomllib.loads(Path(__file__).with_name("parts.toml").read_text())["part"]
)
