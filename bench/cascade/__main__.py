"""Whole pictures by several methods, end to end and part by part: `python -m bench.cascade`.

On a GPU SDXL and FLUX.1-dev at their true size with random weights; on a CPU, and with --small, small random models of both and the
embedded model. A row is one part of one stage, or one run. Rows go to bench/results/cascade-<machine>.csv as they are measured, and rows
that the same commit measured on the same machine are not measured again. `p50_ms` is of one step, or of what a stage does once, and
`in_run_s` what that adds up to in a run. A run has `composed_s`, the sum of its parts, and `measured_s` only if it was run whole, the
median of `runs`. Useful TFLOPs count neither padding nor tiles; `matrix_percent` compares with a large matrix product in this process.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch

from bench.cascade.methods import METHODS, OURS
from bench.cascade.models import GROWTH_METHODS, GROWTH_SIZES, SMALL, SUBJECTS, TRUE
from bench.cascade.rows import COMPILE, FIELDS, SAME, Bench, Row, Unit
from bench.harness import command
from bench.harness import rows as harness
from bench.harness.ceilings import ceilings

PRINTED = (
    "measured_s", "composed_s", "p20_ms", "p50_ms", "p80_ms", "in_run_s", "tflops", "matrix_percent", "rate_of", "peak_megabytes",
    "before_megabytes", "backend", "error", "allowed",
)  # fmt: skip
LIMITS = {"cuda": 120.0, "cpu": 210.0}


def measured_rows(units: Sequence[Unit], options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Measure one unit after the other, all of one model together."""
    matrix_tflops = cache(lambda dtype: ceilings(options.device, dtype).matrix_tflops)
    for model in dict.fromkeys(unit.model for unit in units):
        how = {"limit": options.limit, "steps": options.steps, "view_batch": options.view_batch}
        bench = Bench(model, options.device, matrix_tflops, **how)
        for unit in (unit for unit in units if unit.model == model):
            for row in bench.rows(unit):
                yield unit.name, row
        del bench
        harness.forget(options.device)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    units = _units(parser, options)
    command.Benchmark("cascade", FIELDS, SAME, line, last="/run").run(
        parser,
        options,
        arguments,
        wanted={unit.name: unit.method in OURS for unit in units},
        measure=lambda finished: measured_rows([unit for unit in units if unit.name not in finished], options),
        own_facts={"timed_steps": str(options.steps), "limit_s": f"{options.limit:g}", "view_batch": str(options.view_batch)},
    )


def line(row: Mapping[str, str]) -> str:
    """A row for people, on a terminal."""
    numbers = [f"{name} {row[name]}" for name in PRINTED if row[name]]
    return f"{row['row']}: " + ", ".join(filter(None, [row["status"], *numbers, row["note"]]))


def _parser() -> argparse.ArgumentParser:
    parser = command.parser_of("cascade", __doc__.split("\n")[0])
    whole, number = (partial(_positive, kind) for kind in (int, float))
    parser.add_argument("--model", nargs="+", choices=SUBJECTS)
    parser.add_argument("--size", nargs="+", type=whole, metavar="N", help="pixels per side (default: the model's own list)")
    parser.add_argument("--method", nargs="+", choices=METHODS)
    parser.add_argument(
        "--compile", nargs="+", choices=COMPILE, help="whether repeated blocks are compiled (default: eager; on a GPU both)"
    )
    parser.add_argument("--small", action="store_true", help="small models (default on a CPU)")
    parser.add_argument("--growth", action="store_true", help="the embedded model from 128 to 1024 pixels")
    parser.add_argument("--limit", type=number, metavar="S", help="seconds of a run that is measured whole (default: 120; on a CPU 210)")
    parser.add_argument("--steps", type=whole, default=2, help="timed steps of every stage (default: %(default)s)")
    parser.add_argument("--view-batch", type=whole, default=8, help="views in one pass (default: %(default)s)")
    return parser


def _positive(kind: Callable[[str], float], text: str) -> float:
    if not 0 < (value := kind(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def _units(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Unit]:
    """What to measure; exits with a message if options do not fit together or a package is missing."""
    command.check(parser, options)
    options.limit = options.limit or LIMITS[options.device]
    if options.growth and (options.model or options.small):
        given = f"--model {' '.join(options.model)}" if options.model else "--small"
        parser.error(f"--growth is of the embedded model and takes no --model and no --small, got --growth and {given}")
    models = options.model or (("demo",) if options.growth else SMALL if options.small or options.device == "cpu" else TRUE)
    if large := [name for name in models if not SUBJECTS[name].small and (options.device == "cpu" or options.small)]:
        parser.error(f"--model {' '.join(large)} is of true size, for a GPU and without --small; small ones are {', '.join(SMALL)}")
    missing = [name for name in ("diffusers", "transformers") if harness.package_version(name) == "absent"]
    if missing and not options.no_measure:
        parser.error(f'pipelines need {" and ".join(missing)}, not installed here: pip install "scalediff[diffusers]"')
    return [
        Unit(model, size, method, how)
        for model in dict.fromkeys(models)
        for size in dict.fromkeys(options.size or (GROWTH_SIZES if options.growth else SUBJECTS[model].sizes))
        for method in dict.fromkeys(options.method or (GROWTH_METHODS if options.growth else METHODS))
        for how in dict.fromkeys(options.compile or (COMPILE if options.device == "cuda" else COMPILE[:1]))
    ]


if __name__ == "__main__":
    main()
