"""The command line of benchmarks that write rows: it measures what has no row yet, prints, writes and compares."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from bench.harness import rows as harness
from bench.harness.rows import RESULTS, Row


def parser_of(name: str, title: str, *, seconds: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; --seconds where there is a default for it."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=title)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help=f"results (default: bench/results/{name}-MACHINE.csv)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="another CSV, row by row")
    parser.add_argument("--no-measure", action="store_true", help="only show the rows of --csv")
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    parser.add_argument("--commit", help="the commit of a copy of the tree without git's data")
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="for each row (default: %(default)s)")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that cannot be met or contradict each other."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, got none")
    if not 0 < getattr(options, "seconds", 1.0) < math.inf:
        parser.error(f"--seconds must be positive and finite, got {options.seconds}")
    if options.compare and not options.compare.is_file():
        parser.error(f"--compare takes a CSV of this benchmark, got {options.compare}, which is no file")
    if options.no_measure and options.again:
        parser.error("--no-measure and --again exclude each other")


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
    units = {"peak_megabytes": "MB", "launches": "launches"}
    found = [f"{row[column]} {unit}" for column, unit in units.items() if row[column]]
    return ", ".join(filter(None, [times, *parts, error, *found, row["note"]]))


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that measures named units, most often of one row each."""

    name: str  # as in `bench.NAME`; its CSVs are named after it
    fields: Sequence[str]  # the columns
    same: Sequence[str]  # those that say what a row was measured with: of the harness, the caller's own, or names of packages
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
            own_facts: Values of columns in `same` that the harness does not know.
        """
        try:
            measured_with = self._facts(options, own_facts or {})
            path: Path = options.csv or RESULTS / f"{self.name}-{harness.slug(measured_with['machine'])}.csv"
            if not path.is_file() and (path.exists() or options.no_measure):
                parser.error(f"--csv takes {'an existing file with --no-measure' if options.no_measure else 'a file'}, got {path}")
            rows = harness.read_rows(path, self.fields)
            others = harness.read_rows(options.compare, self.fields) if options.compare else {}
        except ValueError as error:
            parser.error(str(error))
        # What was skipped may run now; what failed is not tried again.
        same = {row for row in harness.finished_rows(rows, measured_with) if rows[row]["status"] in ("ok", "FAILED")}
        finished = {name for name in wanted if options.no_measure or (name + self.last in same and not options.again)}
        for name in [name for name in wanted if name in finished]:
            if not (found := self._rows(rows, name)):
                print(f"{name}: not in {path.name}", file=sys.stderr)
            else:
                print(*(map(self.line, found.values()) if options.no_measure else [f"{name}: as measured before"]), sep="\n", flush=True)
        if not options.no_measure:
            if options.device == "cpu":
                keep_freed_memory()
            typed = shlex.join(["python", "-m", f"bench.{self.name}", *(sys.argv[1:] if arguments is None else arguments)])
            begun = set[str]()
            for name, row in measure(finished):
                if name not in begun:  # no row of an earlier run stays beside new ones
                    begun.add(name)
                    earlier = self._rows(rows, name)
                    rows = {key: old for key, old in rows.items() if key == name or key not in earlier}
                new = dict.fromkeys(self.fields, "") | {"row": name} | row | measured_with | {"command": typed}
                rows[new["row"]] = {field: new[field] for field in self.fields}
                harness.write_rows(path, self.fields, rows.values())
                print(self.line(rows[new["row"]]), flush=True)
                if harness.device_lost(options.device):
                    raise SystemExit(f"the device was lost in {name}: run the same command again to continue after it")
        shown = {key: row for name in wanted for key, row in self._rows(rows, name).items()}
        if options.compare:
            mine, theirs = ({key: row for key, row in table.items() if row.get("part") != "gate"} for table in (shown, others))  # no times
            for sentence in harness.compared(mine, theirs, facts=self.same):
                print(sentence)
        ours = [row for name in wanted if wanted[name] for row in self._rows(rows, name).values()]
        failed = [row["row"] for row in ours if row["status"] in ("FAILED", "error")]
        raise SystemExit(f"rows of scalediff failed: {', '.join(failed)}" if failed else 0)

    def _facts(self, options: argparse.Namespace, own: Mapping[str, str]) -> Row:
        known = {**harness.facts(options.device, commit=options.commit), **harness.versions(options.device), **own}
        found = {name: known[name] if name in known else harness.package_version(name) for name in self.same}
        return found | ({"seconds": f"{options.seconds:g}"} if "seconds" in self.fields else {})

    def _rows(self, rows: Mapping[str, Row], name: str) -> dict[str, Row]:
        """Those of one unit."""
        return {key: row for key, row in rows.items() if key == name or (self.last and key.startswith(f"{name}/"))}
