"""Whole pictures by several methods, end to end and part by part: `python -m bench.cascade`.

On a GPU SDXL and FLUX.1-dev at their true size with random weights; on a CPU small random models of both and the embedded model. A row is
one part of one stage, or one run. Rows go to bench/results/cascade-<machine>.csv as they are measured, and rows that the same commit
measured on the same machine are not measured again. `p50_ms` is of one step, or of what a stage does once, and `in_run_s` what that adds up
to in a run. A run has `composed_s`, the sum of its parts, and `measured_s` only if it was run whole, the median of `runs`. Useful TFLOPs
count neither padding nor tiles; `matrix_percent` compares with a large matrix product in this process.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby

import torch

from bench.cascade.methods import METHODS, OURS
from bench.cascade.models import GROWTH_METHODS, GROWTH_SIZES, SMALL, SUBJECTS, TRUE
from bench.cascade.rows import COMPILE, FIELDS, SAME, Bench, Unit
from bench.harness import facts
from bench.harness.command import Benchmark, parser_of, positive
from bench.harness.device import forget
from bench.harness.rows import Row
from bench.harness.timing import ceilings

PRINTED = (
    "measured_s", "composed_s", "p20_ms", "p50_ms", "p80_ms", "in_run_s", "tflops", "matrix_percent", "rate_of", "peak_megabytes",
    "before_megabytes", "backend", "error", "allowed",
)  # fmt: skip
LIMITS = {"cuda": 120.0, "cpu": 210.0}


def measured_rows(units: Sequence[Unit], options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Measure one unit after the other; those of one model follow each other."""
    matrix_tflops = cache(lambda dtype: ceilings(options.device, dtype).matrix_tflops)
    how = {"limit": options.limit, "steps": options.steps, "view_batch": options.view_batch}
    for model, group in groupby(units, key=lambda unit: unit.model):
        bench = Bench(model, options.device, matrix_tflops, **how)
        yield from ((unit.name, row) for unit in group for row in bench.rows(unit))
        del bench
        forget(options.device)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    units = _units(parser, options)
    Benchmark("cascade", FIELDS, SAME, line, last="/run").run(
        parser,
        options,
        arguments,
        wanted={unit.name: unit.method in OURS for unit in units},
        measure=lambda finished: measured_rows([unit for unit in units if unit.name not in finished], options),
        own_facts={"timed_steps": str(options.steps), "limit_s": f"{options.limit:g}", "view_batch": str(options.view_batch)},
    )


def line(row: Mapping[str, str]) -> str:
    numbers = [f"{name} {row[name]}" for name in PRINTED if row[name]]
    return f"{row['row']}: " + ", ".join(filter(None, [row["status"], *numbers, row["note"]]))


def _parser() -> argparse.ArgumentParser:
    parser, whole = parser_of("cascade", __doc__.split("\n")[0]), positive(int)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", nargs="+", choices=SUBJECTS, metavar="NAME", help=f"of {', '.join(SUBJECTS)}")
    which.add_argument("--growth", action="store_true", help="the embedded model from 128 to 1024 pixels")
    parser.add_argument("--size", nargs="+", type=whole, metavar="N", help="pixels per side (default: the model's own list)")
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)} (default: all; with --growth fewer)"
    )
    blocks = "whether repeated blocks are compiled (default: eager; on a GPU both)"
    parser.add_argument("--compile", nargs="+", choices=COMPILE, help=blocks)
    limit = "seconds of a run that is measured whole (default: 120; on a CPU 210)"
    parser.add_argument("--limit", type=positive(float), metavar="S", help=limit)
    parser.add_argument("--steps", type=whole, default=2, help="timed steps of every stage (default: %(default)s)")
    parser.add_argument("--view-batch", type=whole, default=8, help="views in one pass (default: %(default)s)")
    return parser


def _units(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Unit]:
    """What to measure; exits with a message if options do not fit together or a package is missing."""
    options.limit = options.limit or LIMITS[options.device]
    models = options.model or (("demo",) if options.growth else SMALL if options.device == "cpu" else TRUE)
    if large := [name for name in models if not SUBJECTS[name].small and options.device == "cpu"]:
        parser.error(f"--model {' '.join(large)} is of true size, for a GPU; small ones are {', '.join(SMALL)}")
    if missing := [name for name in ("diffusers", "transformers") if facts.package_version(name) == "absent"]:
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
