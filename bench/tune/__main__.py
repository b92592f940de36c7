"""Try the neighbours of the warp-specialised kernel's launch configurations on an sm_90 GPU: `python -m bench.tune`.

Of every shape the configuration of the table, then those that differ from it in one respect: stages, turns, registers, keys of a block, or
query rows. They run in processes with a limit, since a wrong barrier hangs: each is compiled and checked in one of its own, several at a
time; then those of a shape are timed in one process, one after another. A candidate that is faster than the table's is a line for
`_PIPELINES` in `kernels/scalediff_kernels/neighborhood/config.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context

from bench.harness.command import Benchmark, parser_of, timed_line
from bench.harness.facts import VERSIONS
from bench.harness.rows import Row
from bench.tune.candidates import SHAPES, Candidate, candidates, check, send_rows, timed

CHECK_LIMIT, TIME_LIMIT = 60.0, 5.0  # seconds of a process that checks one candidate, and for each candidate that one times
AT_ONCE = 8  # processes that check
PROCESSES = get_context("spawn")
LATE: Row = {"status": "skipped", "note": "no time was left"}
SAME = ("machine", "commit", "torch", *VERSIONS)
FIELDS = (
    "row", "status", "shape", "queries", "keys", "stages", "registers", "ping_pong", "p20_ms", "p50_ms", "p80_ms", "tflops", "error",
    "eager_error", "note", "seconds", "command", *SAME,
)  # fmt: skip


def in_a_process(measure: Callable[[Candidate], Row], candidates: Sequence[Candidate], *, limit: float) -> list[Row]:
    """The columns that `check` or `timed` finds of each candidate, in a process of its own; status and note where one fails or hangs."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=send_rows, args=(sender, measure, candidates))
    process.start()
    sender.close()
    rows, deadline = list[Row](), time.monotonic() + limit
    with suppress(EOFError):  # the process has ended
        while receiver.poll(max(0, deadline - time.monotonic())):
            rows.append(receiver.recv())
    hangs = process.is_alive() and time.monotonic() >= deadline
    if hangs:
        process.kill()
    process.join()
    if len(rows) < len(candidates):
        why = f"stopped after {limit:.0f} s: it hangs, or is slow" if hangs else f"the process ended with {process.exitcode}"
        rows.append({"status": "FAILED", "note": why})
    return rows + [{"status": "skipped", "note": "one before it ended the process"}] * (len(candidates) - len(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("tune", __doc__.split("\n")[0], seconds=0.3)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=1.5, help="for all (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.device != "cuda":
        parser.error("configurations of the kernel run on an sm_90 GPU, got --device cpu")
    deadline = time.monotonic() + 60 * options.minutes
    wanted = {candidate.name: candidate for name in options.shape for candidate in candidates(name)}

    def measure(finished: Set[str]) -> Iterator[tuple[str, Row]]:
        todo = [candidate for name, candidate in wanted.items() if name not in finished]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            limit = min(CHECK_LIMIT, 60 * options.minutes)
            rows = dict(zip(todo, pool.map(lambda one: in_a_process(check, [one], limit=limit)[0], todo), strict=True))
        for shape in options.shape:
            mine = {candidate: row for candidate, row in rows.items() if candidate.shape == shape}
            right = [candidate for candidate, row in mine.items() if "status" not in row]
            left = min(TIME_LIMIT * (2 + len(right)), deadline - time.monotonic())
            timing = partial(timed, seconds=options.seconds)
            times = in_a_process(timing, right, limit=left) if right and left > TIME_LIMIT else [LATE] * len(right)
            found = dict(zip(right, times, strict=True))
            for candidate, row in mine.items():
                yield candidate.name, {"status": "ok", "note": ""} | candidate.row() | row | found.get(candidate, {})

    table = {candidates(name)[0].name for name in options.shape}
    Benchmark("tune", FIELDS, SAME, line).run(parser, options, arguments, wanted={name: name in table for name in wanted}, measure=measure)


def line(row: Row) -> str:
    """For a terminal: a row, and the entry of the table that it is."""
    entry = f"Pipeline({row['queries']}, {row['keys']}, {row['stages']}, {row['registers']}, {row['ping_pong']})"
    return timed_line(row, f"{row['tflops']} TFLOP/s", entry)


if __name__ == "__main__":
    main()
