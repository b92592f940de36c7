"""The `scalediff` command: argument parsing only."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scalediff.command import commands, drawing
from scalediff.command.loading import SCHEDULERS, UsageError, one_line
from scalediff.cost.flops import MODELS


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is N or HxW in pixels, got {text!r}")
    height = int(match[1])
    return height, int(match[2] or height)


def _sizes(text: str) -> list[tuple[int, int]]:
    return [_size(one) for one in text.split(",")]


def _seeds(text: str) -> list[int]:
    """`7`, `0,1,2`, `0-3` and mixtures."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]) or int(match[2] or match[1]) >= 2**63:
            raise argparse.ArgumentTypeError(f"seeds are N, N-M or a list of these with commas, in [0, 2^63), got {text!r}")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds


def _per_stage(text: str) -> float | tuple[float, ...]:
    """A number, or one for each stage above the native size, with commas."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a number, or a list with commas, one for each stage, got {text!r}") from error
    return numbers if len(numbers) > 1 else numbers[0]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scalediff", description="Diffusion pictures far above the model's native size.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="draw pictures", description="Draw a picture for every prompt and seed; every finished stage is saved."
    )
    generate.add_argument("prompt", metavar="PROMPT", nargs="*")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="more of them, one a line")
    generate.add_argument("--size", type=_size, metavar="N|HxW", help="pixels (default: 4x the model's native size)")
    generate.add_argument("--compare", action="store_true", help="also draw by direct inference and with full attention, side by side")
    _add_run(generate)

    upscale = commands.add_parser(
        "upscale", help="enlarge a picture", description="Enlarge a picture and draw detail into it; every finished stage is saved."
    )
    upscale.add_argument("file", type=Path, metavar="FILE", help="a picture of any format that Pillow reads")
    upscale.add_argument("prompt", metavar="PROMPT", help="what it shows")
    upscale.add_argument("--size", type=_size, metavar="N|HxW", help="pixels, of the picture's shape (default: twice its sides)")
    _add_run(upscale)

    plan = commands.add_parser(
        "plan",
        help="how much work a picture is",
        description="Count the work of every stage for a model at its true size, without weights.",
    )
    plan.add_argument("--model", choices=tuple(MODELS), default="sdxl")
    plan.add_argument("--size", type=_size, metavar="N|HxW", default=(4096, 4096), help="pixels (default: 4096)")
    plan.add_argument("--attention", choices=("npa", "full"), default="npa", help="of the stages above the native size")
    plan.add_argument("--json", action="store_true", help="for scripts")

    commands.add_parser(
        "models", help="list the known models", description="List the denoisers that are known, and what is done with them."
    )

    info = commands.add_parser("info", help="print what made a picture", description="Print a picture's metadata as JSON.")
    info.add_argument("file", type=Path, metavar="FILE")
    return parser


def _add_run(command: argparse.ArgumentParser) -> None:
    """What drawing and enlarging have in common."""
    command.add_argument("--negative-prompt", metavar="TEXT")
    command.add_argument("--model", default="demo", help="demo (embedded, default), a pipeline folder, or a Hugging Face model id")
    command.add_argument("--seed", type=_seeds, default=[0], metavar="N|N-M|N,M", help="a picture for each (default: 0)")
    command.add_argument("--out", type=Path, metavar="FILE", help="PNG file, or a folder (default: here, named after prompt and seed)")
    command.add_argument(
        "--workdir", type=Path, metavar="FOLDER", help="keeps every stage; the same command goes on where it was interrupted"
    )
    command.add_argument("--sizes", type=_sizes, metavar="HxW,...", help="every stage, instead of twice the size each time")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    command.add_argument("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    command.add_argument("--scheduler", choices=tuple(SCHEDULERS), help="instead of the model's own")
    command.add_argument("--timestep-spacing", choices=("leading", "linspace", "trailing"), help="of the scheduler")
    command.add_argument("--preview", type=_positive, metavar="N", help="show what it is to become at every N-th step, in a file")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument("--json", action="store_true", help="a line for every picture on stdout, for scripts")

    memory = command.add_argument_group("memory", "an estimate is printed before anything is drawn")
    memory.add_argument("--low-memory", action="store_true", help="tiles, guidance split, and a component on the GPU only while it works")
    memory.add_argument("--vae-tiling", action=argparse.BooleanOptionalAction, help="the autoencoder in tiles (default: where needed)")
    memory.add_argument("--vae-attention", choices=("full", "npa"), default="full", help="of the autoencoder")
    memory.add_argument("--split-guidance", action="store_true", help="the two passes of guidance one after the other")

    method = command.add_argument_group("method", "defaults come from the preset; N,M,... is one for each stage above the native size")
    method.add_argument("--preset", default="default", help="default, paper, turbo, lightning: scalediff models lists them")
    method.add_argument("--steps", type=int, help="steps of the whole schedule")
    method.add_argument("--restart", type=_per_stage, metavar="R", help="share of the steps that a high-resolution stage runs, in (0, 1]")
    method.add_argument("--guidance-scale", type=float, metavar="S", help="classifier-free guidance")
    method.add_argument("--guidance-until", type=_per_stage, metavar="R", help="share of those steps that is guided, in [0, 1]")
    method.add_argument("--attention", choices=("npa", "full"), help="neighborhood patch attention, or the model's own")
    method.add_argument("--jitter", choices=("none", "alternate", "random"), help="of the patch grid, from step to step")
    method.add_argument("--lfm", action=argparse.BooleanOptionalAction, help="latent frequency mixing")
    method.add_argument("--sg", action=argparse.BooleanOptionalAction, help="structure guidance")
    method.add_argument("--lfm-cutoff", type=_per_stage, metavar="C", help="kept fraction of Nyquist, in (0, 1]")
    method.add_argument("--sg-cutoff", type=_per_stage, metavar="C", help="kept fraction of Nyquist, in (0, 1]")
    method.add_argument("--sg-cutoff-start", type=_per_stage, metavar="C", help="that at the first step, if it is to change")
    method.add_argument("--filter", choices=("resize", "gaussian", "butterworth"), help="low-pass filter of both")
    method.add_argument("--anchor", choices=("picture", "trajectory"), help="what structure guidance draws to")
    method.add_argument("--size-conditioning", choices=("target", "native"), help="the size that SDXL is told")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 1 without memory, 2 on bad input (one line on stderr), 130 on Ctrl-C.

    With SCALEDIFF_DEBUG set, errors keep their traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        run = {
            "generate": drawing.generate_pictures,
            "upscale": drawing.upscale_pictures,
            "plan": commands.show_plan,
            "models": commands.show_models,
            "info": commands.show_info,
        }
        run[options.command](options)
    except torch.OutOfMemoryError as error:
        print(f"scalediff: error: {one_line(error)}", file=sys.stderr)
        return 1
    except (UsageError, ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if os.environ.get("SCALEDIFF_DEBUG"):
            raise
        print(f"scalediff: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
