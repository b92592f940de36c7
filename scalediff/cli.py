"""The `scalediff` command: argument parsing only."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scalediff import commands
from scalediff.commands import SCHEDULERS
from scalediff.flops import MODELS


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is N or HxW in pixels, got {text!r}")
    height = int(match[1])
    return height, int(match[2] or height)


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"a seed lies in [0, 2^63), got {seed}")
    return seed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scalediff", description="Diffusion pictures far above the model's native size.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw a picture", description="Draw a picture; every finished stage is saved.")
    generate.add_argument("prompt", metavar="PROMPT")
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
    command.add_argument("--seed", type=_seed, default=0, help="same seed, same machine: same picture (default: 0)")
    command.add_argument("--out", type=Path, metavar="FILE", help="PNG file (default: named after the prompt or picture, and the seed)")
    command.add_argument(
        "--workdir", type=Path, metavar="FOLDER", help="keeps every stage; the same command goes on where it was interrupted"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    command.add_argument("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    command.add_argument("--scheduler", choices=tuple(SCHEDULERS), help="instead of the model's own")
    command.add_argument("--quiet", action="store_true", help="no progress bars")

    method = command.add_argument_group("method", "defaults come from the model family's preset")
    method.add_argument("--steps", type=int, help="steps of the whole schedule")
    method.add_argument("--restart", type=float, help="share of the steps that a high-resolution stage runs, in (0, 1]")
    method.add_argument("--guidance-scale", type=float, help="classifier-free guidance")
    method.add_argument("--attention", choices=("npa", "full"), help="neighborhood patch attention, or the model's own")
    method.add_argument("--lfm", action=argparse.BooleanOptionalAction, help="latent frequency mixing")
    method.add_argument("--sg", action=argparse.BooleanOptionalAction, help="structure guidance")
    method.add_argument("--lfm-cutoff", type=float, help="kept fraction of Nyquist, in (0, 1]")
    method.add_argument("--sg-cutoff", type=float, help="kept fraction of Nyquist, in (0, 1]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 2 on bad input (one line on stderr), 130 on Ctrl-C.

    With SCALEDIFF_DEBUG set, errors keep their traceback.
    """
    options = _parser().parse_args(arguments)
    try:
        run = {
            "generate": commands.generate_picture,
            "upscale": commands.upscale_picture,
            "plan": commands.show_plan,
            "models": commands.show_models,
            "info": commands.show_info,
        }
        run[options.command](options)
    except torch.OutOfMemoryError as error:
        print(f"scalediff: error: out of memory: try a smaller --size or --dtype bf16 ({commands.one_line(error)})", file=sys.stderr)
        return 1
    except (commands.UsageError, ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if os.environ.get("SCALEDIFF_DEBUG"):
            raise
        print(f"scalediff: error: {commands.one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
