"""The command line of benchmarks that write rows: what they are asked for, what stands is not measured again, and files are compared."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from bench.harness import rows as harness

RESULTS = harness.ROOT / "bench" / "results"
Row = dict[str, str]


def parser_of(name: str, title: str) -> argparse.ArgumentParser:
    """With the options that all of them have."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=title)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help=f"results (default: bench/results/{name}-MACHINE.csv)")
    parser.add_argument("--json", action="store_true", help="one object per row and line")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="another CSV, row by row")
    parser.add_argument("--no-measure", action="store_true", help="take the rows of --csv as they are")
    parser.add_argument("--again", action="store_true", help="measure what stands, too")
    parser.add_argument("--commit", help="of a copy of the tree that git knows nothing of")
    return parser


def add_seconds(parser: argparse.ArgumentParser, default: float) -> None:
    """How long a row is timed."""
    parser.add_argument(
        "--seconds", type=float, default=default, help="per row; on a CPU shared by what is timed side by side (default: %(default)s)"
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be, in a sentence."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, got none")
    if not 0 < getattr(options, "seconds", 1.0) < math.inf:
        parser.error(f"--seconds must be positive and finite, got {options.seconds}")
    if options.compare and not options.compare.is_file():
        parser.error(f"--compare takes a CSV of this benchmark, got {options.compare}, which is no file")
    if options.no_measure and options.again:
        parser.error("rows are taken as they are or measured anew, got --no-measure and --again")


def path_of(parser: argparse.ArgumentParser, options: argparse.Namespace, name: str, machine: str) -> Path:
    """Of the CSV; there must be one where nothing is measured."""
    path: Path = options.csv or RESULTS / f"{name}-{harness.slug(machine)}.csv"
    if not path.is_file() and (path.exists() or options.no_measure):
        parser.error(f"--csv takes a file{', with --no-measure one that is there' if options.no_measure else ''}, got {path}")
    return path


def keep_freed_memory() -> bool:
    """As the command `scalediff` does; a machine that measures calls of kernels may lack what the library needs to be imported."""
    from scalediff.command import allocator

    return allocator.keep_freed_memory()


def shown(name: str, arguments: Sequence[str] | None) -> str:
    """The command as it can be typed."""
    return shlex.join(["python", "-m", f"bench.{name}", *(sys.argv[1:] if arguments is None else arguments)])


def compare(
    options: argparse.Namespace, rows: Mapping[str, Mapping[str, str]], others: Mapping[str, Mapping[str, str]], facts: Sequence[str]
) -> None:
    """Row by row, if asked; beside objects on stdout the sentences go to stderr."""
    for sentence in harness.compared(rows, others, facts=facts) if options.compare else ():
        print(sentence, file=sys.stderr if options.json else sys.stdout)


def end(wrong: Sequence[str]) -> NoReturn:
    """By the names of those rows of ours that failed."""
    raise SystemExit(f"ours did not run as it should: {', '.join(wrong)}" if wrong else 0)


@dataclass(frozen=True)
class Benchmark:
    """One whose every row is measured by itself.

    Attributes:
        name: `bench.NAME`, and what its CSVs are called.
        fields, same: Columns, and those among them that say what a row is measured with.
        line: A row for people, on a terminal.
    """

    name: str
    fields: Sequence[str]
    same: Sequence[str]
    line: Callable[[Row], str]

    def run(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        arguments: Sequence[str] | None,
        *,
        facts: Callable[[], Row],
        wanted: Mapping[str, bool],
        measure: Callable[[set[str]], Iterator[tuple[str, Row]]],
    ) -> NoReturn:
        """Tell what stands, measure the rest, write and tell every row as it comes; the exit status is that of ours.

        Args:
            facts: What rows are measured with; raises ValueError for a commit that is not git's.
            wanted: Names of rows, and whether each is ours.
            measure: Names and rows of all that is wanted but these.
        """
        try:
            measured_with = facts()
            path = path_of(parser, options, self.name, measured_with["machine"])
            rows = harness.read_rows(path, self.fields)
            others = harness.read_rows(options.compare, self.fields) if options.compare else {}
        except ValueError as error:
            parser.error(str(error))
        # What was skipped may run now; what failed or was timed stays so.
        standing = {name for name in harness.standing(rows, measured_with) if rows[name]["status"] in ("ok", "FAILED")}
        standing = set() if options.again else set(wanted) if options.no_measure else standing
        for name in (name for name in wanted if name in standing):
            if name not in rows:
                print(f"{name}: not in {path.name}", file=sys.stderr if options.json else sys.stdout)
            elif options.json or options.no_measure:
                self._tell(options, rows[name])
            else:
                print(f"{name}: as measured before", flush=True)
        for name, row in () if options.no_measure else measure(standing):
            rows[name] = dict.fromkeys(self.fields, "") | row | measured_with | {"row": name, "command": shown(self.name, arguments)}
            harness.write_rows(path, self.fields, rows.values())
            self._tell(options, rows[name])
        asked = {name: rows[name] for name in wanted if name in rows}
        compare(options, asked, others, self.same)
        end([name for name, row in asked.items() if wanted[name] and row["status"] in ("FAILED", "error")])

    def _tell(self, options: argparse.Namespace, row: Row) -> None:
        print(json.dumps(row) if options.json else self.line(row), flush=True)
