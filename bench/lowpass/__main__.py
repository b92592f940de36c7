"""Low-pass filters and guided steps against what else does the job: `python -m bench.lowpass`.

Every row of the paper's filter is first compared with the definition in fp64, at that very shape; ours and the compiled ones are timed only
within the error budget that eager torch sets. Sets of inputs are taken in turn, so that caches are cold. How rows are measured and written:
`bench/harness/gated.py`, `bench/harness/command.py`. `--doc docs/evidence/filters-measured.md` writes the page from the committed CSVs.

Bytes are those that an operation must move, every picture read or written once per pass.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import command
from bench.harness.command import Benchmark, parser_of, timed_line
from bench.harness.facts import ROOT, VERSIONS
from bench.harness.gated import Candidate, GateFailed, measured
from bench.harness.pages import fill, require_pandas, table
from bench.harness.rows import RESULTS, Row, read_rows, write_text
from bench.harness.timing import Call, Timing, measure_in_turn, sets_of_inputs
from bench.lowpass.cases import FEATURES, IMPLEMENTATIONS, LATENTS, Case, Implementation, Operation, Pictures
from scalediff_kernels.testing import assert_within_budget, poisoned_memory

SAME = ("machine", "threads", "commit", "torch", *VERSIONS, "torchvision", "kornia", "memory")
FIELDS = (
    "row", "status", "case", "dtype", "layout", "operation", "implementation", "p20_ms", "p50_ms", "p80_ms", "megabytes", "copy_ms",
    "peak_megabytes", "launches", "error", "eager_error", "sets", "note", "seconds", "command", *SAME,
)  # fmt: skip
PAGE = ROOT / "docs" / "evidence" / "filters-measured.md"
SHOWN = ("torch", "triton", "python", "cuda", "cudnn", "torchvision", "kornia")  # versions on the page


def row_name(case: Case, implementation: Implementation) -> str:
    return "/".join([*case.identity.values(), implementation.operation.name, implementation.name])


class Bench:
    """One case; its pictures and expected results are made when they are first needed, and shared by all implementations."""

    def __init__(self, case: Case, device: str, *, seconds: float) -> None:
        self.case, self.device, self.seconds = case, device, seconds
        self.sets = sets_of_inputs(case.bytes, device)  # of what every operation reads, one picture of each set
        self._truths: dict[str, tuple[Tensor, Tensor]] = {}
        self._copy_ms: dict[int, float] = {}

    @cached_property
    def _pictures(self) -> list[Pictures]:
        return self.case.pictures(self.device, self.sets)

    def measured(self, implementations: Sequence[Implementation]) -> Iterator[Row]:
        """A row for each, all of one operation; on a CPU beside the copy of as many bytes."""
        candidates = [self._candidate(one) for one in implementations]
        copies = partial(self._copies, implementations[0].operation.passes)
        yield from measured(candidates, self.device, seconds=self.seconds, beside=copies)

    def _candidate(self, one: Implementation) -> Candidate:
        megabytes = f"{one.operation.passes * self.case.bytes / 1e6:.1f}"
        row = self.case.identity | {"operation": one.operation.name, "implementation": one.name, "megabytes": megabytes}
        absent = f"the {one.package} package is not installed" if one.package and find_spec(one.package) is None else ""
        return Candidate(row, partial(self._prepare, one), partial(self._numbers, one.operation.passes), absent)

    def _prepare(self, one: Implementation) -> tuple[Row, list[Call]]:
        calls = one.prepare([one.operation.tensors(pictures) for pictures in self._pictures])
        return self._gate(one, calls[0]), calls

    def _gate(self, one: Implementation, call: Call) -> Row:
        """Return errors of the result and of eager torch, or raise GateFailed: too large, not finite, or another shape or dtype."""
        with poisoned_memory() if one.name == "scalediff" else nullcontext():  # what nobody writes is NaN
            result = call()
        if (tuple(result.shape), result.dtype) != (self.case.shape, self.case.dtype):
            raise GateFailed(f"the result must be {self.case.shape} in {self.case.dtype}, got {tuple(result.shape)} in {result.dtype}")
        if not result.isfinite().all():
            raise GateFailed("the result has NaN or infinite values")
        if one.gate == "other":
            return {}
        exact, eager = self._truth(one.operation)
        if one.gate == "budget":
            try:
                assert_within_budget(result, eager, exact)
            except AssertionError as failed:
                raise GateFailed(str(failed)) from None
        error, eager_error = ((x.double() - exact).abs().max().item() for x in (result, eager))
        return {"error": f"{error:.2e}", "eager_error": f"{eager_error:.2e}"}

    def _truth(self, operation: Operation) -> tuple[Tensor, Tensor]:
        """By the definition in fp64 and by eager torch, for one operation at a time: it is as large as three sets of some pictures."""
        if operation.name not in self._truths:
            tensors = operation.tensors(self._pictures[0])
            self._truths = {operation.name: (operation.exact(*(x.double() for x in tensors)), operation.eager(*tensors))}
        return self._truths[operation.name]

    def _numbers(self, passes: int, timing: Timing, copy: Timing | None) -> Row:
        """On a GPU the copy is timed by itself, once."""
        if copy is None and passes not in self._copy_ms:
            self._copy_ms[passes] = measure_in_turn(self._copies(passes), self.device, seconds=self.seconds).p50
        return {"copy_ms": f"{copy.p50 if copy else self._copy_ms[passes]:.4g}"}

    def _copies(self, passes: int) -> list[Call]:
        """Copies that move as many bytes, half of them read, half written."""
        shape = (passes // 2 * math.prod(self.case.shape),)  # ones: pages that nobody wrote are all one page, which caches hold
        pairs = [[torch.ones(shape, dtype=self.case.dtype, device=self.device) for _ in range(2)] for _ in range(self.sets)]
        return [partial(target.copy_, source) for target, source in pairs]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.doc:
        require_pandas()
        try:
            write_text(options.doc, markdown(committed()))
        except ValueError as error:
            parser.error(str(error))
        return
    # Nobody filters fp16 on a CPU; fp32 latents are filtered on GPUs too.
    known = [case for case in LATENTS + FEATURES if options.device == "cuda" or case.dtype is torch.float32]
    cases = [case for case in known if options.cases in case.name]
    if not cases:
        parser.error(f"--cases takes a part of {', '.join(dict.fromkeys(case.name for case in known))}, got {options.cases!r}")

    def measure(finished: Set[str]) -> Iterator[tuple[str, Row]]:
        for case in cases:
            bench = Bench(case, options.device, seconds=options.seconds)
            wanted = [one for one in IMPLEMENTATIONS if row_name(case, one) not in finished]
            for _, group in groupby(wanted, key=lambda one: one.operation.name):
                implementations = list(group)
                for one, row in zip(implementations, bench.measured(implementations), strict=True):
                    yield row_name(case, one), row

    wanted = {row_name(case, one): one.name == "scalediff" for case in cases for one in IMPLEMENTATIONS}
    facts = {"memory": "kept" if options.device == "cpu" and command.keep_freed_memory() else ""}  # that the process has freed
    Benchmark("lowpass", FIELDS, SAME, line).run(parser, options, arguments, wanted=wanted, measure=measure, own_facts=facts)


def line(row: Row) -> str:
    return timed_line(row, f"{100 * float(row['copy_ms']) / float(row['p50_ms']):.0f}% of a copy" if row["copy_ms"] else "")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("lowpass", __doc__.split("\n")[0], seconds=0.3)
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--doc", type=Path, metavar="FILE", help="measure nothing, write this page from the committed rows")
    return parser


def committed() -> dict[str, list[Row]]:
    """The committed rows by device; raises ValueError for a CSV that is not of this benchmark."""
    tables = {path.stem: list(read_rows(path, FIELDS).values()) for path in sorted(RESULTS.glob("lowpass-*.csv"))}
    return {name: rows for name, rows in tables.items() if rows}


def markdown(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """docs/evidence/filters-measured.md with its tables, a section for each device, from the rows of every device."""
    from pandas import DataFrame

    lines: list[str] = []
    for records in tables.values():
        lines += [f"## {records[0]['machine']}", ""]
        for _, group in DataFrame(records).groupby(list(SAME), sort=False):
            first, commands = group.iloc[0], " and ".join(f"`{command}`" for command in group["command"].unique())
            versions = [f"{name} {first[name]}" for name in SHOWN if first[name] not in ("", "absent")] + [first["card"]]
            lines += [f"{commands}: {', '.join(filter(None, versions))},", f"{first['threads']} threads, commit {first['commit']}.", ""]
            lines += [*_table(group), ""]
            skipped = group[group["status"] == "skipped"].groupby(["implementation", "note"], sort=False).size()
            for (name, note), count in skipped.items():
                lines += [f"Skipped: {name}: {note} ({count} rows).", ""]
    return fill(PAGE.read_text(), {"tables": lines[:-1]})


def _table(group: Any) -> list[str]:
    from pandas import to_numeric

    rows, ok, of = group[group["status"] != "skipped"], group["status"] == "ok", ["case", "dtype", "layout", "operation"]
    times = to_numeric(rows["p50_ms"].where(ok))
    eager = rows.assign(eager=times)[rows["implementation"] == "eager"][[*of, "eager"]]
    ratio = rows.merge(eager, how="left", on=of)["eager"].set_axis(rows.index) / times
    cells = rows[["operation", "implementation"]].assign(
        ms=(rows["p50_ms"] + " (" + rows["p20_ms"] + " - " + rows["p80_ms"] + ")").where(ok, rows["status"] + ": " + rows["note"]),
        MB=rows["megabytes"].where(ok, ""),
        **{"of copy": (100 * to_numeric(rows["copy_ms"]) / times).map("{:.0f}%".format).where(ok, "")},
        launches=rows["launches"].replace("", "-").where(ok, ""),
        x=ratio.map("{:.2f}".format).replace("nan", "-").where(ok, ""),
        error=rows["error"].replace("", "-").where(ok, ""),
    )
    layouts = rows["layout"].map({"channels last": ", channels last"}).fillna("")
    cells.insert(0, "case", rows["case"] + ", " + rows["dtype"] + layouts)
    return table(cells, text=("case", "operation", "implementation"))


if __name__ == "__main__":
    main()
