"""The command line of benchmarks that write rows: it measures what has no row yet, prints, writes and compares.

Rows go to the CSV as they are measured, and a second run of the same commit, machine and versions measures what is missing. On a CPU the
process keeps the memory that a call frees for the next one (`scalediff.command.allocator`).
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from bench.harness import device
from bench.harness.facts import facts
from bench.harness.rows import RESULTS, Row, RowFile, compared, read_rows, slug


def parser_of(name: str, title: str, *, seconds: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; --seconds where there is a default for it."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=title)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help=f"results (default: bench/results/{name}-MACHINE.csv)")
    parser.add_argument("--compare", type=_file, metavar="FILE", help="another CSV, row by row")
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    parser.add_argument("--commit", help="the commit of a copy of the tree without git's data")
    if seconds is not None:
        parser.add_argument("--seconds", type=positive(float), default=seconds, help="for each row (default: %(default)s)")
    return parser


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """The type of an option that is a positive number."""

    def parsed(text: str) -> float:
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    return parsed


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of these names, separated by commas."""

    def parsed(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {', '.join(unknown)}")
        return names

    return parsed


def shard(text: str) -> tuple[int, int]:
    """The type of an option for the share of one of several processes: i/n, with i from 0 to n - 1."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 0 to n - 1, got {text}")
    return int(found[1]), int(found[2])


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"takes a CSV of this benchmark, got {text}, which is no file")
    return Path(text)


def keep_freed_memory() -> bool:
    """As the command `scalediff` does on a CPU. Imported late: measuring kernels alone needs nothing else of the library."""
    from scalediff.command import allocator

    return allocator.keep_freed_memory()


def timed_line(row: Row, *parts: str) -> str:
    """One row as a line of text, with `parts` after the time."""
    if row["status"] != "ok":
        return f"{row['row']}: {row['status']}, {row['note']}"
    times = f"{row['row']}: {row['p50_ms']} ms ({row['p20_ms']} - {row['p80_ms']})"
    error = f"error {row['error']} (eager {row['eager_error'] or 'unknown'})" if row["error"] else ""
    return ", ".join(filter(None, [times, *parts, error, row["note"]]))


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that measures named units, most often of one row each."""

    name: str  # as in `bench.NAME`; its CSVs are named after it
    fields: Sequence[str]  # the columns
    same: Sequence[str]  # those that say what a row was measured with: facts, names of packages, or the caller's own
    line: Callable[[Row], str]  # formats a row for a terminal
    last: str = ""  # for units of several rows, what the name of the last one adds to that of the unit, such as "/run"

    def run(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        arguments: Sequence[str] | None,
        *,
        wanted: Mapping[str, bool],
        measure: Callable[[Set[str]], Iterator[tuple[str, Row]]],
        own_facts: Mapping[str, str] | None = None,
    ) -> NoReturn:
        """Measure what is wanted and not finished; write and print every row as it comes, and exit.

        Args:
            wanted: Names of units, and whether the library itself is measured: its failures are failures of the command.
            measure: Yields names of units and their rows, of all that is wanted except the finished units that it is given.
            own_facts: Values of columns in `same` that are the caller's own.
        """
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that torch sees, got none")
        try:
            own = {**(own_facts or {}), **({"seconds": f"{options.seconds:g}"} if "seconds" in self.fields else {})}
            measured_with = facts([name for name in self.same if name not in own], options.device, commit=options.commit) | own
            path = options.csv or RESULTS / f"{self.name}-{slug(measured_with['machine'])}.csv"
            file = RowFile(path, self.fields, measured_with)
            others = read_rows(options.compare, self.fields) if options.compare else {}
        except (OSError, ValueError) as error:
            parser.error(str(error))
        # What was skipped may run now; what failed is not tried again.
        same = {row for row in file.finished if file.rows[row].get("status", "ok") in ("ok", "FAILED")}
        finished = {name for name in wanted if name + self.last in same and not options.again}
        for name in wanted:
            if name in finished:
                print(f"{name}: as measured before", flush=True)
        if options.device == "cpu":
            keep_freed_memory()
        typed = shlex.join(["python", "-m", f"bench.{self.name}", *(sys.argv[1:] if arguments is None else arguments)])
        begun = set[str]()
        for name, row in measure(finished):
            if name not in begun:  # no row of an earlier run stays beside new ones
                begun.add(name)
                for key in [key for key in self._rows(file.rows, name) if key != name]:
                    del file.rows[key]
            print(self.line(file.add({"row": name, **row, "command": typed})), flush=True)
            if device.device_lost(options.device):
                raise SystemExit(f"the device was lost in {name}: run the same command again to continue after it")
        if options.compare:
            shown = {key: row for name in wanted for key, row in self._rows(file.rows, name).items()}
            print(*compared(shown, others, facts=self.same), sep="\n")
        ours = [row for name in wanted if wanted[name] for row in self._rows(file.rows, name).values()]
        failed = [row["row"] for row in ours if row.get("status") in ("FAILED", "error")]
        raise SystemExit(f"rows of scalediff failed: {', '.join(failed)}" if failed else 0)

    def _rows(self, rows: Mapping[str, Row], name: str) -> dict[str, Row]:
        return {key: row for key, row in rows.items() if key == name or (self.last and key.startswith(f"{name}/"))}
