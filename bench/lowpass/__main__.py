"""Low-pass filters and guided steps against what else does the job: `python -m bench.lowpass`.

Every row of the paper's filter is first compared with the definition in fp64, at that very shape; ours and the compiled ones are timed only
within the error budget that eager torch sets. Sets of inputs are taken in turn, so that caches are cold. A row that fails its gate says
FAILED and has no time; one that cannot run says why. Rows go to the CSV as they are measured, and a second run of the same commit, machine
and versions goes on where the first one stopped. On a CPU all that one run times of an operation are timed side by side, for other work
on the machine comes and goes; and the process keeps the memory that a call frees for the next one, whoever calls
(`scalediff.command.allocator`). `--doc docs/evidence/filters-measured.md` writes the page from the committed CSVs.

Bytes are those that an operation must move, every picture read or written once per pass.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.attention.gate import GateFailed
from bench.harness import command, side_by_side
from bench.harness import rows as harness
from bench.harness.command import RESULTS, Benchmark
from bench.harness.side_by_side import Entrant
from bench.harness.timing import Timing, launches, measure_in_turn, peak_memory
from bench.lowpass import page as lowpass_page
from bench.lowpass.cases import FEATURES, IMPLEMENTATIONS, LATENTS, Call, Case, Implementation, Operation, Pictures
from bench.lowpass.page import KEPT, RETURNED
from scalediff_kernels.testing import assert_within_budget, poisoned_memory

CPU_CACHE = 2**26  # bytes, assumed

SAME = lowpass_page.FACTS
FIELDS = (
    "row", "status", "case", "dtype", "layout", "operation", "implementation", "p20_ms", "p50_ms", "p80_ms", "megabytes", "copy_ms",
    "peak_megabytes", "launches", "error", "eager_error", "sets", "note", "seconds", "command", *SAME,
)  # fmt: skip


def facts(device: str, commit: str | None) -> dict[str, str]:
    """What a row is measured with, but for the memory of its process."""
    packages = {name: harness.package_version(name) for name in ("torchvision", "kornia")}
    found = harness.facts(device, commit=commit) | harness.versions(device) | packages | {"memory": ""}
    return {key: found[key] for key in SAME}


def key(case: Case, implementation: Implementation) -> str:
    """The name of a row, unlike any other."""
    return "/".join([*case.identity.values(), implementation.operation.name, implementation.name])


class Truth(NamedTuple):
    """What an operation gives: by its definition in fp64, and by eager torch in the pictures' dtype."""

    exact: Tensor
    eager: Tensor


