"""Everything that needs a GPU, in one command, for eight minutes or as many as there are: `python3 -m bench.gpu`.

Parts run one after another, the most valuable first, each as a process with a time limit; if one crashes or hangs, that is reported and the
next one runs. The first eight minutes are for the kernels' correctness, the attention kernel with what its goals are compared with and its
neighbours in the table, and, of what time is left, whole pictures of SDXL and FLUX at 4096 px. All parts at their limits are about seventy
minutes, ten runs, and every shape by every implementation is about an hour more. What is done at this commit, on this device and with these
packages is not done again, so the same command resumes, by parts and by rows. It ends with a summary of at most sixty lines: the parts,
timed calls of the quick shapes, and the goals as they are met. Only torch, Triton, einops and pytest must be installed. CSVs and one log
are written to --out; CSVs copied to bench/results are what `python -m bench.report --write` shows. Exit status: 1 if a part failed, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu import parts as gpu_parts
from bench.gpu.parts import PARTS, Part, Row, describe, typed
from bench.harness.facts import ROOT, VERSIONS, facts, is_commit
from bench.harness.rows import RowFile, read_records, slug

SAME = ("machine", "commit", "torch", "diffusers", *VERSIONS, "transformers", "natten")
SUMMARY = 60  # lines
FIELDS = ("row", "status", "seconds", "note", "command", *SAME)
CARRY = (
    "Where diffusers is not installed and nothing can be fetched: unpack the wheels of diffusers, importlib-metadata and zipp, all of them "
    "pure Python, into one folder, and put that on PYTHONPATH."
)
COPY = "In a copy of the tree without git: --commit $(git rev-parse --short HEAD), run in the checkout, or no later run resumes."


class Outcome(NamedTuple):
    status: str  # done, failed, stopped, skipped, did not fit, or done before
    note: str
    seconds: float = 0.0


class Run:
    """Runs parts in the time that there is, and keeps their outcomes in a CSV."""

    def __init__(self, out: Path, measured_with: Mapping[str, str], *, seconds: float, commit: str = "") -> None:
        self._out, self._facts, self._commit = out, measured_with, commit
        self._deadline = time.monotonic() + seconds - gpu_parts.GRACE  # the last part may have to be ended
        self._spare = 0.0  # seconds that parts have left of their limits
        self._file = RowFile(out / f"gpu-{slug(measured_with['machine'])}.csv", FIELDS, measured_with)
        self.outcomes: dict[str, Outcome] = {}

    def part(self, part: Part) -> Outcome:
        """Run one, unless it is done, cannot run here or has no time left."""
        command = part.command(self._facts["machine"], commit=self._commit)
        outcome = self.outcomes[part.name] = self._outcome(part, command)
        if outcome.status not in ("done before", "did not fit"):
            row = {"row": part.name, "status": outcome.status, "seconds": f"{outcome.seconds:.0f}", "note": outcome.note}
            self._file.add(row | {"command": typed(command)})
        return outcome

    def _outcome(self, part: Part, command: Sequence[str]) -> Outcome:
        begun, before = time.monotonic(), self._file.rows.get(part.name, {})
        if (
            part.name in self._file.finished
            and before["status"] == "done"
            and all(row["status"] != "error" for row in self._measured(part))
        ):
            return Outcome("done before", before["note"])
        if refusal := part.refusal():
            return Outcome("skipped", refusal)
        left, own = self._deadline - begun, part.limit + min(self._spare, part.limit)
        if left < part.least:
            return Outcome("did not fit", f"{max(left, 0):.0f} s were left, it is begun with {part.least:.0f}")
        status, printed = part.run(command, self._out, limit=min(own, left))
        seconds = time.monotonic() - begun
        self._spare = max(0.0, self._spare + part.limit - seconds)
        last = (printed.splitlines() or ["nothing was printed"])[-1].strip("= ")[:160]
        result = describe(self._measured(part)) if part.csv else last
        if status == 0:
            return Outcome("done", result, seconds)
        if status is None:
            why = "the end of the time for all parts" if left < own else "its own limit"
            return Outcome("stopped", f"after {min(own, left):.0f} s, {why}; {result}", seconds)
        if refused := [line for line in printed.splitlines() if part.refuses and part.refuses in line]:
            return Outcome("skipped", refused[0].rpartition("= ")[2].strip(), seconds)
        died = f"signal {-status}" if status < 0 else f"exit status {status}"
        return Outcome("failed", "; ".join([f"{died}: {last}", *([result] if part.csv else [])]), seconds)

    def _measured(self, part: Part) -> list[Row]:
        return part.rows(self._out, self._facts["machine"], self._facts["commit"])


def results(out: Path, machine: str, commit: str) -> list[str]:
    """Timed calls of the quick shapes, and the goals as a commit meets them on this machine, whatever device they are set for."""
    sys.path.append(str(ROOT / "kernels"))  # the package need not be installed
    from bench.attention import shapes  # not needed before something was measured
    from bench.report.goals import GOALS
    from bench.report.rows import read

    found = read(out)
    attention_rows, cascade_rows = ([g for g in kind if g.facts["commit"] == commit] for kind in (found.attention, found.cascade))
    found = found._replace(attention=attention_rows, cascade=cascade_rows)
    lines = []
    quick = {task.row_name("") for task in shapes.tasks(list(shapes.QUICK), None, "cuda")}
    for row in read_records(out / f"attention-{slug(machine)}.csv"):
        if row["commit"] == commit and row["status"] == "ok" and row["row"].rpartition("/")[0] in quick:
            each = f" ({row['kernels_ms']})" if row.get("kernels_ms") and row["provider"] == "triton" else ""
            lines.append(f"{row['row']}: {row['p50_ms']} ms, {row['tflops']} TFLOP/s{each}")
    for goal in (goal for goal in GOALS if goal.device != "CPU"):
        here = replace(goal, device=machine)
        answers = [here.result_text(answer) for answer in here.answers(found)] or [here.result_text(None)]
        lines += [f"{goal.what}: {answer}; {goal.goal} on {goal.device}" for answer in answers]
    return lines


def summary(outcomes: Mapping[str, Outcome], out: Path, machine: str, commit: str, end: Sequence[str]) -> list[str]:
    """Parts, timed calls, goals, and how it ended: at most `SUMMARY` lines, the rest is in the CSVs."""
    try:
        found = results(out, machine, commit)
    except Exception as error:  # whatever the environment lacks: parts and exit status are reported all the same
        found = [f"no results: {type(error).__name__}: {error}"]
    parts = [f"{name:<28}{outcome.status:<12}{outcome.seconds:>5.0f} s  {outcome.note}" for name, outcome in outcomes.items()]
    lines, room = [*parts, "", *found], SUMMARY - len(end)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"and {len(lines) - room + 1} lines more: see the CSVs in {out}"]
    return [*lines, *end]


def listed(parts: Sequence[Part], minutes: float) -> list[str]:
    """Parts and their limits, how many runs they take, and what the first run has room for."""
    lines = [f"{part.name:<28}{part.limit:>4.0f} s at most  {part.title}: {typed(['-m', *part.arguments])}" for part in parts]
    seconds, total = 60 * minutes - gpu_parts.GRACE, sum(part.limit for part in parts)
    first = [part.name for n, part in enumerate(parts, start=1) if sum(p.limit for p in parts[:n]) <= seconds]
    runs = f"{total / 60:.0f} minutes at their limits, {math.ceil(total / seconds)} runs of {minutes:g} minutes"
    return [*lines, f"{len(parts)} parts, {runs}; the first has room for {', '.join(first) or 'a part of the first'}"]


def main(arguments: Sequence[str] | None = None) -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.split("\n")[0], epilog=f"{CARRY} {COPY}")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {', '.join(names)}, in that order")
    parser.add_argument("--tune", dest="only", action="store_const", const=["pipeline", "tune"], help="as --only pipeline tune")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of CSVs and gpu.log (default: runs/gpu)")
    parser.add_argument("--list", action="store_true", help="print the parts and how long they are, run none")
    parser.add_argument("--commit", help="of a copy of the tree without git")
    options = parser.parse_args(arguments)
    if not 60 * options.minutes > gpu_parts.GRACE:
        parser.error(f"--minutes must be more than the {gpu_parts.GRACE:.0f} s in which a part is ended, got {options.minutes}")
    parts = [part for part in PARTS if part.name in options.only]
    if options.list:
        print("\n".join(listed(parts, options.minutes)))
        return
    if not torch.cuda.is_available():
        parser.exit(2, "python3 -m bench.gpu needs a GPU that torch sees, got none.\n")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        measured_with = facts(SAME, "cuda", commit=options.commit)
        run = Run(out, measured_with, seconds=60 * options.minutes, commit=options.commit or "")
    except ValueError as error:
        parser.error(str(error))
    print(", ".join(f"{key} {value}" for key, value in measured_with.items()), flush=True)
    if not is_commit(measured_with["commit"]):
        print(f"commit {measured_with['commit']}: no later run resumes; commit the changes. {COPY}", flush=True)
    if find_spec("diffusers") is None and any("diffusers" in part.needs for part in parts):
        print(f"diffusers is not installed, so there are no whole pictures. {CARRY}", flush=True)
    for part in parts:
        print(f"{part.name}: {part.title}", flush=True)
        outcome = run.part(part)
        print(f"{part.name}: {outcome.status}, {outcome.note}", flush=True)
    unfinished = [name for name, outcome in run.outcomes.items() if outcome.status in ("stopped", "did not fit")]
    failed = [name for name, outcome in run.outcomes.items() if outcome.status == "failed"]
    end = [f"not finished: {', '.join(unfinished)}; the same command goes on with them"] if unfinished else []
    end += [f"failed: {', '.join(failed)}; all that they printed is in {out / 'gpu.log'}"] if failed else []
    print("", *summary(run.outcomes, out, measured_with["machine"], measured_with["commit"], end), sep="\n", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended, too
    main()
