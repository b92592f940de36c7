"""Whole pictures by several methods, end to end and part by part: `python -m bench.cascade`.

On a GPU SDXL and FLUX.1-dev at their true size with random weights; on a CPU, and with --small, small random models of both and the
embedded model. A row is one part of one stage, or one run; rows go to bench/results/cascade-<machine>.csv as they are measured, and what
stands there, measured by the same commit on the same machine, is not measured again. `p50_ms` is of one step, or of what a stage does once,
and `in_run_s` what that comes to in a run. A run has `composed_s`, made up of its parts, and `measured_s` only where it was run whole: the
median of so many `runs`, its own `p20_ms` and `p80_ms` among these. Useful TFLOPs count neither padding nor tiles; `matrix_percent` is
their rate over that of a large matrix product in this very process. On a CPU the process keeps memory that it has freed, as the command
`scalediff` does, whatever the method.
--growth: the embedded model from 128 to 1024 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from bench.cascade.methods import METHODS, OURS
from bench.cascade.models import GROWTH_METHODS, GROWTH_SIZES, SMALL, SUBJECTS, TRUE
from bench.cascade.rows import COMPILE, Bench, Limits, Row, Unit
from bench.harness import command
from bench.harness import rows as harness
from bench.roofline.ceilings import Ceilings, ceilings

SAME = (*harness.FACTS, *harness.VERSIONS, "timed_steps", "limit_s", "view_batch")
FIELDS = (
    "row", "status", "model", "size", "method", "compile", "stage", "part", "p20_ms", "p50_ms", "p80_ms", "count", "in_run_s", "steps",
    "composed_s", "measured_s", "runs", "rate_of", "useful_tflop", "tflops", "matrix_percent", "matrix_tflops", "peak_megabytes",
    "before_megabytes", "backend", "error", "allowed", "note", "command", *SAME,
)  # fmt: skip
LIMITS = {"cuda": 120.0, "cpu": 210.0}


def facts(options: argparse.Namespace) -> dict[str, str]:
    """What a row is measured with."""
    return harness.facts(options.device, commit=options.commit) | {
        **harness.versions(options.device),
        "timed_steps": str(options.steps),
        "limit_s": f"{options.limit:g}",
        "view_batch": str(options.view_batch),
    }


def measured_rows(units: Sequence[Unit], options: argparse.Namespace) -> Iterator[tuple[Unit, Row]]:
    """Unit by unit, models one after the other; the ceilings are measured once per dtype."""
    found: dict[torch.dtype, Ceilings] = {}

    def ceiling(dtype: torch.dtype) -> Ceilings:
        if dtype not in found:
            found[dtype] = ceilings(options.device, dtype)
        return found[dtype]

    limits = Limits(options.limit, options.steps)
    for model in dict.fromkeys(unit.model for unit in units):
        bench = Bench(model, options.device, ceiling, limits, view_batch=options.view_batch)
        for unit in units:
            if unit.model == model:
                for row in bench.rows(unit, METHODS[unit.method]):
                    yield unit, row
                    if row["status"] == "FAILED" and harness.device_lost(options.device):
                        raise SystemExit(f"the device was lost in {unit.name}: the same command goes on after it")
        del bench
        harness.forget(options.device)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    wanted = _picked(parser, options)
    try:
        measured_with = facts(options)
        path = command.path_of(parser, options, "cascade", measured_with["machine"])
        rows = harness.read_rows(path, FIELDS)
        others = harness.read_rows(options.compare, FIELDS) if options.compare else {}
    except ValueError as error:
        parser.error(str(error))
    # What was skipped may run now; what failed or was timed stays so. A unit is done when its run is.
    standing = {name for name in harness.standing(rows, measured_with) if rows[name]["status"] in ("ok", "FAILED")}
    done = [] if options.again else [unit for unit in wanted if f"{unit.name}/run" in standing]
    told: set[str] = set()
    if not options.no_measure:
        if options.device == "cpu":
            command.keep_freed_memory()
        for unit in () if options.json else done:
            print(f"{unit.name}: as measured before")
        begun: set[Unit] = set()
        for unit, row in measured_rows([unit for unit in wanted if unit not in done], options):
            if unit not in begun:  # nothing of an earlier run stays beside what is measured now
                begun.add(unit)
                rows = {name: old for name, old in rows.items() if not name.startswith(f"{unit.name}/")}
            name = row["row"]
            rows[name] = dict.fromkeys(FIELDS, "") | row | measured_with | {"command": command.shown("cascade", arguments)}
            harness.write_rows(path, FIELDS, rows.values())
            told.add(name)
            print(json.dumps(rows[name]) if options.json else line(rows[name]), flush=True)
    shown = {name: row for unit in wanted for name, row in rows.items() if name.startswith(f"{unit.name}/")}
    for name in [name for name in shown if name not in told] if options.json or options.no_measure else []:
        print(json.dumps(shown[name]) if options.json else line(shown[name]))
    if absent := [unit.name for unit in wanted if f"{unit.name}/run" not in shown]:
        print(f"not in {path.name}: {', '.join(absent)}", file=sys.stderr)
    mine, theirs = ({name: row for name, row in table.items() if row["part"] != "gate"} for table in (shown, others))  # no times
    command.compare(options, mine, theirs, SAME)
    command.end([name for name, row in shown.items() if row["method"] in OURS and row["status"] in ("FAILED", "error")])


def line(row: Mapping[str, str]) -> str:
    """For people, on a terminal."""
    if row["status"] not in ("ok", "FAILED") or (row["part"] == "run" and row["status"] == "FAILED"):
        return f"{row['row']}: {row['status']}, {row['note']}"
    if row["part"] == "gate":
        return f"{row['row']}: {row['status']}, error {row['error']} of {row['allowed']} allowed, {row['note']}"
    rate = f"{row['tflops']} useful TFLOP/s, {row['matrix_percent']}% of a matrix product" if row["tflops"] else ""
    memory = f"peak {row['peak_megabytes']} MB" if row["peak_megabytes"] else ""
    if row["part"] == "run":
        times = [f"measured {row['measured_s']} s" if row["measured_s"] else "", f"composed {row['composed_s']} s"]
        memory += f", {row['before_megabytes']} MB before" if memory else ""
        parts = [*times, rate and f"{rate} ({row['rate_of']})", memory, row["note"]]
    else:
        spread = f" ({row['p20_ms']} - {row['p80_ms']})" if row["p20_ms"] else ""
        parts = [f"{row['p50_ms']} ms{spread} x {row['count']} = {row['in_run_s']} s", rate, memory, row["backend"]]
    return f"{row['row']}: " + ", ".join(part for part in parts if part)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("cascade", __doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--size", nargs="+", type=int, metavar="N", help="pixels per side (default: the model's own list)")
    parser.add_argument("--method", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--compile", nargs="+", metavar="HOW", help="of eager, compiled: repeated blocks (default: eager; on a GPU both)")
    parser.add_argument("--small", action="store_true", help="small models (default on a CPU)")
    parser.add_argument("--growth", action="store_true", help="the embedded model from 128 to 1024 pixels")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds of a run that is measured whole (default: 120; on a CPU 210)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of every stage (default: %(default)s)")
    parser.add_argument("--view-batch", type=int, default=8, help="views in one pass (default: %(default)s)")
    return parser


def _picked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Unit]:
    """What to measure; refuses what is not known or cannot be."""
    command.check(parser, options)
    known: dict[str, Sequence[str]] = {"model": tuple(SUBJECTS), "method": tuple(METHODS), "compile": COMPILE}
    for name, values in known.items():
        if unknown := [value for value in getattr(options, name) or () if value not in values]:
            parser.error(f"--{name} takes {', '.join(values)}, got {', '.join(unknown)}")
    if options.limit is None:
        options.limit = LIMITS[options.device]
    for name, least in (("limit", 0), ("steps", 1), ("view_batch", 1)):
        value = getattr(options, name)
        if not least <= value < math.inf or (name == "limit" and not value > 0):
            parser.error(f"--{name.replace('_', '-')} must be {'positive' if least == 0 else 'at least 1'}, got {value:g}")
    if any(size < 1 for size in options.size or ()):
        parser.error(f"--size takes pixels per side, got {' '.join(map(str, options.size))}")
    if options.growth and (options.model or options.small):
        given = " and ".join(["--growth", *(["--model " + " ".join(options.model)] if options.model else []), *["--small"] * options.small])
        parser.error(f"--growth is of the embedded model and takes no --model and no --small, got {given}")
    models = options.model or (("demo",) if options.growth else SMALL if options.small or options.device == "cpu" else TRUE)
    if large := [name for name in models if not SUBJECTS[name].small and (options.device == "cpu" or options.small)]:
        parser.error(f"--model {' '.join(large)} is of true size, for a GPU and without --small; small ones are {', '.join(SMALL)}")
    missing = [name for name in ("diffusers", "transformers") if harness.package_version(name) == "absent"]
    if missing and not options.no_measure:
        parser.error(f'pipelines need {" and ".join(missing)}, not installed here: pip install "scalediff[diffusers]"')
    methods = options.method or (GROWTH_METHODS if options.growth else tuple(METHODS))
    hows = options.compile or (COMPILE if options.device == "cuda" else COMPILE[:1])
    sizes = options.size or (GROWTH_SIZES if options.growth else ())
    return [
        Unit(model, size, method, how)
        for model in dict.fromkeys(models)
        for size in dict.fromkeys(sizes or SUBJECTS[model].sizes)
        for method in dict.fromkeys(methods)
        for how in dict.fromkeys(hows)
    ]  # fmt: skip


if __name__ == "__main__":
    main()