class Bench:
    """One case: its pictures and what they should give, made when they are first needed and shared by all implementations."""

    def __init__(self, case: Case, device: str, *, seconds: float) -> None:
        self.case, self.device, self.seconds = case, device, seconds
        self._sets: list[Pictures] = []
        self._truths: dict[str, Truth] = {}
        self._alone: dict[int, float] = {}

    @property
    def sets(self) -> int:
        return self.case.sets(torch.cuda.get_device_properties(0).L2_cache_size if self.device == "cuda" else CPU_CACHE)

    def measured(self, implementations: Sequence[Implementation]) -> Iterator[dict[str, str]]:
        """A row of each of one operation: skipped, refused by what it called, FAILED at the gate, or timed."""
        for some in side_by_side.groups(implementations, self.device):
            yield from self._timed(some, [self._entrant(implementation) for implementation in some])
            harness.forget(self.device)

    def _entrant(self, implementation: Implementation) -> Entrant:
        operation, package = implementation.operation, implementation.package
        row = self.case.identity | {
            "operation": operation.name, "implementation": implementation.name,
            "megabytes": f"{operation.passes * self.case.bytes / 1e6:.1f}", "seconds": f"{self.seconds:g}",
        }  # fmt: skip
        if package and find_spec(package) is None:
            return Entrant(row | {"status": "skipped", "note": f"the {package} package is not installed"}, [])
        return side_by_side.gated(row, partial(self._gated, implementation), self.device)

    def _gated(self, implementation: Implementation, row: dict[str, str]) -> Entrant:
        operation = implementation.operation
        self._sets = self._sets or self.case.pictures(self.device, self.sets)
        calls = implementation.prepare([operation.tensors(pictures) for pictures in self._sets])
        return Entrant(row | {"sets": str(len(calls))} | self._gate(implementation, calls[0]), calls)

    def _timed(self, implementations: Sequence[Implementation], entrants: Sequence[Entrant]) -> Iterator[dict[str, str]]:
        """On a CPU beside the copy of as many bytes."""
        passes = implementations[0].operation.passes
        copies = self.device == "cpu" and any(one.calls for one in entrants)
        beside = [side_by_side.gated({}, lambda row: Entrant(row, self._copies(passes)), self.device)] if copies else []
        found = side_by_side.timed([*entrants, *beside], self.device, seconds=self.seconds)
        copy = found.pop()[1] if beside else None
        for entrant, (row, timing) in zip(entrants, found, strict=True):
            if timing:
                row = side_by_side.finished(row, partial(self._numbers, passes, entrant, timing, copy), self.device)
            yield row

    def _numbers(self, passes: int, entrant: Entrant, timing: Timing, copy: Timing | None) -> dict[str, str]:
        milliseconds = copy.p50 if copy else self._copy(passes)
        row = {"p20_ms": f"{timing.p20:.4g}", "p50_ms": f"{timing.p50:.4g}", "p80_ms": f"{timing.p80:.4g}"}
        return row | {"copy_ms": f"{milliseconds:.4g}"} | _counted(entrant.calls[0], self.device)

    def _gate(self, implementation: Implementation, call: Call) -> dict[str, str]:
        """Errors of the result and of eager torch; what our code leaves unwritten is NaN.

        Raises:
            GateFailed: an error exceeds the budget, a value is not finite, or the result is no such picture.
        """
        with poisoned_memory() if implementation.ours else nullcontext():
            result = call()
        if (tuple(result.shape), result.dtype) != (self.case.shape, self.case.dtype):
            raise GateFailed(f"the result must be {self.case.shape} in {self.case.dtype}, got {tuple(result.shape)} in {result.dtype}")
        if not result.isfinite().all():
            raise GateFailed("the result has NaN or infinite values")
        if implementation.held == "other":
            return {}
        truth = self._truth(implementation.operation)
        if implementation.held == "budget":
            try:
                assert_within_budget(result, truth.eager, truth.exact)
            except AssertionError as failed:
                raise GateFailed(str(failed)) from None
        error, eager_error = ((x.double() - truth.exact).abs().max().item() for x in (result, truth.eager))
        return {"error": f"{error:.2e}", "eager_error": f"{eager_error:.2e}"}

    def _truth(self, operation: Operation) -> Truth:
        """Of one operation at a time: it is as large as three sets of some pictures."""
        if operation.name not in self._truths:
            self._truths.clear()
            tensors = operation.tensors(self._sets[0])
            exact = operation.exact(*(x.double() for x in tensors))
            self._truths[operation.name] = Truth(exact, operation.eager(*tensors))
        return self._truths[operation.name]

    def _copy(self, passes: int) -> float:
        """Milliseconds of a copy that moves as many bytes, by itself."""
        if passes not in self._alone:
            self._alone[passes] = measure_in_turn(self._copies(passes), self.device, seconds=self.seconds).p50
        return self._alone[passes]

    def _copies(self, passes: int) -> list[Call]:
        """Copies that move as many bytes, half of them read, half written."""
        shape = (passes // 2 * math.prod(self.case.shape),)  # ones: pages that nobody wrote are all one page, which caches hold
        pairs = [[torch.ones(shape, dtype=self.case.dtype, device=self.device) for _ in range(2)] for _ in range(self.sets)]
        return [partial(target.copy_, source) for target, source in pairs]


def _counted(call: Call, device: str) -> dict[str, str]:
    """Memory and kernels of a call that was timed; what cannot be told is a note, for the time is good."""
    peak, peak_note = _told("peak memory", peak_memory, call, device)
    count, count_note = _told("launches", launches, call, device)
    return {
        "peak_megabytes": "" if peak is None else f"{peak / 1e6:.4g}", "launches": "" if count is None else str(count),
        "note": "; ".join(filter(None, (peak_note, count_note))),
    }  # fmt: skip


def _told(what: str, count: Callable[[Call, str], int | None], call: Call, device: str) -> tuple[int | None, str]:
    try:
        found = count(call, device)
    except Exception as problem:
        return None, f"{what} not told: {type(problem).__name__}: {harness.first_line(problem)}"
    return (None, f"{what} not told: none seen") if found == 0 else (found, "")


def measured_rows(cases: Sequence[Case], device: str, standing: set[str], *, seconds: float) -> Iterator[tuple[str, dict[str, str]]]:
    """Key and row of everything that does not stand yet."""
    for case in cases:
        bench = Bench(case, device, seconds=seconds)
        wanted = [implementation for implementation in IMPLEMENTATIONS if key(case, implementation) not in standing]
        for _, some in groupby(wanted, key=lambda implementation: implementation.operation.name):
            each = list(some)
            for implementation, row in zip(each, bench.measured(each), strict=True):
                name = key(case, implementation)
                yield name, row
                if harness.device_lost(device):
                    raise SystemExit(f"the device was lost in {name}: the same command goes on after it")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.doc:
        try:
            harness.write_text(options.doc, lowpass_page.markdown(committed()))
        except ValueError as error:
            parser.error(str(error))
        return
    cases = _picked(parser, options)

    def measured_with() -> dict[str, str]:
        found = facts(options.device, options.commit) | {"seconds": f"{options.seconds:g}"}
        kept = options.device == "cpu" and not options.no_measure
        return found | ({"memory": KEPT if command.keep_freed_memory() else RETURNED} if kept else {})

    Benchmark("lowpass", FIELDS, SAME, line).run(
        parser, options, arguments,
        facts=measured_with,
        wanted={key(case, implementation): implementation.ours for case in cases for implementation in IMPLEMENTATIONS},
        measure=lambda standing: measured_rows(cases, options.device, standing, seconds=options.seconds),
    )  # fmt: skip


def line(row: Mapping[str, str]) -> str:
    """For people, on a terminal."""
    if row["status"] != "ok":
        return f"{row['row']}: {row['status']}, {row['note']}"
    parts = [
        f"{row['row']}: {row['p50_ms']} ms ({row['p20_ms']} - {row['p80_ms']})",
        f"{100 * float(row['copy_ms']) / float(row['p50_ms']):.0f}% of a copy",
        f"error {row['error']} (eager {row['eager_error'] or 'not told'})" if row["error"] else "",
        f"{row['peak_megabytes']} MB" if row["peak_megabytes"] else "",
        f"{row['launches']} launches" if row["launches"] else "",
        row["note"],
    ]
    return ", ".join(part for part in parts if part)


def committed() -> dict[str, list[dict[str, str]]]:
    """Rows by device.

    Raises:
        ValueError: a CSV is not of this version of the benchmark.
    """
    tables = {path.stem: list(harness.read_rows(path, FIELDS).values()) for path in sorted(RESULTS.glob("lowpass-*.csv"))}
    return {name: rows for name, rows in tables.items() if rows}


def _picked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """Cases; refuses what is not known."""
    command.check(parser, options)
    # A CPU's fp16 is nobody's choice; a GPU's fp32 latents are.
    known = [case for case in LATENTS + FEATURES if options.device == "cuda" or case.dtype is torch.float32]
    cases = [case for case in known if options.cases in case.name]
    if not cases:
        parser.error(f"--cases takes a part of {', '.join(dict.fromkeys(case.name for case in known))}, got {options.cases!r}")
    return cases


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("lowpass", __doc__.split("\n")[0])
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="measure nothing, write this page from the committed rows")
    command.add_seconds(parser, 0.3)
    return parser


if __name__ == "__main__":
    main()
