"""Everything that needs a GPU, in one command, for eight minutes or as many as there are: `python -m bench.gpu`.

Parts run one after another, the most valuable first, each in a process with a limit of its own; one that crashes or hangs is reported, and
the next one runs. Eight minutes have room for the kernels' tests, the attention of few shapes and SDXL's pictures; what was done at this
commit on this device is not done again, so the same command goes on where it stopped, by parts and by rows. CSVs and one log lie in
--out; CSVs copied to bench/results are what `python -m bench.report --write` shows. Exit status: 1 where a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench import harness
from bench.gpu_parts import PARTS, Outcome, Part, rows_told, run, shown

SAME = ("machine", "commit", "torch", "diffusers", *harness.VERSIONS)
FIELDS = ("row", "status", "seconds", "note", "command", *SAME)
LEAST = 20.0  # seconds that a part is begun for


def facts(commit: str | None) -> dict[str, str]:
    """What a part is run with."""
    found = harness.facts("cuda", commit=commit) | harness.versions("cuda")
    return {key: found[key] for key in SAME}


class Run:
    """Parts, the time that is left for them, and what came of each."""

    def __init__(self, out: Path, measured_with: Mapping[str, str], *, seconds: float, commit: str = "", again: bool = False) -> None:
        self._out, self._facts, self._commit, self._again = out, measured_with, commit, again
        self._deadline = time.monotonic() + seconds
        self._path = out / f"gpu-{harness.slug(measured_with['machine'])}.csv"
        self._rows = harness.read_rows(self._path)
        self._standing = set() if again else harness.standing(self._rows, measured_with)
        self.outcomes: dict[str, Outcome] = {}

    def part(self, part: Part) -> Outcome:
        """Run one, unless it stands, cannot run here or has no time left; written down at once."""
        command = part.command(self._facts["machine"], commit=self._commit, again=self._again)
        outcome = self._outcome(part, command)
        self.outcomes[part.name] = outcome
        if outcome.status not in ("done before", "did not fit"):
            row = {"row": part.name, "status": outcome.status, "seconds": f"{outcome.seconds:.0f}", "note": outcome.note}
            self._rows[part.name] = row | {"command": shown(command)} | dict(self._facts)
            harness.write_rows(self._path, FIELDS, self._rows.values())
        return outcome

    def _outcome(self, part: Part, command: Sequence[str]) -> Outcome:
        if part.name in self._standing and self._rows[part.name]["status"] == "done":
            return Outcome("done before", self._rows[part.name]["note"])
        if refusal := part.refusal():
            return Outcome("skipped", refusal)
        left = self._deadline - time.monotonic()
        if left < LEAST:
            return Outcome("did not fit", f"{max(left, 0):.0f} s were left")
        begun = time.monotonic()
        limit = min(part.limit, left)
        status, last = run(part, command, self._out, limit=limit)
        seconds = time.monotonic() - begun
        rows = rows_told(self._out / command[command.index("--csv") + 1], self._facts["commit"]) if part.csv else ""
        if status == 0:
            return Outcome("done", rows or last, seconds)
        if status is None:
            why = "its own limit" if limit == part.limit else "the end of the time for all parts"
            return Outcome("stopped", f"after {limit:.0f} s, {why}; {rows or last}", seconds)
        died = f"signal {-status}" if status < 0 else f"exit status {status}"
        return Outcome("failed", f"{died}: {last}" + (f"; {rows}" if rows else ""), seconds)

    def unfinished(self) -> list[str]:
        """Names of what another run would go on with."""
        return [name for name, outcome in self.outcomes.items() if outcome.status in ("stopped", "did not fit")]


def table(outcomes: Mapping[str, Outcome]) -> str:
    """For people, on a terminal."""
    return "\n".join(f"{name:<16}{o.status:<12}{o.seconds:>5.0f} s  {o.note}" for name, o in outcomes.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [part.name for part in PARTS]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"--only takes {', '.join(names)}, got {', '.join(unknown)}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    parts = [part for part in PARTS if part.name in (options.only or names)]
    if options.list:
        for part in parts:
            print(f"{part.name:<16}{part.limit:>4.0f} s at most  {part.title}: {shown(['-m', *part.arguments])}")
        return
    if not torch.cuda.is_available():
        parser.exit(2, "python -m bench.gpu needs a GPU that torch sees, got none.\n")
    options.out.mkdir(parents=True, exist_ok=True)
    measured_with = facts(options.commit)
    try:
        every = Run(
            options.out.resolve(), measured_with, seconds=60 * options.minutes, commit=options.commit or "", again=options.again
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    print(", ".join(f"{key} {value}" for key, value in measured_with.items()), flush=True)
    if not harness.is_commit(measured_with["commit"]):
        print(f"commit {measured_with['commit']}: its rows will not stand in another run; commit the changes, or name --commit", flush=True)
    for part in parts:
        print(f"{part.name}: {part.title}", flush=True)
        outcome = every.part(part)
        print(f"{part.name}: {outcome.status}, {outcome.note}", flush=True)
    print(f"\n{table(every.outcomes)}")
    if unfinished := every.unfinished():
        print(f"not finished: {', '.join(unfinished)}; the same command goes on with them")
    failed = [name for name, outcome in every.outcomes.items() if outcome.status == "failed"]
    raise SystemExit(f"failed: {', '.join(failed)}; all that they printed is in {options.out / 'gpu.log'}" if failed else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(part.name for part in PARTS)}, in that order")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=harness.ROOT / "runs" / "gpu", help="folder of CSVs and gpu.log (default: runs/gpu)")
    parser.add_argument("--list", action="store_true", help="print the parts, run none")
    parser.add_argument("--again", action="store_true", help="do what is done, too")
    parser.add_argument("--commit", help="of a copy of the tree that git knows nothing of")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended, too
    main()
